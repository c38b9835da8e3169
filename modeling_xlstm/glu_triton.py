"""A gated linear unit in Triton: `activation(gate) * up` as one op with its gradients.

Both directions are bound by memory, so each is one kernel that reads and writes every tensor once, computes in float32
and rounds once. Nothing but the input is kept for the backward pass.

Dims: `R` rows (tokens of all sequences) `F` outputs `BF` outputs of a block.
"""

import torch
from torch import Tensor

from .custom_op import op
from .triton_language import blocks_of, tl, triton


BLOCK = 1024  # sixteen bytes of each row for each thread, picked on an H100


# helpers


@triton.jit
def _load(rows, i_r, o, valid, F):
    """Gate and up of a block, of rows [gate | up]."""
    start = rows + i_r * 2 * F + o
    gate, up = tl.load(start, mask=valid, other=0.0), tl.load(start + F, mask=valid, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


# kernels


@triton.jit
def glu_fwd_kernel(x, y, F, ACTIVATION: tl.constexpr, BF: tl.constexpr):
    """y of a block of a row."""
    i_r, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BF + tl.arange(0, BF)
    valid = o < F
    gate, up = _load(x, i_r, o, valid, F)
    activated, _ = _activate(gate, ACTIVATION)
    tl.store(y + i_r * F + o, (activated * up).to(y.dtype.element_ty), mask=valid)


@triton.jit
def glu_bwd_kernel(dy, x, dx, F, ACTIVATION: tl.constexpr, BF: tl.constexpr):
    """dx of a block of a row."""
    i_r, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BF + tl.arange(0, BF)
    valid = o < F
    gate, up = _load(x, i_r, o, valid, F)
    d = tl.load(dy + i_r * F + o, mask=valid, other=0.0).to(tl.float32)
    activated, slope = _activate(gate, ACTIVATION)
    start = dx + i_r * 2 * F + o
    tl.store(start, (d * up * slope).to(dx.dtype.element_ty), mask=valid)
    tl.store(start + F, (d * activated).to(dx.dtype.element_ty), mask=valid)


# launchers


@op("gated_linear_unit")
def gated_linear_unit(x: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up` `[..., F]` in the dtype of x.

    Args:
        x: Rows [gate | up] `[..., 2 F]`, float16, bfloat16 or float32.
        activation: `"silu"` or `"gelu"` (of erf).
    """
    x = x.contiguous()
    F = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], F)
    with torch.cuda.device_of(x):
        glu_fwd_kernel[(y.numel() // F, blocks_of(F, BLOCK))](x, y, F, ACTIVATION=activation, BF=BLOCK, num_warps=4)
    return y


@gated_linear_unit.register_fake
def _(x, activation):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@op("gated_linear_unit_backward")
def _gated_linear_unit_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of x."""
    dy, x = dy.contiguous(), x.contiguous()
    F, dx = dy.shape[-1], torch.empty_like(x)
    with torch.cuda.device_of(x):
        glu_bwd_kernel[(dy.numel() // F, blocks_of(F, BLOCK))](
            dy, x, dx, F, ACTIVATION=activation, BF=BLOCK, num_warps=4,
        )  # fmt: skip
    return dx


@_gated_linear_unit_backward.register_fake
def _(dy, x, activation):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    x, ctx.activation = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy):
    return _gated_linear_unit_backward(dy, *ctx.saved_tensors, ctx.activation), None


gated_linear_unit.register_autograd(_backward, _setup_context)
