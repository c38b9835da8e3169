"""A block of xLSTM-7B for a few tokens in six kernels: what `XLSTMBlock` computes, for inference.

| kernel | reads | computes |
|---|---|---|
| product | q, k, v, o and gates | norm before it |
| steps of the cell | its state | h |
| the rest of the cell | h | n and m of the state, norm of heads and output gate |
| product | output projection | residual |
| product | gate and up projection | norm before it, SwiGLU behind it |
| product | down projection | residual |

With more than one row a norm is a kernel of its own. Weights and states are read once, and nothing else of their size.
Where processes share the heads, two more kernels add up what they have (`peers_triton`), and the residual.
"""

from typing import Any

import torch
from torch import Tensor

from .backends import resolve
from .cache_xlstm import LayerState
from .custom_op import is_compiling
from .layers_xlstm import MLSTMLayer, is_few
from .linear import are_rows_for_triton, is_weight_for_triton
from .linear_triton import ROWS, Gates, Norm, multiply
from .peers_triton import Peers, peers_of
from .tensor_parallel import BlockWeights, block_weights


def step_weights(block: Any, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None) -> BlockWeights | None:
    """The weights for `block_steps`, if it serves this: a plain block of xLSTM-7B in half precision, for inference, and
    a state to overwrite."""
    if not are_rows_for_triton(x) or is_compiling() or block.training:
        return None
    if type(block.mixer) is not MLSTMLayer or state is None or not state.in_place or cu_seqlens is not None:
        return None
    if not is_few(*x.shape[:2]) or x.numel() > ROWS * x.shape[-1] or torch.is_autocast_enabled(x.device.type):
        return None
    weights = block_weights(block) if resolve(block.mixer.backend, x) == "triton" else None
    if weights is None:
        return None
    matrices = weights.qkvo, weights.out, weights.up, weights.down
    fits = all(is_weight_for_triton(weight, x) for weight in matrices)
    return weights if fits and (block.mixer.group is None or peers_of(block.mixer.group, x.device)) else None


def block_steps(block: Any, weights: BlockWeights, x: Tensor, state: LayerState, mask: Tensor | None) -> Tensor:
    """x `[B, T, D]` to that behind the block; the state becomes the new one."""
    B, T, D = x.shape
    mixer = block.mixer
    peers = None if mixer.group is None else peers_of(mixer.group, x.device)
    x = x.reshape(B * T, D)
    gates = Gates(weights.gate, weights.gate_bias, x.new_empty(B * T, len(weights.gate), dtype=torch.float32))
    qkvo = multiply(x, weights.qkvo, norm=Norm(weights.mixer_norm, block.mixer_norm.eps), gates=gates)
    y, _ = mixer.heads(qkvo.view(B, T, -1), gates.out.view(B, T, -1), state.cell, True, mask)
    x = _added(y.flatten(0, 1), weights.out, x, peers, 0)
    y = multiply(x, weights.up, norm=Norm(weights.ffn_norm, block.ffn_norm.eps), activation="silu")
    return _added(y, weights.down, x, peers, 1).view(B, T, D)


def _added(y: Tensor, weight: Tensor, residual: Tensor, peers: Peers | None, place: int) -> Tensor:
    """`residual + y @ weight.T`, with what the other processes have of the product."""
    if peers is None:
        return multiply(y, weight, residual=residual)
    out, copies = peers.term(place, residual)
    multiply(y, weight, out=out, copies=copies)
    return peers.total(place, residual)
