"""What follows the projection to logits, in Triton: the soft cap, and the cross-entropy of capped logits.

Each is an op with its gradients. Logits are the largest tensor of a training step: a forward pass reads them once, and
the loss keeps two numbers a row; a backward pass reads them once, as the projection left them, and writes their
gradient. All compute in float32 and round once. `linear_cross_entropy` has the projection too, and never more than a
part of the logits in memory.

Dims: `N` rows (tokens of all sequences) `D` inputs of the projection `V` vocabulary `BV` words of a block.
"""

import torch
from torch import Tensor

from .custom_op import op
from .triton_language import blocks_of, power_of_2, tl, triton


BLOCK = 4096  # words of a row at once
PART = 1 << 27  # logits that are in memory at once


# helpers


@triton.jit
def _tanh(x):
    """tanh and its derivative, of float32 to a few units in the last place; tanh of small x by a polynomial."""
    shrunk = tl.exp(-2 * tl.abs(x))
    large = tl.div_rn(1 - shrunk, 1 + shrunk)
    slope = tl.div_rn(4 * shrunk, (1 + shrunk) * (1 + shrunk))
    z = x * x
    p = -0.00661022783111
    p = p * z + 0.0213093886644
    p = p * z - 0.0539094288275
    p = p * z + 0.13333113729
    p = p * z - 0.33333332008
    return tl.where(tl.abs(x) < 0.55, x + x * z * p, tl.where(x < 0, -large, large)), slope


@triton.jit
def _zero_or_nan(label, V):
    """NaN for a label that is no word."""
    return tl.where((label >= 0) & (label < V), 0.0, float("nan"))


@triton.jit
def _cap(x, cap):
    """`cap * tanh(x / cap)` and its derivative."""
    t, slope = _tanh(tl.div_rn(x, cap))
    return cap * t, slope


# kernels


@triton.jit
def soft_cap_fwd_kernel(x, y, size, cap, BLOCK: tl.constexpr):
    """y of a block."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + o, mask=o < size, other=0.0).to(tl.float32)
    b_y, _ = _cap(b_x, cap)
    tl.store(y + o, b_y.to(y.dtype.element_ty), mask=o < size)


@triton.jit
def soft_cap_bwd_kernel(dy, x, dx, size, cap, BLOCK: tl.constexpr):
    """dx of a block."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, slope = _cap(tl.load(x + o, mask=o < size, other=0.0).to(tl.float32), cap)
    d = tl.load(dy + o, mask=o < size, other=0.0).to(tl.float32) * slope
    tl.store(dx + o, d.to(dx.dtype.element_ty), mask=o < size)


@triton.jit
def cross_entropy_fwd_kernel(
    x, labels, loss, stats, N, V, ignore_index, cap, CAPPED: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The loss of a row; its largest logit, and the sum of its exponentials over that of the largest. A row that is
    ignored is not read."""
    i_n = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + i_n)
    most, total, own = -float("inf"), 0.0, _zero_or_nan(label, V)
    if label != ignore_index:
        for start in range(0, V, BV):
            o = start + tl.arange(0, BV)
            b_x = tl.load(x + i_n * V + o, mask=o < V, other=0.0).to(tl.float32)
            if CAPPED:
                b_x, _ = _cap(b_x, cap)
            b_x = tl.where(o < V, b_x, -float("inf"))
            own += tl.sum(tl.where(o == label, b_x, 0.0), 0)
            before, most = most, tl.maximum(most, tl.max(b_x, 0))
            total = total * tl.exp(before - most) + tl.sum(tl.exp(b_x - most), 0)
        tl.store(stats + i_n, most)
        tl.store(stats + N + i_n, total)
        tl.store(loss + i_n, most - own + tl.log(total))
    else:
        tl.store(stats + i_n, 0.0)
        tl.store(stats + N + i_n, 1.0)
        tl.store(loss + i_n, 0.0)


@triton.jit
def cross_entropy_bwd_kernel(
    x, labels, stats, d_loss, dx, N, V, ignore_index, cap, CAPPED: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of a row of logits."""
    i_n, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV + tl.arange(0, BV)
    label, d, valid = tl.load(labels + i_n), tl.zeros([BV], dtype=tl.float32), o < V
    if label != ignore_index:
        y, slope = tl.load(x + i_n * V + o, mask=valid, other=0.0).to(tl.float32), 1.0
        if CAPPED:
            y, slope = _cap(y, cap)
        share = tl.exp(y - tl.load(stats + i_n)) / tl.load(stats + N + i_n)
        d = (share - tl.where(o == label, 1.0, 0.0)) * slope * tl.load(d_loss) + _zero_or_nan(label, V)
    tl.store(dx + i_n * V + o, d.to(dx.dtype.element_ty), mask=valid)


# launchers


@op("soft_cap")
def soft_cap(x: Tensor, cap: float) -> Tensor:
    """`cap * tanh(x / cap)` of any shape, float16, bfloat16 or float32."""
    x = x.contiguous()
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        soft_cap_fwd_kernel[(blocks_of(x.numel(), BLOCK),)](x, y, x.numel(), cap, BLOCK=BLOCK, num_warps=8)
    return y


@soft_cap.register_fake
def _(x, cap):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@op("soft_cap_backward")
def _soft_cap_backward(dy: Tensor, x: Tensor, cap: float) -> Tensor:
    """The gradient of x."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    with torch.cuda.device_of(x):
        soft_cap_bwd_kernel[(blocks_of(x.numel(), BLOCK),)](dy, x, dx, x.numel(), cap, BLOCK=BLOCK, num_warps=8)
    return dx


@_soft_cap_backward.register_fake
def _(dy, x, cap):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_soft_cap(ctx, inputs, output):
    x, ctx.cap = inputs
    ctx.save_for_backward(x)


def _backward_soft_cap(ctx, dy):
    return _soft_cap_backward(dy, *ctx.saved_tensors, ctx.cap), None


soft_cap.register_autograd(_backward_soft_cap, _setup_soft_cap)


def _options(V: int, cap: float | None) -> dict:
    # no fused multiply-adds: both passes must round a capped logit alike
    return {"CAPPED": cap is not None, "BV": min(BLOCK, power_of_2(V)), "num_warps": 8, "enable_fp_fusion": False}


@op("cross_entropy")
def cross_entropy(x: Tensor, labels: Tensor, cap: float | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of `soft_cap(x, cap)` to the labels, and what the backward pass needs `[2, N]`.

    Args:
        x: Logits `[N, V]`, float16, bfloat16 or float32.
        labels: `[N]` int64; `ignore_index` for rows that do not count, which may hold anything. Loss and gradients of
            any other that is not from 0 to V - 1 are NaN.
    """
    x, labels = x.contiguous(), labels.contiguous()
    N, V = x.shape
    loss, stats = x.new_empty(N, dtype=torch.float32), x.new_empty(2, N, dtype=torch.float32)
    with torch.cuda.device_of(x):
        cross_entropy_fwd_kernel[(N,)](x, labels, loss, stats, N, V, ignore_index, cap or 0.0, **_options(V, cap))
    return loss.sum(), stats


@cross_entropy.register_fake
def _(x, labels, cap, ignore_index):
    return x.new_empty((), dtype=torch.float32), x.new_empty(2, x.shape[0], dtype=torch.float32)


@op("cross_entropy_backward")
def _cross_entropy_backward(
    d_loss: Tensor, x: Tensor, labels: Tensor, stats: Tensor, cap: float | None, ignore_index: int
) -> Tensor:
    """The gradient of x."""
    x, labels = x.contiguous(), labels.contiguous()
    (N, V), dx, options = x.shape, torch.empty_like(x), _options(x.shape[1], cap)
    with torch.cuda.device_of(x):
        cross_entropy_bwd_kernel[(N, blocks_of(V, options["BV"]))](
            x, labels, stats, d_loss, dx, N, V, ignore_index, cap or 0.0, **options
        )
    return dx


@_cross_entropy_backward.register_fake
def _(d_loss, x, labels, stats, cap, ignore_index):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    x, labels, ctx.cap, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, labels, output[1])


def _backward(ctx, d_loss, _):
    x, labels, stats = ctx.saved_tensors
    return _cross_entropy_backward(d_loss, x, labels, stats, ctx.cap, ctx.ignore_index), None, None, None


cross_entropy.register_autograd(_backward, _setup_context)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds `a @ b` to a float32 tensor, in float32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@op("linear_cross_entropy")
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, cap: float | None, ignore_index: int, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients in float32 where they are needed: the logits are there only now."""
    x, labels = x.contiguous(), labels.contiguous()
    (N, D), V = x.shape, weight.shape[0]
    loss = x.new_zeros((), dtype=torch.float32)
    dx = x.new_zeros(N if needs_dx else 0, D, dtype=torch.float32)
    dweight = torch.zeros(V if needs_dweight else 0, D, dtype=torch.float32, device=x.device)
    one, rows = torch.ones_like(loss), max(1, PART // V)
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        logits = x[part] @ weight.t()
        added, stats = cross_entropy(logits, labels[part], cap, ignore_index)
        loss += added
        if needs_dx or needs_dweight:
            d = _cross_entropy_backward(one, logits, labels[part], stats, cap, ignore_index)
            if needs_dx:
                _add_product(dx[part], d, weight)
            if needs_dweight:
                _add_product(dweight, d.t(), x[part])
    return loss, dx, dweight


@_linear_cross_entropy.register_fake
def _(x, weight, labels, cap, ignore_index, needs_dx, needs_dweight):
    (N, D), V = x.shape, weight.shape[0]
    sizes = (), (N if needs_dx else 0, D), (V if needs_dweight else 0, D)
    return tuple(x.new_empty(size, dtype=torch.float32) for size in sizes)


def _setup_linear(ctx, inputs, output):
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward_linear(ctx, d_loss, *_):
    dx, dweight = (
        (d_loss * gradient).to(dtype) if needed else None
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
    )
    return dx, dweight, None, None, None, None, None


_linear_cross_entropy.register_autograd(_backward_linear, _setup_linear)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, cap: float | None = None, ignore_index: int = -100
) -> Tensor:
    """Sum of the cross-entropies of `soft_cap(x @ weight.T, cap)` to the labels, with the gradients computed at once.

    Args:
        x: `[N, D]`, float16, bfloat16 or float32.
        weight: `[V, D]`, of the dtype of x. Parts of its gradient are added in float32.
        labels: As in `cross_entropy`.
    """
    grad = torch.is_grad_enabled()
    needs = grad and x.requires_grad, grad and weight.requires_grad
    return _linear_cross_entropy(x, weight, labels, cap, ignore_index, *needs)[0]
