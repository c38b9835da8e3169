"""Products of a few rows with large weights in Triton: `y = x @ weight.T`, with what comes before and after it.

Up to `ROWS` rows, such as one token each of a batch, take as long as reading the weights once. A program has `BN` rows
of the weights, which are columns of y, and all of x. One row is multiplied without tensor cores, and normalised on the
way; more rows are columns of a product of tensor cores, on blocks that the copy engine brings to shared memory.

Kernels are a chain on GPUs that can do that: each starts before the one in front of it has ended, and asks for its
first weights, which nothing before it writes, until the rest may be read.

Dims: `M` rows `K` inputs `N` outputs `G` gates. Products are summed in float32 and rounded once, at the end.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .mlstm_triton_kernels import _tanh
from .triton_language import (
    TensorDescriptor,
    blocks_of,
    chain_options,
    chains,
    gdc_launch_dependents,
    gdc_wait,
    power_of_2,
    processors,
    shared_memory,
    tl,
    triton,
)


ROWS = 64  # what is faster than a product of PyTorch
LINE = tl.constexpr(128)  # bytes that memory hands out at once
AHEAD = tl.constexpr(2)  # blocks of weights asked for before the rest may be read


# helpers


@triton.jit
def _gates(
    i, x, norm, weight, bias, out, M, eps,
    K: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`BG` gates of `BM` rows: `rms_norm(x) @ weight.T + bias`, in float32."""
    GB: tl.constexpr = (G + BG - 1) // BG
    o_m, o_g = i // GB * BM + tl.arange(0, BM), i % GB * BG + tl.arange(0, BG)
    in_m, in_g = (o_m < M)[:, None], (o_g < G)[:, None]
    total, squares = tl.zeros([BM, BG, BK], dtype=tl.float32), tl.zeros([BM, BK], dtype=tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        in_k = o_k < K
        b_x = tl.load(x + o_m[:, None] * K + o_k[None, :], mask=in_m & in_k[None, :], other=0.0).to(tl.float32)
        b_w = tl.load(weight + o_g[:, None] * K + o_k[None, :], mask=in_g & in_k[None, :], other=0.0).to(tl.float32)
        squares += b_x * b_x
        b_x *= tl.load(norm + o_k, mask=in_k, other=0.0).to(tl.float32)[None, :]
        total += b_x[:, None, :] * b_w[None, :, :]
    y = tl.sum(total, 2) * tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
    y += tl.load(bias + o_g, mask=o_g < G, other=0.0).to(tl.float32)[None, :]
    tl.store(out + o_m[:, None] * G + o_g[None, :], y, mask=in_m & (o_g < G)[None, :])


@triton.jit
def _finish(y, up, o, valid, residual, cap, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, CAPPED: tl.constexpr):
    """What follows a product: `activation(gate) * up`, a residual, a soft cap."""
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y) * up
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476)) * up
    if RESIDUAL:
        y += tl.load(residual + o, mask=valid, other=0.0).to(tl.float32)
    if CAPPED:
        y = cap * _tanh(y / cap)
    return y


@triton.jit
def _store(b_y, y, copies, o, valid, COPIES: tl.constexpr):
    """Writes a block of y, and again to other places."""
    b_y = b_y.to(y.dtype.element_ty)
    tl.store(y + o, b_y, mask=valid)
    for i in tl.static_range(COPIES):
        tl.store(tl.load(copies + i).to(tl.pointer_type(y.dtype.element_ty)) + o, b_y, mask=valid)


# kernels


@triton.jit
def vector_kernel(
    x, weight, y, copies, norm, residual, gate_weight, gate_bias, gates, N, eps, cap,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr, NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, CAPPED: tl.constexpr, COPIES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """`BN` outputs for the only row, or in the first programs a gate."""
    i = tl.program_id(0)
    if G > 0:  # noqa: SIM102  # the one is known to the compiler, the other is not
        if i < G:
            if CHAINED:
                gdc_wait()
                gdc_launch_dependents()
            _gates(i, x, norm, gate_weight, gate_bias, gates, 1, eps, K, G, 1, 1, BK)
    if i >= G:
        o_n, o_k = (i - G) * BN + tl.arange(0, BN), tl.arange(0, BK)
        in_n = o_n < N
        rows = weight + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
        b_w = tl.load(rows, mask=in_n[:, None] & (o_k < K)[None, :], other=0.0)
        if ACTIVATION != "":
            up_rows = rows + N.to(tl.int64) * K
            b_up = tl.load(up_rows, mask=in_n[:, None] & (o_k < K)[None, :], other=0.0)
        total, up_total = tl.zeros([BN, BK], dtype=tl.float32), tl.zeros([BN, BK], dtype=tl.float32)
        squares = tl.zeros([BK], dtype=tl.float32)
        if CHAINED:  # in this order, so that no kernel behind this one runs before the one in front of this one ends
            gdc_wait()
            gdc_launch_dependents()
        for k in range(0, K, BK):
            b_x = tl.load(x + k + o_k, mask=k + o_k < K, other=0.0).to(tl.float32)
            in_next = in_n[:, None] & (k + BK + o_k < K)[None, :]
            next_w = tl.load(rows + k + BK, mask=in_next, other=0.0)
            if NORM:
                squares += b_x * b_x
                b_x *= tl.load(norm + k + o_k, mask=k + o_k < K, other=0.0).to(tl.float32)
            total += b_w.to(tl.float32) * b_x[None, :]
            b_w = next_w
            if ACTIVATION != "":
                next_up = tl.load(up_rows + k + BK, mask=in_next, other=0.0)
                up_total += b_up.to(tl.float32) * b_x[None, :]
                b_up = next_up
        b_y, up = tl.sum(total, 1), tl.sum(up_total, 1)
        if NORM:
            scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
            b_y, up = b_y * scale, up * scale
        b_y = _finish(b_y, up, o_n, in_n, residual, cap, ACTIVATION, RESIDUAL, CAPPED)
        _store(b_y, y, copies, o_n, in_n, COPIES)


@triton.jit
def norm_kernel(x, norm, y, eps, K: tl.constexpr, BK: tl.constexpr, CHAINED: tl.constexpr):
    """`rms_norm` of a row."""
    row, o_k = tl.program_id(0).to(tl.int64) * K, tl.arange(0, BK)
    b_norm = tl.load(norm + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    b_x = tl.load(x + row + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, 0) / K + eps) * b_norm
    tl.store(y + row + o_k, b_x.to(y.dtype.element_ty), mask=o_k < K)


@triton.jit(do_not_specialize=["M"])
def rows_kernel(
    x, blocks, weight, y, copies, residual, before, norm, gate_weight, gate_bias, gates, N, M, eps, cap,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr, GM: tl.constexpr,
    GG: tl.constexpr, GK: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, CAPPED: tl.constexpr,
    COPIES: tl.constexpr, STAGES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """`BN` outputs for every row, or in the first programs `GG` gates of `GM` rows.

    `x` and `blocks`, which are those of `weight`, are described to the copy engine; `before` is x before the norm.
    """
    i, GATE_PROGRAMS = tl.program_id(0), 0
    if G > 0:
        GATE_PROGRAMS = (M + GM - 1) // GM * ((G + GG - 1) // GG)
        if i < GATE_PROGRAMS:
            if CHAINED:
                gdc_wait()
                gdc_launch_dependents()
            _gates(i, before, norm, gate_weight, gate_bias, gates, M, eps, K, G, GM, GG, GK)
    if i >= GATE_PROGRAMS:
        n = (i - GATE_PROGRAMS) * BN
        o_n, o_m = n + tl.arange(0, BN), tl.arange(0, BM)
        if CHAINED:
            STEP: tl.constexpr = LINE * 8 // weight.dtype.element_ty.primitive_bitwidth
            o_line = tl.minimum(tl.arange(0, BK * AHEAD // STEP) * STEP, K - 1)
            lines = weight + tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * K + o_line[None, :]
            _ask(lines)
            if ACTIVATION != "":
                _ask(lines + N.to(tl.int64) * K)
            gdc_wait()
            gdc_launch_dependents()
        total, up = tl.zeros([BN, BM], dtype=tl.float32), tl.zeros([BN, BM], dtype=tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            b_x = tl.trans(x.load([0, k]))
            total = tl.dot(blocks.load([n, k]), b_x, total)
            if ACTIVATION != "":
                up = tl.dot(blocks.load([N + n, k]), b_x, up)
        o = o_m[None, :] * N + o_n[:, None]
        valid = (o_m < M)[None, :] & (o_n < N)[:, None]
        total = _finish(total, up, o, valid, residual, cap, ACTIVATION, RESIDUAL, CAPPED)
        _store(total, y, copies, o, valid, COPIES)


@triton.jit
def _ask(lines):
    """Brings lines of memory nearer, without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


# launchers


class Norm(NamedTuple):
    """RMS norm of the rows of x: `x / sqrt(mean(x ** 2) + eps) * weight`, weight `[K]`."""

    weight: Tensor
    eps: float


class Gates(NamedTuple):
    """`weight` `[G, K]`, `bias` `[G]`, and where `rms_norm(x) @ weight.T + bias` is written: `out` `[M, G]` float32."""

    weight: Tensor
    bias: Tensor
    out: Tensor


def multiply(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Norm | None = None,
    gates: Gates | None = None,
    activation: str = "",
    residual: Tensor | None = None,
    cap: float | None = None,
    out: Tensor | None = None,
    copies: Tensor | None = None,
) -> Tensor:
    """y `[M, N]` in the dtype of x: `cap(activation(rms_norm(x) @ weight.T) + residual)`. Without gradients.

    Args:
        x: `[M, K]`, contiguous, M at most `ROWS`; float16 or bfloat16 (one row: float32 too).
        weight: `[N, K]`, contiguous, of the dtype of x; with an activation `[2 N, K]`, rows [gate | up].
        norm: What is done to x first. It rounds rows to the dtype of x where there are more than one.
        gates: More outputs, in float32, where there is a norm.
        activation: `"silu"` or `"gelu"`: of the gate, which is multiplied with what is up.
        residual: `[M, N]`, contiguous, of the dtype of x.
        cap: y becomes `cap * tanh(y / cap)`.
        out: Where y is written, contiguous, of any dtype; new when omitted.
        copies: `[n]` int64, addresses of other such places, which may be of other GPUs.
    """
    M, K = x.shape
    N = weight.shape[0] // (2 if activation else 1)
    y, chain = x.new_empty(M, N) if out is None else out, chain_options(chains(x.device))
    options = {
        "K": K, "ACTIVATION": activation, "RESIDUAL": residual is not None, "CAPPED": cap is not None,
        "COPIES": 0 if copies is None else len(copies), "num_warps": 4, **chain,
    }  # fmt: skip
    gate_weight, gate_bias, gated = gates or (None, None, None)
    G = 0 if gates is None else gates.weight.shape[0]
    with torch.cuda.device_of(x):
        if M == 1:
            BN, BK = 8, min(512, power_of_2(K))
            norm_weight, eps = norm or (None, 0.0)
            vector_kernel[(blocks_of(N, BN) + G,)](
                x, weight, y, copies, norm_weight, residual, gate_weight, gate_bias, gated, N, eps, cap or 0.0,
                BN=BN, BK=BK, G=G, NORM=norm is not None, **options,
            )  # fmt: skip
            return y
        before, (norm_weight, eps) = x, norm or (None, 0.0)
        if norm is not None:
            x = torch.empty_like(before)
            norm_kernel[(M,)](
                before, norm_weight, x, eps, K=K, BK=power_of_2(K), num_warps=8, **chain,
            )  # fmt: skip
        BM, GM, GG = max(16, power_of_2(M)), 4, 4
        BN, BK, options["num_warps"], stages = _blocks(BM, N, K, bool(activation), x.element_size(), x.device)
        rows_kernel[(blocks_of(N, BN) + blocks_of(M, GM) * blocks_of(G, GG),)](
            TensorDescriptor(x, [M, K], [K, 1], [BM, BK]), TensorDescriptor(weight, [*weight.shape], [K, 1], [BN, BK]),
            weight, y, copies, residual, before, norm_weight, gate_weight, gate_bias, gated, N, M, eps, cap or 0.0,
            BM=BM, BN=BN, BK=BK, G=G, GM=GM, GG=GG, GK=min(512, power_of_2(K)), STAGES=stages, **options,
        )  # fmt: skip
    return y


def _blocks(
    BM: int, N: int, K: int, gated: bool, itemsize: int, device: torch.device
) -> tuple[int, int, int, int]:  # fmt: skip
    """Outputs and inputs of a block, warps, and how many blocks are on their way at once. Picked on an H100."""
    BN, warps = (32, 2) if BM == 16 and not gated and K <= 8192 else (64, 4)
    BK = 256 if BM == 16 else 128
    memory = (shared_memory(device) or 1 << 18) - 4096
    if not gated and blocks_of(N, BN) > (processors(device) or 1):  # two programs share a processor
        memory //= 2
    width = (BM + BN * (2 if gated else 1)) * itemsize
    while 2 * BK * width > memory:
        BK //= 2
    return BN, BK, warps, min(9, memory // (BK * width))
