"""Long passes of a model whose heads GPUs share, in which each has some rows of what goes from block to block.

An all-reduce behind each mixer and feed-forward would leave every GPU with all rows, of which each then normalises and
adds up all. Here a GPU adds up and normalises its own, the products before that give each GPU its rows first, and those
behind it begin with the rows that a GPU has: messages are on their way while products are made. For inference.

Dims: `B` batch `T` time `D` hidden size `N` GPUs `R` rows of one, `ceil(B T / N)`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from .backends import HAS_TRITON, resolve
from .cache_xlstm import LayerState
from .layers_xlstm import gate_linear, unpack_state
from .linear import glu
from .tensor_parallel import BlockWeights


if HAS_TRITON:
    from .peers_triton import peers_of


FEWEST = 4096  # rows, below which products in parts take longer than messages


class Rows:
    """The rows of x `[B, T, D]` that this GPU has, on their way through blocks of xLSTM-7B."""

    def __init__(self, x: Tensor, peers: Any):
        self.shape, self.peers = x.shape, peers
        self.rows = self._filled(x.flatten(0, 1)).chunk(peers.world)[peers.rank].clone()  # [R, D]
        self.terms: tuple[Tensor, Tensor] | None = None  # still to be added, this GPU's and those of the others

    def block(
        self, block: Any, weights: BlockWeights, state: LayerState | None, mask: Tensor | None
    ) -> LayerState:  # fmt: skip
        """Lets a block read on; returns its state."""
        mixer, (B, T, _) = block.mixer, self.shape
        cell, _, in_place = unpack_state(state, None)
        x, qkvo = self._read(weights.mixer_norm, block.mixer_norm.eps, weights.qkvo)
        gates = gate_linear(x, weights.gate, weights.gate_bias, mixer.backend)
        y, cell = mixer.heads(qkvo.view(B, T, -1), gates.view(B, T, -1), cell, in_place, mask)
        self._add(y.flatten(0, 1), weights.out)
        _, up = self._read(weights.ffn_norm, block.ffn_norm.eps, weights.up)
        self._add(glu(up, block.ffn.activation, block.ffn.backend), weights.down)
        return LayerState(cell)

    def whole(self) -> Tensor:
        """x `[B, T, D]` of all GPUs."""
        B, T, D = self.shape
        return self.peers.gathered(self.peers.added(self.rows, self.terms))[: B * T].view(B, T, D)

    def _read(self, norm: Tensor, eps: float, weight: Tensor) -> tuple[Tensor, Tensor]:
        """All rows `[B T, ...]`, normalised, and their product with a weight."""
        self.peers.add_norm(self.rows, self.terms, norm, eps)
        self.terms = None
        x, y = self.peers.multiply_gathered(weight)
        count = self.shape[0] * self.shape[1]
        return x[:count], y[:count]

    def _add(self, y: Tensor, weight: Tensor) -> None:
        self.terms = self.peers.multiply_scattered(self._filled(y), weight)

    def _filled(self, x: Tensor) -> Tensor:
        """With rows of zeros behind it, so that each GPU has as many."""
        missing = -len(x) % self.peers.world
        return F.pad(x, (0, 0, 0, missing)) if missing else x


def rows_of(x: Tensor, group: ProcessGroup | None, backend: str) -> Rows | None:
    """Those of this GPU, if a group of GPUs shares heads and x is long enough. For inference."""
    fits = HAS_TRITON and group is not None and x.is_cuda and x.shape[0] * x.shape[1] >= FEWEST
    if not fits or resolve(backend, x) != "triton" or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return None
    peers = peers_of(group, x.device)
    return None if peers is None else Rows(x, peers)
