"""Queries, keys, values and gates of the first paper's mLSTM in Triton: block-diagonal maps, as one op.

Blocks of a few channels would each be a tiny product, and tensors the size of the inputs would be put in another order
for them. Here they are multiplied together as squares of up to 64 channels, where they lie, and the gates, a product of
q, k and v in float32 as in `gates_triton`, are computed while these are at hand.

Dims: `B` batch `T` time `R` rows (tokens of all sequences) `C` channels `N` squares `W` channels of a square `G` gates
`P` programs of a square. A row of the gates' weight is [of q | of k | of v].
"""

import torch
from torch import Tensor

from .custom_op import op
from .gates_triton import exact_dot, weight_gradient
from .triton_language import blocks_of, power_of_2, processors, rows_of, tl, triton


WIDTHS = range(16, 65)  # of a square
# How work is cut, chosen on an H100: rows of a block, and warps for it.
FORWARD = {"BR": 64, "num_warps": 4}
BACKWARD = {"BR": 128, "num_warps": 8}
PROGRAMS = 4  # of a multiprocessor, in the backward pass


# helpers


@triton.jit
def _gate_weight(weight, which, channels, o_g, in_w, G, C: tl.constexpr):
    """What the gates make of q, k or v at a square's channels, `[BW, BG]`."""
    at = weight + o_g[None, :] * (3 * C) + which * C + channels[:, None]
    return tl.load(at, mask=in_w[:, None] & (o_g < G)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _square(squares, which, n, o_w, inside, N, W: tl.constexpr):
    """The map of q, k or v within a square, `[BW out, BW in]`."""
    at = squares + (which * N + n) * W * W + o_w[:, None] * W + o_w[None, :]
    return tl.load(at, mask=inside, other=0.0)


# kernels


@triton.jit(do_not_specialize=["R"])
def qkv_fwd_kernel(
    c, x, squares, gate_weight, gate_bias, q, k, v, gates, R, sc, sx, G,
    N: tl.constexpr, W: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr, BG: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """q, k, v and gates of a block of rows."""
    C: tl.constexpr = N * W
    o_r, o_w, o_g = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BW), tl.arange(0, BG)
    rows, in_r, in_w = o_r.to(tl.int64)[:, None], (o_r < R)[:, None], o_w < W
    inside, in_square = in_r & in_w[None, :], in_w[:, None] & in_w[None, :]
    total = tl.zeros([BR, BG], dtype=tl.float32)
    for n in range(N):
        channels = n * W + o_w
        at = channels[None, :]
        b_c = tl.load(c + rows * sc + at, mask=inside, other=0.0)
        b_x = tl.load(x + rows * sx + at, mask=inside, other=0.0)
        b_q = tl.dot(b_c, tl.trans(_square(squares, 0, n, o_w, in_square, N, W))).to(b_c.dtype)
        b_k = tl.dot(b_c, tl.trans(_square(squares, 1, n, o_w, in_square, N, W))).to(b_c.dtype)
        b_v = tl.dot(b_x, tl.trans(_square(squares, 2, n, o_w, in_square, N, W))).to(b_c.dtype)
        tl.store(q + rows * C + at, b_q, mask=inside)
        tl.store(k + rows * C + at, b_k, mask=inside)
        tl.store(v + rows * C + at, b_v, mask=inside)
        total += exact_dot(b_q.to(tl.float32), _gate_weight(gate_weight, 0, channels, o_g, in_w, G, C))
        total += exact_dot(b_k.to(tl.float32), _gate_weight(gate_weight, 1, channels, o_g, in_w, G, C))
        total += exact_dot(b_v.to(tl.float32), _gate_weight(gate_weight, 2, channels, o_g, in_w, G, C))
    if HAS_BIAS:
        total += tl.load(gate_bias + o_g, mask=o_g < G, other=0.0).to(tl.float32)[None, :]
    tl.store(gates + rows * G + o_g[None, :], total, mask=in_r & (o_g < G)[None, :])


@triton.jit(do_not_specialize=["R"])
def qkv_bwd_kernel(
    dq, dk, dv, dgates, c, x, squares, gate_weight, dc, dx, dsquares, R, sc, sx, sdq, sdk, sdv, G,
    N: tl.constexpr, W: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """dc and dx of every P-th block of rows of one square, and, of these for the maps, `dsquares` `[P, 3, N, W, W]`."""
    C: tl.constexpr = N * W
    dtype: tl.constexpr = dc.dtype.element_ty
    n, i_p, P = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    o_r, o_w = tl.arange(0, BR), tl.arange(0, BW)
    channels, in_w = n * W + o_w, o_w < W
    at, in_square = channels[None, :], in_w[:, None] & in_w[None, :]
    s_q = _square(squares, 0, n, o_w, in_square, N, W)
    s_k = _square(squares, 1, n, o_w, in_square, N, W)
    s_v = _square(squares, 2, n, o_w, in_square, N, W)
    ds_q, ds_k = tl.zeros([BW, BW], tl.float32), tl.zeros([BW, BW], tl.float32)
    ds_v = tl.zeros([BW, BW], tl.float32)
    for i_r in tl.range(i_p, tl.cdiv(R, BR), P):
        rows = (i_r * BR + o_r).to(tl.int64)[:, None]
        in_r = rows < R
        inside = in_r & in_w[None, :]
        b_c = tl.load(c + rows * sc + at, mask=inside, other=0.0)
        b_x = tl.load(x + rows * sx + at, mask=inside, other=0.0)
        b_dq = tl.load(dq + rows * sdq + at, mask=inside, other=0.0).to(tl.float32)
        b_dk = tl.load(dk + rows * sdk + at, mask=inside, other=0.0).to(tl.float32)
        b_dv = tl.load(dv + rows * sdv + at, mask=inside, other=0.0).to(tl.float32)
        for g in range(G):  # too few for a product of matrices
            d, w = tl.load(dgates + rows * G + g, mask=in_r, other=0.0), gate_weight + g * (3 * C) + at
            b_dq += d * tl.load(w, mask=in_w[None, :], other=0.0).to(tl.float32)
            b_dk += d * tl.load(w + C, mask=in_w[None, :], other=0.0).to(tl.float32)
            b_dv += d * tl.load(w + 2 * C, mask=in_w[None, :], other=0.0).to(tl.float32)
        b_dq, b_dk, b_dv = b_dq.to(dtype), b_dk.to(dtype), b_dv.to(dtype)
        tl.store(dc + rows * C + at, tl.dot(b_dk, s_k, tl.dot(b_dq, s_q)).to(dtype), mask=inside)
        tl.store(dx + rows * C + at, tl.dot(b_dv, s_v).to(dtype), mask=inside)
        ds_q += tl.dot(tl.trans(b_dq), b_c)
        ds_k += tl.dot(tl.trans(b_dk), b_c)
        ds_v += tl.dot(tl.trans(b_dv), b_x)
    start = dsquares + i_p * (3 * N * W * W) + n * W * W + o_w[:, None] * W + o_w[None, :]
    tl.store(start, ds_q, mask=in_square)
    tl.store(start + N * W * W, ds_k, mask=in_square)
    tl.store(start + 2 * N * W * W, ds_v, mask=in_square)


# launchers


def _sizes(squares: Tensor) -> dict[str, int]:
    _, N, W, _ = squares.shape
    return {"N": N, "W": W, "BW": max(16, power_of_2(W))}


@op("qkv_and_gates")
def qkv_and_gates(
    c: Tensor, x: Tensor, squares: Tensor, gate_weight: Tensor, gate_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v `[B, T, C]` in the dtype of c, and gates `[B, T, G]` in float32.

    Args:
        c, x: What q and k, and what v is made of `[B, T, C]`, float16 or bfloat16.
        squares: The maps of q, k and v `[3, N, W out, W in]`, of the dtype of c; W is at most 64.
        gate_weight, gate_bias: `[G, 3 C]` and `[G]`, any floating dtype but float64.
    """
    B, T, C = c.shape
    cs, xs = rows_of(c, C), rows_of(x, C)
    q, k, v = (c.new_empty(B, T, C) for _ in range(3))
    gates = c.new_empty(B, T, len(gate_weight), dtype=torch.float32)
    with torch.cuda.device_of(c):
        qkv_fwd_kernel[(blocks_of(B * T, FORWARD["BR"]),)](
            cs, xs, squares.contiguous(), gate_weight.contiguous(), gate_bias, q, k, v, gates, B * T,
            cs.stride(0), xs.stride(0), len(gate_weight), HAS_BIAS=gate_bias is not None,
            BG=max(16, power_of_2(len(gate_weight))), **_sizes(squares), **FORWARD,
        )  # fmt: skip
    return q, k, v, gates


@qkv_and_gates.register_fake
def _(c, x, squares, gate_weight, gate_bias):
    gates = c.new_empty(*c.shape[:2], len(gate_weight), dtype=torch.float32)
    return *(c.new_empty(c.shape) for _ in range(3)), gates


@op("qkv_and_gates_backward")
def _qkv_and_gates_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dgates: Tensor, c: Tensor, x: Tensor, q: Tensor, k: Tensor, v: Tensor,
    squares: Tensor, gate_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of c, x, squares and the weight of the gates."""
    B, T, C = c.shape
    _, N, W, _ = squares.shape
    dqs, dks, dvs, cs, xs = (rows_of(t, C) for t in (dq, dk, dv, c, x))
    dc, dx = c.new_empty(c.shape), c.new_empty(c.shape)
    P = max(1, min(blocks_of(B * T, BACKWARD["BR"]), PROGRAMS * max(1, processors(c.device)) // N))
    dsquares = c.new_empty(P, *squares.shape, dtype=torch.float32)
    with torch.cuda.device_of(c):
        qkv_bwd_kernel[(N, P)](
            dqs, dks, dvs, dgates.contiguous(), cs, xs, squares.contiguous(), gate_weight.contiguous(), dc, dx,
            dsquares, B * T, cs.stride(0), xs.stride(0), dqs.stride(0), dks.stride(0), dvs.stride(0), len(gate_weight),
            **_sizes(squares), **BACKWARD,
        )  # fmt: skip
    dgate_weight = torch.cat([weight_gradient(dgates, t) for t in (q, k, v)], 1)
    return dc, dx, dsquares.sum(0).to(squares.dtype), dgate_weight.to(gate_weight.dtype)


@_qkv_and_gates_backward.register_fake
def _(dq, dk, dv, dgates, c, x, q, k, v, squares, gate_weight):
    return c.new_empty(c.shape), c.new_empty(c.shape), squares.new_empty(squares.shape), torch.empty_like(gate_weight)


def _setup_context(ctx, inputs, output):
    c, x, squares, gate_weight, gate_bias = inputs
    ctx.bias_dtype = None if gate_bias is None else gate_bias.dtype
    ctx.save_for_backward(c, x, *output[:3], squares, gate_weight)


def _backward(ctx, dq, dk, dv, dgates):
    grads = _qkv_and_gates_backward(dq, dk, dv, dgates, *ctx.saved_tensors)
    return *grads, None if ctx.bias_dtype is None else dgates.flatten(0, 1).sum(0).to(ctx.bias_dtype)


qkv_and_gates.register_autograd(_backward, _setup_context)
