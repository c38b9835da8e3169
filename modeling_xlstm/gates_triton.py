"""Scalar gates of rows in half precision in Triton: a narrow product in float32, as one op with its gradients.

PyTorch needs rows in float32 for that, and multiplies them without tensor cores. Here rows are read as they are, and a
weight is the sum of three numbers that tensor cores take: products are exact, and blocks of them added in float32.

Dims: `R` rows (tokens of all sequences) `K` inputs `G` gates `S` parts of the inputs.
"""

import torch
from torch import Tensor

from .custom_op import op
from .triton_language import blocks_of, power_of_2, rows_of, tl, triton


BLOCK = (32, 64)  # rows and inputs of a block, picked on an H100
INPUT_BLOCK, GRADIENT_BLOCK = (16, 256), (64, 64)  # of the gradients of inputs and weight
PROGRAMS = 512  # that keep it busy


@triton.jit
def _tensor_core(x):
    """x cut to what tensor cores take of a float32: ten bits after the first."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def exact_dot(x, weight):
    """`x @ weight` of float32, x from half precision: as exact as a sum in float32 if few are added."""
    high = _tensor_core(weight)
    middle = _tensor_core(weight - high)
    part = tl.dot(x, weight - high - middle, input_precision="tf32")
    part = tl.dot(x, middle, part, input_precision="tf32")
    return tl.dot(x, high, part, input_precision="tf32")


@triton.jit(do_not_specialize=["R"])
def gates_kernel(
    x, weight, bias, y, R,
    K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What every S-th block of inputs adds to the gates of a block of rows."""
    i_s, o_r, o_g, o_k = tl.program_id(1), tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BG), tl.arange(0, BK)
    rows, in_r, in_g = o_r.to(tl.int64)[:, None], (o_r < R)[:, None], o_g < G
    total = tl.zeros([BR, BG], dtype=tl.float32)
    for k in tl.range(i_s * BK, K, S * BK, num_stages=STAGES):
        in_k = k + o_k < K
        b_x = tl.load(x + rows * K + k + o_k[None, :], mask=in_r & in_k[None, :], other=0.0).to(tl.float32)
        b_w = tl.load(weight + o_g[None, :] * K + k + o_k[:, None], mask=in_g[None, :] & in_k[:, None], other=0.0)
        # not added to `total` by tensor cores, which do not round what they add
        total += exact_dot(b_x, b_w.to(tl.float32))
    if HAS_BIAS and i_s == 0:
        total += tl.load(bias + o_g, mask=in_g, other=0.0).to(tl.float32)[None, :]
    tl.store(y + (i_s * R + rows) * G + o_g[None, :], total, mask=in_r & in_g[None, :])


@triton.jit(do_not_specialize=["R"])
def gates_input_bwd_kernel(
    dy, weight, dx, R, G, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of inputs of a block of rows: of so few gates that it is no product of matrices."""
    rows = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)[None, :]
    in_r, in_k = rows < R, o_k < K
    total = tl.zeros([BR, BK], dtype=tl.float32)
    for g in range(G):
        b_dy = tl.load(dy + rows * G + g, mask=in_r, other=0.0)
        total += b_dy * tl.load(weight + g * K + o_k, mask=in_k, other=0.0).to(tl.float32)
    tl.store(dx + rows * K + o_k, total.to(dx.dtype.element_ty), mask=in_r & in_k)


@triton.jit(do_not_specialize=["R"])
def gates_weight_bwd_kernel(
    dy, x, dweight, R, sx,
    K: tl.constexpr, G: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What every P-th block of rows adds to the gradient of the weight at a block of inputs, `dweight` `[P, G, K]`."""
    i_p, P = tl.program_id(1), tl.num_programs(1)
    o_k, o_r, o_g = tl.program_id(0) * BK + tl.arange(0, BK), tl.arange(0, BR), tl.arange(0, BG)
    in_k, in_g = o_k < K, o_g < G
    total = tl.zeros([BK, BG], dtype=tl.float32)
    for i_r in tl.range(i_p, tl.cdiv(R, BR), P):
        rows = (i_r * BR + o_r).to(tl.int64)[:, None]
        b_x = tl.load(x + rows * sx + o_k[None, :], mask=(rows < R) & in_k[None, :], other=0.0).to(tl.float32)
        b_dy = tl.load(dy + rows * G + o_g[None, :], mask=(rows < R) & in_g[None, :], other=0.0)
        total += exact_dot(tl.trans(b_x), b_dy)
    tl.store(dweight + (i_p * G + o_g[None, :]) * K + o_k[:, None], total, mask=in_k[:, None] & in_g[None, :])


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """`dy.T @ x` `[G, K]` of all rows, in float32: dy `[..., G]` in float32, x `[..., K]` in half precision."""
    G, K = dy.shape[-1], x.shape[-1]
    (BR, BK), rows = GRADIENT_BLOCK, rows_of(x, K)
    P = max(1, min(blocks_of(len(rows), BR), PROGRAMS // blocks_of(K, BK)))
    dweight = x.new_empty(P, G, K, dtype=torch.float32)
    with torch.cuda.device_of(x):
        gates_weight_bwd_kernel[(blocks_of(K, BK), P)](
            dy.contiguous(), rows, dweight, len(rows), rows.stride(0),
            K=K, G=G, BR=BR, BG=max(16, power_of_2(G)), BK=BK, num_warps=4,
        )  # fmt: skip
    return dweight.sum(0)


@op("gates")
def gates(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` `[..., G]`, in float32.

    Args:
        x: `[..., K]`, float16 or bfloat16.
        weight, bias: `[G, K]` and `[G]`, any floating dtype but float64.
    """
    x, weight = x.contiguous(), weight.contiguous()
    (G, K), (BR, BK) = weight.shape, BLOCK
    R = x.numel() // K
    # powers of two, so that few programs are compiled
    S = min(16, power_of_2(blocks_of(K, BK)), max(1, PROGRAMS // power_of_2(blocks_of(R, BR))))
    y = x.new_empty(S, *x.shape[:-1], G, dtype=torch.float32)
    with torch.cuda.device_of(x):
        gates_kernel[(blocks_of(R, BR), S)](
            x, weight, bias, y, R, K=K, G=G, S=S, BR=BR, BG=max(16, power_of_2(G)), BK=BK, HAS_BIAS=bias is not None,
            STAGES=3, num_warps=2,
        )  # fmt: skip
    return y.sum(0) if S > 1 else y[0]


@op("gates_backward")
def _gates_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and weight, and that of a bias in float32."""
    dy, weight = dy.contiguous(), weight.contiguous()
    (G, K), (BR, BK) = weight.shape, INPUT_BLOCK
    dx, R = x.new_empty(x.shape), dy.numel() // G
    with torch.cuda.device_of(x):
        gates_input_bwd_kernel[(blocks_of(R, BR), blocks_of(K, BK))](
            dy, weight, dx, R, G, K=K, BR=BR, BK=BK, num_warps=4,
        )  # fmt: skip
    return dx, weight_gradient(dy, x).to(weight.dtype), dy.view(R, G).sum(0)


@_gates_backward.register_fake
def _(dy, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dy.new_empty(dy.shape[-1])


@gates.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, weight, ctx.bias_dtype = inputs[0], inputs[1], None if inputs[2] is None else inputs[2].dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = _gates_backward(dy, x, weight)
    return dx, dweight, None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)


gates.register_autograd(_backward, _setup_context)
