"""Sums over the GPUs of one host that share the heads of a model, through memory that all of them can read.

An all-reduce of a few rows by NCCL is slow beside the product before it. Here that product writes its term of the sum
to the memory of every GPU. A kernel tells the others so, waits for theirs, and adds up all of them, in float32 and in
the same order everywhere, so that each GPU has the same bits.

Dims: `M` rows `D` hidden size `R` rows of a process.
"""

import socket
from functools import cache
from itertools import permutations
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers.utils import logging

from .linear_triton import ROWS
from .triton_language import (
    blocks_of,
    chain_options,
    chains,
    gdc_launch_dependents,
    gdc_wait,
    globaltimer,
    power_of_2,
    tl,
    triton,
)


logger = logging.get_logger(__name__)

PROGRAMS = 32  # each has a flag for each GPU
BLOCK = 1024
PATIENCE = tl.constexpr(600_000_000_000)  # nanoseconds, as NCCL by default


# helpers


@triton.jit
def _flag(addresses, of, number):
    """A flag in the memory of a GPU."""
    return tl.load(addresses + of).to(tl.pointer_type(tl.int32)) + number


@triton.jit
def _trap():
    """Ends all work of this process on the GPU."""
    tl.inline_asm_elementwise("trap; // $0 $1", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


# kernels


@triton.jit(do_not_specialize=["M"])
def total_kernel(
    addresses, terms, residual, y, M, D, first_flag, capacity,
    RANK: tl.constexpr, WORLD: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """`residual + sum(terms)`, terms `[WORLD, capacity]`; the memory of each GPU, at its address, begins with flags.

    A flag goes up when a term is there, and down when that is known. The next sum has other flags, which may go up
    before.
    """
    i, programs = tl.program_id(0), tl.num_programs(0)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    begin = globaltimer()
    for other in tl.static_range(WORLD):
        if other != RANK:
            tl.atomic_add(_flag(addresses, other, first_flag + i * WORLD + RANK), 1, sem="release", scope="sys")
    for other in tl.static_range(WORLD):
        if other != RANK:
            flag = _flag(addresses, RANK, first_flag + i * WORLD + other)
            while tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys") != 1:
                if globaltimer() - begin > PATIENCE:
                    _trap()
    tl.debug_barrier()
    for first in range(i * BLOCK, M * D, programs * BLOCK):
        o = first + tl.arange(0, BLOCK)
        valid = o < M * D
        total = tl.load(residual + o, mask=valid, other=0.0).to(tl.float32)
        for other in tl.static_range(WORLD):
            total += tl.load(terms + other * capacity + o, mask=valid, other=0.0)
        tl.store(y + o, total.to(y.dtype.element_ty), mask=valid)


@triton.jit
def add_norm_kernel(
    x, own, others, norm, y, R, D, eps, OTHERS: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """A row of x becomes `x + own + sum(others)`, and y its `rms_norm`."""
    i, o = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    valid = o < D
    row = i * D + o
    total = tl.load(x + row, mask=valid, other=0.0).to(tl.float32)
    if OTHERS >= 0:
        total += tl.load(own + row, mask=valid, other=0.0).to(tl.float32)
        for j in tl.static_range(OTHERS):
            total += tl.load(others + j * R.to(tl.int64) * D + row, mask=valid, other=0.0).to(tl.float32)
        rounded = total.to(x.dtype.element_ty)
        tl.store(x + row, rounded, mask=valid)
        total = rounded.to(tl.float32)
    total *= tl.rsqrt(tl.sum(total * total, 0) / D + eps)
    total *= tl.load(norm + o, mask=valid, other=0.0).to(tl.float32)
    tl.store(y + row, total.to(y.dtype.element_ty), mask=valid)


# launchers


def shared_memory_of(
    group: ProcessGroup, count: int, dtype: torch.dtype, device: torch.device
) -> tuple[Any, list[Tensor]]:
    """So many numbers of each GPU that all of a group can read and write, in the order of the group, and their handle.

    All processes of the group must call this.
    """
    mine = symmetric_memory.empty(count, dtype=dtype, device=device)
    handle = symmetric_memory.rendezvous(mine, group.group_name)
    first = handle.get_buffer(handle.rank, (count,), dtype).data_ptr()
    offset = (mine.data_ptr() - first) // mine.element_size()  # where PyTorch cut it from more
    others = [handle.get_buffer(i, (count,), dtype, offset) for i in range(handle.world_size)]
    return handle, [mine if i == handle.rank else x for i, x in enumerate(others)]  # mine, as others do not keep it


class _Terms(NamedTuple):
    """Memory for terms of two sums `[M, D]`, M at most `ROWS`, which take turns; and for flags."""

    handle: Any  # as is `parts`, kept as long as there may be graphs that write there
    parts: list[Tensor]
    addresses: Tensor  # [N] of the memory of each GPU
    terms: Tensor  # [2, N, ROWS D] here
    copies: Tensor  # [2, N - 1] addresses at the others of this GPU's terms


class Peers:
    """The GPUs of a group of processes, each with memory that all can read and write.

    All processes of the group call the same, in the same order.
    """

    def __init__(self, group: ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.side = torch.cuda.Stream(device)  # on which rows are copied
        self._terms: dict[int, _Terms] = {}  # by D
        self._room: list[Tensor] = []  # bytes of each GPU, of which the rest are views
        self._rows_of: list[Tensor] = []  # [N, R, D] of each: its rows, and terms for the others

    def _settle(self) -> None:
        """Waits for all work of all GPUs."""
        torch.cuda.synchronize(self.device)
        dist.barrier(self.group)

    # few rows

    @torch.inference_mode(False)
    def _reserve_terms(self, D: int) -> _Terms:
        flags, count = 2 * PROGRAMS * self.world, ROWS * D
        handle, parts = shared_memory_of(self.group, flags + 2 * self.world * count, torch.float32, self.device)
        parts[self.rank].zero_()
        addresses = torch.tensor([x.data_ptr() for x in parts])
        starts = flags + count * (torch.arange(2)[:, None] * self.world + self.rank)
        copies = torch.cat((addresses[: self.rank], addresses[self.rank + 1 :])) + 4 * starts
        self._settle()  # until all flags are down
        terms = parts[self.rank][flags:].view(2, self.world, count)
        return _Terms(handle, parts, addresses.to(self.device), terms, copies.to(self.device))

    def term(self, place: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Where to write this GPU's term `[M, D]` of a sum, in float32: here, and at the addresses `[N - 1]` of others.

        Places 0 and 1 take turns.
        """
        M, D = like.shape
        if D not in self._terms:
            self._terms[D] = self._reserve_terms(D)
        of_width = self._terms[D]
        return of_width.terms[place, self.rank, : M * D].view(M, D), of_width.copies[place]

    def total(self, place: int, residual: Tensor) -> Tensor:
        """`residual` `[M, D]` and the terms of all, in the dtype of `residual`."""
        M, D = residual.shape
        y, of_width = torch.empty_like(residual), self._terms[D]
        with torch.cuda.device_of(residual):
            total_kernel[(min(PROGRAMS, blocks_of(M * D, BLOCK)),)](
                of_width.addresses, of_width.terms[place], residual, y, M, D, place * PROGRAMS * self.world, ROWS * D,
                RANK=self.rank, WORLD=self.world, BLOCK=BLOCK, num_warps=4, **chain_options(chains(residual.device)),
            )  # fmt: skip
        return y

    # many rows

    @property
    def _rows(self) -> Tensor:
        return self._rows_of[self.rank]

    @torch.inference_mode(False)
    def _reserve_rows(self, like: Tensor) -> None:
        shape, count = (self.world, *like.shape), self.world * like.numel()
        size = count * like.element_size()
        if not self._room or self._room[0].numel() < size:
            self._settle()
            self._many, self._room = shared_memory_of(self.group, size, torch.uint8, self.device)
        self._rows_of = [x[:size].view(like.dtype).view(shape) for x in self._room]

    def add_norm(self, x: Tensor, terms: tuple[Tensor, Tensor] | None, norm: Tensor, eps: float) -> None:
        """x `[R, D]` becomes `x + sum(terms)`, and this GPU's shared rows its `rms_norm`."""
        R, D = x.shape
        self._reserve_rows(x)
        own, others = terms or (None, None)
        with torch.cuda.device_of(x):
            add_norm_kernel[(R,)](
                x, own, others, norm, self._rows, R, D, eps,
                OTHERS=-1 if terms is None else self.world - 1, BD=power_of_2(D), num_warps=8,
            )  # fmt: skip

    def multiply_gathered(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The shared rows of all, `[N R, D]`, and their product with `weight.T`, beginning with this GPU's."""
        own, main = self._rows[0], torch.cuda.current_stream(self.device)
        x = own.new_empty(self.world, *own.shape)
        y = own.new_empty(self.world, len(own), len(weight))
        self._many.barrier()
        self.side.wait_stream(main)
        arrived = []
        with torch.cuda.stream(self.side):
            for i in ((self.rank + step) % self.world for step in range(1, self.world)):
                x[i].copy_(self._rows_of[i][0])
                arrived.append((i, self.side.record_event()))
            x[self.rank].copy_(own)
        torch.mm(own, weight.t(), out=y[self.rank])
        for i, event in arrived:
            main.wait_event(event)
            torch.mm(x[i], weight.t(), out=y[i])
        main.wait_stream(self.side)
        return x.flatten(0, 1), y.flatten(0, 1)

    def multiply_scattered(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Terms of this GPU's rows of the sum of `x @ weight.T`, x `[N R, K]`: `[R, D]`, others' `[N - 1, R, D]`."""
        rows, main = x.chunk(self.world), torch.cuda.current_stream(self.device)
        others = torch.empty_like(self._rows[1:])
        for step in range(1, self.world):
            torch.mm(rows[(self.rank + step) % self.world], weight.t(), out=self._rows[step])
            self._many.barrier()
            self.side.wait_stream(main)
            with torch.cuda.stream(self.side):
                others[step - 1].copy_(self._rows_of[(self.rank - step) % self.world][step])
        own = rows[self.rank] @ weight.t()
        main.wait_stream(self.side)
        return own, others

    def added(self, x: Tensor, terms: tuple[Tensor, Tensor] | None) -> Tensor:
        """x `[R, D]` and the terms."""
        return x if terms is None else x + terms[0] + terms[1].sum(0)

    def gathered(self, x: Tensor) -> Tensor:
        """x `[R, D]` of all, `[N R, D]`."""
        y = x.new_empty(self.world * len(x), x.shape[1])
        dist.all_gather_into_tensor(y, x, group=self.group)
        return y


@cache
def peers_of(group: ProcessGroup, device: torch.device) -> Peers | None:
    """The GPUs of a group, if each can read the memory of all others. All processes of the group must call this."""
    found: list[tuple[str, int]] = [("", 0)] * dist.get_world_size(group)
    dist.all_gather_object(found, (socket.gethostname(), device.index), group)
    hosts, indices = zip(*found, strict=True)
    seen = len(set(hosts)) == 1 and len(set(indices)) == len(indices) and max(indices) < torch.cuda.device_count()
    if seen and all(torch.cuda.can_device_access_peer(i, j) for i, j in permutations(indices, 2)):
        return Peers(group, device)
    logger.info("What GPUs share is added up by NCCL: they are not of one host, or cannot read each other's memory.")
    return None
