"""What follows the cell of an mLSTM in Triton: LayerNorm of each head, skip and gate, as one op with its gradients.

Both directions are bound by memory, so each is one kernel that reads and writes every tensor once, computes in float32
and rounds once. The backward pass recomputes mean and deviation of a row: it holds the row anyway, so that keeping them
would only add eight bytes a row to what is written and read. It has a fixed number of programs, each with its own sums
for the gradients of weight, bias and skip: always added in the same order, without atomics.

Dims: `B` batch `T` time `H` heads `V` value head dim `R` rows (tokens of all sequences) `P` programs of a head
`BR` rows of a block `BV` V, rounded up to a power of two.
"""

import torch
from torch import Tensor

from .custom_op import op
from .triton_language import blocks_of, power_of_2, processors, rows_of, tl, triton


# How work is cut, chosen by registers and bytes in flight on an H100: elements of a block, and of a warp.
FORWARD = (4096, 1024)
BACKWARD = (1024, 512)
# The backward pass: blocks that a program holds at once, and warps that a multiprocessor does.
STAGES = 3
WARPS = 16


# helpers


@triton.jit
def _standardise(x, in_rows, in_block, eps, V: tl.constexpr):
    """Rows of x with mean 0 and variance 1, and one over their deviations; x is 0 outside."""
    mean = tl.sum(x, 1) / V
    x = tl.where(in_block, x - mean[:, None], 0.0)
    variance = tl.sum(x * x, 1) / V
    rstd = tl.rsqrt(tl.where(in_rows, variance + eps, 1.0))  # eps may be 0, and sums must stay finite
    return x * rstd[:, None], rstd


@triton.jit
def _affine(weight, bias, channels, in_v, offset, HAS_BIAS: tl.constexpr):
    """Weight and bias of the channels of a head, `[1, BV]`."""
    w = tl.load(weight + channels, mask=in_v, other=0.0).to(tl.float32) + offset
    b = tl.zeros_like(w)
    if HAS_BIAS:
        b = tl.load(bias + channels, mask=in_v, other=0.0).to(tl.float32)
    return w[None, :], b[None, :]


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _gated(x, gate, SILU: tl.constexpr):
    """x times the gate, and the derivatives for x and for its pre-activation."""
    s = _sigmoid(gate)
    if SILU:
        value, slope = gate * s, s * (1 + gate * (1 - s))
    else:
        value, slope = s, s * (1 - s)
    return x * value, value, x * slope


# kernels


@triton.jit(do_not_specialize=["R"])
def gated_head_norm_fwd_kernel(
    h, o, weight, bias, c, skip, y, R, sh, so, sc, offset, eps, H,
    V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """y of a block of rows of one head."""
    i_h, i_r = tl.program_id(0) % H, tl.program_id(0) // H
    rows, o_v = i_r * BR + tl.arange(0, BR).to(tl.int64), tl.arange(0, BV)
    channels = i_h * V + o_v
    in_rows, in_v = rows < R, o_v < V
    inside = in_rows[:, None] & in_v[None, :]
    x = tl.load(h + rows[:, None] * sh + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(o + rows[:, None] * so + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    w, b = _affine(weight, bias, channels, in_v, offset, HAS_BIAS)
    x, _ = _standardise(x, in_rows, inside, eps, V)
    out = x * w + b
    if HAS_SKIP:
        b_c = tl.load(c + rows[:, None] * sc + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        out += tl.load(skip + channels, mask=in_v, other=0.0).to(tl.float32)[None, :] * b_c
    if HAS_GATE:
        out, _, _ = _gated(out, gate, HAS_SKIP)
    tl.store(y + rows[:, None] * (H * V) + channels[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
def gated_head_norm_bwd_kernel(
    dy, h, o, weight, bias, c, skip, dh, do, dc, sums, R, sdy, sh, so, sc, offset, eps, H,
    V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dh, do and dc of every P-th block of rows of one head, and `sums` `[3, P, H V]` of these for the channels'
    weight, bias and skip."""
    i_h, i_p, P = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    o_r, o_v = tl.arange(0, BR).to(tl.int64), tl.arange(0, BV)
    channels = i_h * V + o_v
    in_v = o_v < V
    w, b = _affine(weight, bias, channels, in_v, offset, HAS_BIAS)
    if HAS_SKIP:
        b_skip = tl.load(skip + channels, mask=in_v, other=0.0).to(tl.float32)[None, :]
    # of blocks, and over rows only in the end: no exchange between threads within the loop
    dw, db, dskip = tl.zeros([BR, BV], tl.float32), tl.zeros([BR, BV], tl.float32), tl.zeros([BR, BV], tl.float32)
    for i_r in tl.range(i_p, tl.cdiv(R, BR), P, num_stages=STAGES):
        rows = i_r * BR + o_r
        in_rows = rows < R
        inside = in_rows[:, None] & in_v[None, :]
        d = tl.load(dy + rows[:, None] * sdy + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(h + rows[:, None] * sh + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            gate = tl.load(o + rows[:, None] * so + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_SKIP:
            b_c = tl.load(c + rows[:, None] * sc + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        out = rows[:, None] * (H * V) + channels[None, :]
        x, rstd = _standardise(x, in_rows, inside, eps, V)
        if HAS_GATE:
            before = x * w + b
            if HAS_SKIP:
                before += b_skip * b_c
            _, value, slope = _gated(before, gate, HAS_SKIP)
            tl.store(do + out, (d * slope).to(do.dtype.element_ty), mask=inside)
            d *= value
        if HAS_SKIP:
            dskip += d * b_c
            tl.store(dc + out, (d * b_skip).to(dc.dtype.element_ty), mask=inside)
        dw += d * x
        if HAS_BIAS:
            db += d
        d *= w
        d_mean, d_deviation = tl.sum(d, 1) / V, tl.sum(d * x, 1) / V
        dx = (d - d_mean[:, None] - x * d_deviation[:, None]) * rstd[:, None]
        tl.store(dh + out, dx.to(dh.dtype.element_ty), mask=inside)
    tl.store(sums + i_p * H * V + channels, tl.sum(dw, 0), mask=in_v)
    if HAS_BIAS:
        tl.store(sums + (P + i_p) * H * V + channels, tl.sum(db, 0), mask=in_v)
    if HAS_SKIP:
        tl.store(sums + (2 * P + i_p) * H * V + channels, tl.sum(dskip, 0), mask=in_v)


# launchers


def _block(V: int, elements: int, elements_of_warp: int) -> dict[str, int]:
    """Arguments of a kernel for blocks of rows of one head, one row where it alone is larger."""
    BV = power_of_2(V)
    BR = max(1, elements // BV)
    return {"V": V, "BR": BR, "BV": BV, "num_warps": min(32, BR * BV // elements_of_warp)}


def _empty_like(x: Tensor | None, h: Tensor) -> Tensor:
    """A tensor for what an op returns in place of x, empty if there is no x: an op cannot return none."""
    return h.new_empty(0) if x is None else x.new_empty(x.shape)


def _channels(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in vectors]


def _strides(*rows: Tensor | None) -> list[int]:
    return [0 if x is None else x.stride(0) for x in rows]


def _programs(warps: int, device: torch.device) -> int:
    """How many programs of some warps run at once."""
    return max(1, WARPS // warps) * max(1, processors(device))


@op("gated_head_norm")
def gated_head_norm(
    h: Tensor, o: Tensor | None, weight: Tensor, bias: Tensor | None, offset: float, eps: float,
    c: Tensor | None, skip: Tensor | None,
) -> Tensor:  # fmt: skip
    """`sigmoid(o) * (layer_norm(h) * (weight + offset) + bias)`, the norm over the last axis; without o no gate. With c
    and skip it is `silu(o) * (layer_norm(h) * (weight + offset) + bias + skip * c)`.

    Args:
        h: `[B, T, H, V]`, float16, bfloat16 or float32.
        o, c: `[B, T, H V]`, any rows whose last axis is contiguous are read where they are.
        weight, bias, skip: `[H V]`, any floating dtype.

    Returns:
        y `[B, T, H V]` in the dtype of h, computed in float32.
    """
    B, T, H, V = h.shape
    y = h.new_empty(B, T, H * V)
    hs, os, cs = (None if t is None else rows_of(t, H * V) for t in (h, o, c))
    block = _block(V, *FORWARD)
    with torch.cuda.device_of(h):
        gated_head_norm_fwd_kernel[(blocks_of(B * T, block["BR"]) * H,)](
            hs, os, *_channels(weight, bias), cs, *_channels(skip), y, B * T, *_strides(hs, os, cs), offset, eps, H,
            HAS_GATE=o is not None, HAS_BIAS=bias is not None, HAS_SKIP=c is not None, **block,
        )  # fmt: skip
    return y


@gated_head_norm.register_fake
def _(h, o, weight, bias, offset, eps, c, skip):
    B, T, H, V = h.shape
    return h.new_empty(B, T, H * V)


@op("gated_head_norm_backward")
def _gated_head_norm_backward(
    dy: Tensor, h: Tensor, o: Tensor | None, weight: Tensor, bias: Tensor | None, offset: float, eps: float,
    c: Tensor | None, skip: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of h, o, weight, bias, c and skip; an empty tensor for what there is not."""
    B, T, H, V = h.shape
    dh, do, dc = h.new_empty(h.shape), _empty_like(o, h), _empty_like(c, h)
    dys, hs, os, cs = (None if t is None else rows_of(t, H * V) for t in (dy, h, o, c))
    block = _block(V, *BACKWARD)
    P = max(1, min(blocks_of(B * T, block["BR"]), _programs(block["num_warps"], h.device) // H))
    sums = h.new_empty(3, P, H * V, dtype=torch.float32)
    with torch.cuda.device_of(h):
        gated_head_norm_bwd_kernel[(H, P)](
            dys, hs, os, *_channels(weight, bias), cs, *_channels(skip), dh, do, dc, sums, B * T,
            *_strides(dys, hs, os, cs), offset, eps, H,
            HAS_GATE=o is not None, HAS_BIAS=bias is not None, HAS_SKIP=c is not None,
            STAGES=STAGES if block["BR"] * V <= BACKWARD[0] else 1, **block,  # shared memory is small
        )  # fmt: skip
    dweight, dbias, dskip = (
        _empty_like(t, h) if t is None else total.sum(0).to(t.dtype)
        for t, total in zip((weight, bias, skip), sums, strict=True)
    )
    return dh, do, dweight, dbias, dc, dskip


@_gated_head_norm_backward.register_fake
def _(dy, h, o, weight, bias, offset, eps, c, skip):
    like = (_empty_like(t, h) if t is None else t.new_empty(t.shape) for t in (weight, bias, skip))
    dweight, dbias, dskip = like
    return h.new_empty(h.shape), _empty_like(o, h), dweight, dbias, _empty_like(c, h), dskip


def _setup_context(ctx, inputs, output):
    h, o, weight, bias, ctx.offset, ctx.eps, c, skip = inputs
    ctx.save_for_backward(h, o, weight, bias, c, skip)


def _backward(ctx, dy):
    h, o, weight, bias, c, skip = ctx.saved_tensors  # may be read only once under checkpointing
    grads = _gated_head_norm_backward(dy, h, o, weight, bias, ctx.offset, ctx.eps, c, skip)
    optional = zip((h, o, weight, bias, c, skip), grads, strict=True)
    dh, do, dweight, dbias, dc, dskip = (None if t is None else grad for t, grad in optional)
    return dh, do, dweight, dbias, None, None, dc, dskip


gated_head_norm.register_autograd(_backward, _setup_context)
