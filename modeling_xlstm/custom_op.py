"""Ops: functions of tensors with gradients that compilers, exporters and modes see as one step.

PyTorch's dispatcher knows each by `torch.library`. A call through it takes some 40 microseconds of Python, and as many
for the gradients: in training as much of a processor's time as the launches of kernels. So a call on plain tensors
that nobody watches goes around it, by `torch.autograd.Function`, to the same functions.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


PLAIN = (Tensor, torch.nn.Parameter)


class Op:
    """The function as an op `torch.ops.modeling_xlstm.<name>`; all arguments are positional, and none is changed."""

    def __init__(self, name: str, function: Callable[..., Any]):
        functools.update_wrapper(self, function)
        definition = torch.library.custom_op(f"modeling_xlstm::{name}", function, mutates_args=())
        self._registered = getattr(torch.ops.modeling_xlstm, name).default
        self._direct: Callable[..., Any] = function
        self.register_fake = definition.register_fake
        self._register_autograd = definition.register_autograd

    def register_autograd(self, differentiate: Callable, setup_context: Callable[[Any, tuple, Any], None]) -> None:
        """`differentiate(ctx, *gradients)`, and what fills `ctx` from inputs and outputs, as of `torch.library`."""
        self._register_autograd(differentiate, setup_context=setup_context)
        function = self._direct

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                output = function(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            @once_differentiable
            def backward(ctx, *gradients):
                return differentiate(ctx, *gradients)

        self._direct = Direct.apply

    def __call__(self, *inputs: Any) -> Any:
        return self._registered(*inputs) if _is_watched(inputs) else self._direct(*inputs)


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Makes the decorated function an `Op`."""
    return functools.partial(Op, name)


def _is_watched(inputs: tuple) -> bool:
    """Whether a call must go through the dispatcher: traced, within a mode or transform, or not of plain tensors."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return True
    return any(isinstance(x, Tensor) and (type(x) not in PLAIN or x.is_meta) for x in inputs)
