"""Weights in the order in which oneDNN multiplies them, kept for as long as `generate` runs on a CPU.

In bfloat16 PyTorch has oneDNN put a weight into that order for every product, which takes longer than the product of a
few rows itself. The numbers are the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from transformers.utils import logging

from .backends import HAS_ONEDNN_PACKING


logger = logging.get_logger(__name__)

PATIENCE = 4  # products of a weight before it is packed, which takes as long as about ten of them
LIMIT = 2 << 30  # bytes of all that is packed


class PackedWeights:
    """Copies of the weights of a `generate`, made of each once it has multiplied a few times."""

    def __init__(self):
        self.uses: dict[Tensor, int] = {}
        self.packed: dict[Tensor, Tensor] = {}
        self.free = LIMIT

    def __call__(self, weight: Tensor) -> Tensor | None:
        """The copy of `weight`, which is about to multiply, if it is time for one and there is room."""
        packed = self.packed.get(weight)
        if packed is not None:
            return packed
        self.uses[weight] = self.uses.get(weight, 0) + 1
        if self.uses[weight] <= PATIENCE:
            return None
        if weight.nbytes > self.free:
            if self.uses[weight] == PATIENCE + 1:
                logger.info(f"A weight of {weight.nbytes} bytes is not packed: of {LIMIT}, {self.free} are left.")
            return None
        self.free -= weight.nbytes
        self.packed[weight] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        return self.packed[weight]


# what the `generate` of this thread has packed
PACKED: ContextVar[PackedWeights | None] = ContextVar("PACKED", default=None)


@contextmanager
def packing() -> Iterator[None]:
    """At its end, what was packed inside is let go."""
    token = PACKED.set(PACKED.get())
    try:
        yield
    finally:
        PACKED.reset(token)


def pack(wanted: bool) -> None:
    """Has weights packed from here on, or not. A `generate` within another adds to what that has packed."""
    if not wanted:
        PACKED.set(None)
    elif HAS_ONEDNN_PACKING and PACKED.get() is None:
        PACKED.set(PackedWeights())
