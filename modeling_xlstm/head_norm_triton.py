"""What follows the cell of an mLSTM in Triton: LayerNorm of each head and a sigmoid gate, as one op with its gradients.

Both directions are bound by memory, so each is one kernel that reads and writes every tensor once, computes in float32
and rounds once. The backward pass recomputes mean and deviation of a row: it holds the row anyway, so that keeping them
would only add eight bytes a row to what is written and read. It has a fixed number of programs, each with its own sums
for the gradients of weight and bias: always added in the same order, without atomics.

Dims: `B` batch `T` time `H` heads `V` value head dim `R` rows (tokens of all sequences) `P` programs of a head
`BR` rows of a block `BV` V, rounded up to a power of two.
"""

import torch
from torch import Tensor

from .triton_language import blocks_of, power_of_2, processors, tl, triton


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


# kernels


@triton.jit(do_not_specialize=["R"])
def gated_head_norm_fwd_kernel(
    h, o, weight, bias, y, R, sh, so, offset, eps, H,
    V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
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
    if HAS_GATE:
        out *= _sigmoid(gate)
    tl.store(y + rows[:, None] * (H * V) + channels[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
def gated_head_norm_bwd_kernel(
    dy, h, o, weight, bias, dh, do, sums, R, sdy, sh, so, offset, eps, H,
    V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dh and do of every P-th block of rows of one head, and `sums` `[2, P, H V]` of these for weight and bias."""
    i_h, i_p, P = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    o_r, o_v = tl.arange(0, BR).to(tl.int64), tl.arange(0, BV)
    channels = i_h * V + o_v
    in_v = o_v < V
    w, b = _affine(weight, bias, channels, in_v, offset, HAS_BIAS)
    # of blocks, and over rows only in the end: no exchange between threads within the loop
    dw, db = tl.zeros([BR, BV], tl.float32), tl.zeros([BR, BV], tl.float32)
    for i_r in tl.range(i_p, tl.cdiv(R, BR), P, num_stages=STAGES):
        rows = i_r * BR + o_r
        in_rows = rows < R
        inside = in_rows[:, None] & in_v[None, :]
        d = tl.load(dy + rows[:, None] * sdy + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(h + rows[:, None] * sh + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            gate = tl.load(o + rows[:, None] * so + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        out = rows[:, None] * (H * V) + channels[None, :]
        x, rstd = _standardise(x, in_rows, inside, eps, V)
        if HAS_GATE:
            s = _sigmoid(gate)
            dgate = d * (x * w + b) * s * (1 - s)
            tl.store(do + out, dgate.to(do.dtype.element_ty), mask=inside)
            d *= s
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


# launchers


def _rows(x: Tensor, width: int) -> Tensor:
    """`[B, T, ...]` as `[R, width]` with the last axis contiguous: a view where there is one."""
    x = x.reshape(-1, width)
    return x if x.stride(-1) == 1 else x.contiguous()


def _block(V: int, elements: int, elements_of_warp: int) -> dict[str, int]:
    """Arguments of a kernel for blocks of rows of one head, one row where it alone is larger."""
    BV = power_of_2(V)
    BR = max(1, elements // BV)
    return {"V": V, "BR": BR, "BV": BV, "num_warps": min(32, BR * BV // elements_of_warp)}


def _empty_like(x: Tensor | None, h: Tensor) -> Tensor:
    """A tensor for what an op returns in place of x, empty if there is no x: an op cannot return none."""
    return h.new_empty(0) if x is None else x.new_empty(x.shape)


def _programs(warps: int, device: torch.device) -> int:
    """How many programs of some warps run at once."""
    return max(1, WARPS // warps) * max(1, processors(device))


@torch.library.custom_op("modeling_xlstm::gated_head_norm", mutates_args=())
def gated_head_norm(
    h: Tensor, o: Tensor | None, weight: Tensor, bias: Tensor | None, offset: float, eps: float
) -> Tensor:  # fmt: skip
    """`sigmoid(o) * (layer_norm(h) * (weight + offset) + bias)`, the norm over the last axis; without o no gate.

    Args:
        h: `[B, T, H, V]`, float16, bfloat16 or float32.
        o: `[B, T, H V]`, any rows whose last axis is contiguous are read where they are.
        weight, bias: `[H V]`, any floating dtype.

    Returns:
        y `[B, T, H V]` in the dtype of h, computed in float32.
    """
    B, T, H, V = h.shape
    y = h.new_empty(B, T, H * V)
    hs, os = _rows(h, H * V), None if o is None else _rows(o, H * V)
    block = _block(V, *FORWARD)
    with torch.cuda.device_of(h):
        gated_head_norm_fwd_kernel[(blocks_of(B * T, block["BR"]) * H,)](
            hs, os, weight.contiguous(), None if bias is None else bias.contiguous(), y, B * T,
            hs.stride(0), 0 if os is None else os.stride(0), offset, eps, H,
            HAS_GATE=o is not None, HAS_BIAS=bias is not None, **block,
        )  # fmt: skip
    return y


@gated_head_norm.register_fake
def _(h, o, weight, bias, offset, eps):
    B, T, H, V = h.shape
    return h.new_empty(B, T, H * V)


@torch.library.custom_op("modeling_xlstm::gated_head_norm_backward", mutates_args=())
def _gated_head_norm_backward(
    dy: Tensor, h: Tensor, o: Tensor | None, weight: Tensor, bias: Tensor | None, offset: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, o, weight and bias; an empty tensor for what there is not."""
    B, T, H, V = h.shape
    dh, do = h.new_empty(h.shape), _empty_like(o, h)
    dys, hs, os = _rows(dy, H * V), _rows(h, H * V), None if o is None else _rows(o, H * V)
    block = _block(V, *BACKWARD)
    P = max(1, min(blocks_of(B * T, block["BR"]), _programs(block["num_warps"], h.device) // H))
    sums = h.new_empty(1 if bias is None else 2, P, H * V, dtype=torch.float32)
    with torch.cuda.device_of(h):
        gated_head_norm_bwd_kernel[(H, P)](
            dys, hs, os, weight.contiguous(), None if bias is None else bias.contiguous(), dh, do, sums, B * T,
            dys.stride(0), hs.stride(0), 0 if os is None else os.stride(0), offset, eps, H,
            HAS_GATE=o is not None, HAS_BIAS=bias is not None,
            STAGES=STAGES if block["BR"] * V <= BACKWARD[0] else 1, **block,  # shared memory is small
        )  # fmt: skip
    dweight = sums[0].sum(0).to(weight.dtype)
    return dh, do, dweight, _empty_like(bias, h) if bias is None else sums[1].sum(0).to(bias.dtype)


@_gated_head_norm_backward.register_fake
def _(dy, h, o, weight, bias, offset, eps):
    return h.new_empty(h.shape), _empty_like(o, h), weight.new_empty(weight.shape), _empty_like(bias, h)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.offset, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    h, o, weight, bias = ctx.saved_tensors  # may be read only once under checkpointing
    dh, do, dweight, dbias = _gated_head_norm_backward(dy, h, o, weight, bias, ctx.offset, ctx.eps)
    return dh, None if o is None else do, dweight, None if bias is None else dbias, None, None


gated_head_norm.register_autograd(_backward, setup_context=_setup_context)
