"""Linear layers at the speed of the CPU: in float32, PyTorch multiplies with MKL where oneDNN can be faster.

Parameters are the same and results equal up to rounding. How much faster is printed by `python -m benchmarks.cpu`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from .backends import HAS_ONEDNN_LINEAR


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
    @once_differentiable
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


def _is_plain(module: nn.Module, x: Tensor) -> bool:
    """Whether `module(x)` is no more than the product that oneDNN makes: not quantised, adapted, hooked or compiled."""
    return (
        HAS_ONEDNN_LINEAR
        and type(module) is nn.Linear
        and x.device.type == "cpu"
        and x.dtype == module.weight.dtype == torch.float32
        and type(module.weight) is nn.Parameter
        and x.shape[-1] == module.in_features
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks or _has_any_global_hook())
        and module._compiled_call_impl is None
        and "forward" not in module.__dict__  # replaced, as by what moves weights between devices
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # the compiler makes its own choice
    )


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, in oneDNN where that is an ordinary linear layer of a plain float32 tensor on a CPU."""
    if not _is_plain(module, x):
        return module(x)
    inputs: tuple[Any, ...] = (x.reshape(-1, x.shape[-1]), module.weight, module.bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y = _OneDNNLinear.apply(*inputs)
    else:
        y = _multiply(*inputs)
    return y.view(*x.shape[:-1], module.out_features)
