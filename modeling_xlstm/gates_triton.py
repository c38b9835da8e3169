"""Scalar gates of rows in half precision in Triton: a narrow product in float32, as one op with its gradients.

PyTorch needs rows in float32 for that, and multiplies them without tensor cores. Here rows are read as they are, and a
weight is the sum of three numbers that tensor cores take: products are exact, and blocks of them added in float32.

Dims: `R` rows (tokens of all sequences) `K` inputs `G` gates `S` parts of the inputs.
"""

import torch
from torch import Tensor

from .triton_language import blocks_of, power_of_2, tl, triton


BLOCK = (32, 64)  # rows and inputs of a block, picked on an H100
PROGRAMS = 512  # that keep it busy


@triton.jit
def _tensor_core(x):
    """x cut to what tensor cores take of a float32: ten bits after the first."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


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
        b_w = b_w.to(tl.float32)
        high = _tensor_core(b_w)
        middle = _tensor_core(b_w - high)
        # not added to `total` by tensor cores, which do not round what they add
        part = tl.dot(b_x, b_w - high - middle, input_precision="tf32")
        part = tl.dot(b_x, middle, part, input_precision="tf32")
        total += tl.dot(b_x, high, part, input_precision="tf32")
    if HAS_BIAS and i_s == 0:
        total += tl.load(bias + o_g, mask=in_g, other=0.0).to(tl.float32)[None, :]
    tl.store(y + (i_s * R + rows) * G + o_g[None, :], total, mask=in_r & in_g[None, :])


@torch.library.custom_op("modeling_xlstm::gates", mutates_args=())
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


@gates.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, weight, ctx.bias_dtype = inputs[0], inputs[1], None if inputs[2] is None else inputs[2].dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dx = dweight = dbias = None
    rows = dy.flatten(0, -2)
    if ctx.needs_input_grad[0]:
        dx = (dy @ weight.float()).to(x.dtype)
    if ctx.needs_input_grad[1]:
        dweight = (rows.t() @ x.flatten(0, -2).float()).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        dbias = rows.sum(0).to(ctx.bias_dtype)
    return dx, dweight, dbias


gates.register_autograd(_backward, setup_context=_setup_context)
