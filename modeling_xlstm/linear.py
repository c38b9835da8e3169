"""Linear layers at the speed of the machine, where PyTorch's own are not.

In float32 on a CPU, PyTorch multiplies with MKL where oneDNN can be faster, and in bfloat16 `generate` packs weights
first; few rows in half precision on a GPU are multiplied in Triton. Parameters are the same, results up to rounding.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _has_any_global_hook

from .backends import HAS_ONEDNN_LINEAR, HAS_TRITON, INTERPRETED, needs_triton, resolve
from .checks import autocasts
from .custom_op import differentiable_once, is_compiling
from .fused import soft_cap
from .linear_packed import PACKED


if HAS_TRITON:
    from .glu_triton import gated_linear_unit
    from .linear_triton import ROWS, multiply

SHARED = "shared_forward"  # what a module computes instead where processes share it: not for others to see or change
SMALL = 1 << 19  # numbers of a matrix that MKL has multiplied with one row before oneDNN has begun
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"silu": F.silu, "gelu": F.gelu}


class _OneDNNLinear(torch.autograd.Function):
    """`x @ weight.T + bias` of x `[N, inputs]` with both products of x and weight in oneDNN; MKL is as fast for that of
    the weight."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @differentiable_once("linear")
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _multiply(dy.contiguous(), weight.t(), None)
        if ctx.needs_input_grad[1]:
            dweight = dy.t() @ x
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def is_hooked(module: Any) -> bool:
    """Whether others want to see or change what a module is given or returns, or have replaced what it computes.

    Transformers leaves hooks behind once hidden states were asked for, which do nothing unless they are.
    """
    own = module.__dict__
    if own.get("forward") is not own.get(SHARED):  # as by what moves weights between devices
        return True
    if not (module._forward_pre_hooks or module._forward_hooks):
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


def is_alone(module: Any, kind: Any = nn.Linear) -> bool:
    """Whether a module is only a linear layer of a kind: not quantised, adapted, hooked, compiled or shared."""
    return is_itself(module, kind) and type(module.weight) is nn.Parameter


def is_itself(module: Any, kind: Any) -> bool:
    """Whether a module is of a kind, not hooked, and not compiled; processes may share it."""
    return (
        type(module) is kind
        and not is_hooked(module)
        and not (module._backward_hooks or module._backward_pre_hooks or _has_any_global_hook())
        and module._compiled_call_impl is None
    )


def own_part(weight: Tensor | None) -> Tensor | None:
    """What this process has of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def is_plain(module: Any, x: Tensor) -> bool:
    """Whether `module(x)` is only a product of one dtype, of a module that is alone."""
    return (
        is_alone(module)
        and x.dtype == module.weight.dtype
        and x.device == module.weight.device
        and not autocasts(x.device)
        and not is_compiling()  # the compiler makes its own choice
    )


def is_for_triton(module: Any, x: Tensor, backend: str) -> bool:
    """Whether a product of rows like those of x, of any width, may be made by Triton: few, no bias, for inference."""
    return (
        are_rows_for_triton(x)  # first, as on a CPU there is time for nothing else
        and is_plain(module, x)
        and module.bias is None
        and is_weight_for_triton(module.weight, x)
        and resolve(backend, x) == "triton"
        and x.numel() <= ROWS * x.shape[-1]  # last, as a program for any number of rows must not depend on it
    )


def are_rows_for_triton(x: Tensor) -> bool:
    """What `is_for_triton` asks of x, but for their number."""
    half = HAS_TRITON and (x.is_cuda or INTERPRETED) and x.dtype in (torch.float16, torch.bfloat16)
    return half and not torch.is_grad_enabled()


def is_weight_for_triton(weight: Tensor, x: Tensor) -> bool:
    """What it asks of a weight: that it is alike, and its rows start where the copy engine can start."""
    return weight.dtype == x.dtype and weight.device == x.device and weight.shape[1] % 8 == 0 and weight.is_contiguous()


def linear(
    module: Any, x: Tensor, *, activation: str = "", cap: float | None = None, backend: str = "auto"
) -> Tensor:  # fmt: skip
    """`soft_cap(module(x), cap)`, x `[..., inputs]`; `backend` is that of few rows for inference, and of activations.

    With an activation, `"silu"` or `"gelu"`, the module gives rows [gate | up], and `activation(gate) * up` is capped.
    """
    fits = x.shape[-1] == module.in_features
    if fits and is_for_triton(module, x, backend):
        y = multiply(x.reshape(-1, x.shape[-1]), module.weight, activation=activation, cap=cap)
        return y.view(*x.shape[:-1], y.shape[-1])
    if fits and is_for_onednn(module, x):
        y = _onednn_product(module, x, module.weight)
    elif fits and (weight := packed_weight(module, x)) is not None:
        y = _onednn_product(module, x, weight)
    else:
        y = module(x)
    return soft_cap(glu(y, activation, backend) if activation else y, cap, backend)


def is_for_onednn(module: Any, x: Tensor) -> bool:
    """Whether a product is faster with oneDNN: in float32 on a CPU, unless of one row with a small matrix."""
    return (
        x.dtype == torch.float32
        and HAS_ONEDNN_LINEAR
        and x.device.type == "cpu"
        and is_plain(module, x)
        and (x.numel() > module.in_features or module.weight.numel() >= SMALL)
    )


def packed_weight(module: Any, x: Tensor) -> Tensor | None:
    """The weight of `module` as oneDNN wants it, in a `generate` that packs weights, if it has by now."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or is_compiling():
        return None
    packed = PACKED.get()
    if packed is None or torch.is_grad_enabled() or not is_plain(module, x):
        return None
    return packed(module.weight)


def _onednn_product(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    inputs: tuple[Any, ...] = (x.reshape(-1, x.shape[-1]), weight, module.bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y = _OneDNNLinear.apply(*inputs)
    else:
        y = _multiply(*inputs)
    return y.view(*x.shape[:-1], module.out_features)


def glu(x: Tensor, activation: str, backend: str) -> Tensor:
    """`activation(gate) * up` of x `[..., 2 outputs]`, rows [gate | up]."""
    if needs_triton(backend, x):
        return gated_linear_unit(x, activation)
    gate, up = x.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up
