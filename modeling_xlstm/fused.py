"""Chains of elementwise operations as one function each on a CPU: soft cap, RMS norm, and a language model's loss.

Each walks over its input a block at a time, which stays in the cache, and keeps nothing of its size that is there
anyway: logits are the largest tensors of a model. On a GPU that is done in Triton, or else by PyTorch's kernels or a
compiler, which are given the plain formula.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import HAS_TRITON, resolve
from .checks import state_dtype
from .custom_op import differentiable_once, is_compiling


if HAS_TRITON:
    from .logits_triton import cross_entropy as cross_entropy_triton
    from .logits_triton import linear_cross_entropy
    from .logits_triton import soft_cap as soft_cap_triton

# Numbers handled at once: four megabytes in float32, less than the cache.
BLOCK = 1 << 20


def _in_blocks(x: Tensor) -> bool:
    return x.device.type == "cpu" and not is_compiling()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of x `[N, width]`."""
    step = max(1, BLOCK // x.shape[-1])
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


class _SoftCap(torch.autograd.Function):
    """`cap * tanh(x / cap)` that keeps only its result."""

    @staticmethod
    def forward(x: Tensor, cap: float) -> Tensor:
        y = x.new_empty(x.shape)
        x_rows, y_rows = _rows(x), _rows(y)
        for block in _blocks(x_rows):
            torch.div(x_rows[block], cap, out=y_rows[block]).tanh_().mul_(cap)
        return y

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.cap = inputs[1]

    @staticmethod
    @differentiable_once("soft_cap")
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        dx = dy.new_empty(dy.shape)
        y, dy_rows, dx_rows = _rows(ctx.saved_tensors[0]), _rows(dy), _rows(dx)
        for block in _blocks(y):
            torch.div(y[block], ctx.cap, out=dx_rows[block]).square_().neg_().add_(1).mul_(dy_rows[block])
        return dx, None


def soft_cap(x: Tensor, cap: float | None, backend: str = "torch") -> Tensor:
    """`cap * tanh(x / cap)`, computed in float32 or better; x itself without a cap."""
    if cap is None:
        return x
    if HAS_TRITON and resolve(backend, x) == "triton":
        return soft_cap_triton(x, cap)
    dtype = state_dtype(x.dtype)
    if _in_blocks(x) and torch.is_grad_enabled() and x.requires_grad:
        return _SoftCap.apply(x.to(dtype), cap).to(x.dtype)
    return (torch.tanh(x.to(dtype) / cap) * cap).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """`x / rms(x) * weight` over the last axis, and 1 / rms(x) `[N, 1]` of every row."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y = x.new_empty(x.shape)
        x_rows, y_rows = _rows(x), _rows(y)
        scale = _rms_scale(x_rows, eps)
        for block in _blocks(x_rows):
            torch.mul(x_rows[block], scale[block], out=y_rows[block]).mul_(weight)
        return y, scale

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:2], output[1])

    @staticmethod
    @differentiable_once("rms_norm")
    def backward(ctx, dy: Tensor, _) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        dx, d_weight = x.new_empty(x.shape), torch.zeros_like(weight)
        x_rows, dy_rows, dx_rows = _rows(x), _rows(dy), _rows(dx)
        for block in _blocks(x_rows):
            x_block, dy_block, s = x_rows[block], dy_rows[block], scale[block]
            product = dy_block * x_block
            d_weight.addmv_(product.t(), s[:, 0])
            through_rms = (product @ weight)[:, None] * s**3 / -x.shape[-1]
            torch.mul(dy_block, weight, out=dx_rows[block]).mul_(s).addcmul_(x_block, through_rms)
        return dx, d_weight, None


def _rms_scale(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` over the last axis, which PyTorch has as one function only for a GPU."""
    if not _in_blocks(x) or not x.dtype == weight.dtype == state_dtype(x.dtype):
        return torch.rms_norm(x, weight.shape, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)[0]
    return (x * _rms_scale(x, eps)).mul_(weight)


class _CrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of logits `[N, V]` to labels `[N]`, and the log of each row's partition function."""

    @staticmethod
    def forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        log_z = logits.new_empty(logits.shape[0], dtype=state_dtype(logits.dtype))
        for block in _blocks(logits):
            log_z[block] = torch.logsumexp(logits[block].to(log_z.dtype), -1)
        real = labels != ignore_index
        own = logits.gather(1, labels.where(real, 0)[:, None]).squeeze(1)
        return (log_z - own).where(real, 0.0).sum(), log_z

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        logits, labels, ctx.ignore_index = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, labels, output[1])

    @staticmethod
    @differentiable_once("causal_lm_loss")
    def backward(ctx, d_loss: Tensor, _) -> tuple[Tensor, None, None]:
        logits, labels, log_z = ctx.saved_tensors
        real = labels != ctx.ignore_index
        labels, own = labels.where(real, 0)[:, None], -d_loss.expand(len(labels), 1)
        d_logits = torch.empty_like(logits)
        for block in _blocks(logits):
            d = (logits[block] - log_z[block, None]).exp_().mul_(d_loss)
            d_logits[block] = d.scatter_add_(1, labels[block], own[block])
        d_logits[~real] = 0.0  # whose logits may be anything
        return d_logits, None, None


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    cap: float | None = None,
    backend: str = "torch",
    **kwargs,
) -> Tensor:
    """Cross-entropy of next tokens, in float32 or better: what Transformers calls `ForCausalLMLoss`.

    Args:
        logits: `[B, T, vocab_size]`, any floating dtype.
        labels: Token ids `[B, T]`, shifted here by one; those that are `ignore_index` do not count.
        num_items_in_batch: What the sum is divided by, where a batch is accumulated from parts; otherwise the mean.
        shift_labels: Labels that are already shifted, in place of `labels`.
        cap: Of a soft cap that the logits are still to go through.
        backend: `"auto"` or `"triton"` for a kernel on a GPU, which keeps nothing of the size of the logits but them.

    Raises:
        TypeError, ValueError, IndexError: The labels are no integers, or (on a CPU) nothing is to be predicted, or they
            are not of the vocabulary. On a GPU, which is not waited for, the loss is NaN then, or kernels stop.
    """
    labels = _next(labels, shift_labels, vocab_size, ignore_index, logits.device)
    logits = logits.reshape(-1, vocab_size)
    if HAS_TRITON and resolve(backend, logits) == "triton":
        total, _ = cross_entropy_triton(logits, labels, cap, ignore_index)
    elif _in_blocks(logits):
        total, _ = _CrossEntropy.apply(soft_cap(logits, cap), labels, ignore_index)
    else:
        logits = soft_cap(logits, cap).to(state_dtype(logits.dtype))
        total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return _mean(total, labels, num_items_in_batch, ignore_index)


def causal_lm_loss_in_parts(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    cap: float | None = None,
    **kwargs,
) -> Tensor:
    """`causal_lm_loss` of logits `x @ weight.T`, of which only a part is in memory at a time; in Triton only.

    Args:
        x: What is projected `[B, T, D]`, float16, bfloat16 or float32.
        weight: `[vocab_size, D]`, of the dtype of x.
        Others: As in `causal_lm_loss`.
    """
    labels = _next(labels, shift_labels, vocab_size, ignore_index, x.device)
    total = linear_cross_entropy(x.reshape(-1, x.shape[-1]), weight, labels, cap, ignore_index)
    return _mean(total, labels, num_items_in_batch, ignore_index)


def _next(
    labels: Tensor, shift_labels: Tensor | None, vocab_size: int, ignore_index: int, device: torch.device
) -> Tensor:  # fmt: skip
    """What each position is to predict `[B T]`."""
    dtype = (labels if shift_labels is None else shift_labels).dtype
    if dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {dtype}.")
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    labels = shift_labels.reshape(-1).to(device)
    _check_labels(labels, vocab_size, ignore_index)
    return labels


def _mean(total: Tensor, labels: Tensor, count: Tensor | int | None, ignore_index: int) -> Tensor:
    if isinstance(count, Tensor):
        count = count.to(total.device)
    count = (labels != ignore_index).sum() if count is None else count
    if total.device.type == "cpu" and not is_compiling() and count == 0:  # a GPU is not waited for
        raise ValueError(f"labels must hold a token to predict, got only {ignore_index} behind the first position.")
    return total / count


def _check_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    if labels.device.type != "cpu" or is_compiling():
        return
    wrong = labels[((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)]
    if len(wrong):
        raise IndexError(
            f"labels must be from 0 to {vocab_size - 1}, or {ignore_index} for none, got {wrong[0].item()}."
        )
