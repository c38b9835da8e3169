"""Ops: functions of tensors with gradients that compilers, exporters and modes see as one step.

PyTorch's dispatcher knows each by `torch.library`. A call through it takes some 40 microseconds of Python, and as many
for the gradients: in training as much of a processor's time as the launches of kernels. So a call that the dispatcher
would only pass on goes around it, by `torch.autograd.Function`, to the same functions.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling, is_exporting
from torch.overrides import has_torch_function


def _bits(*names: str) -> int:
    """A set of the dispatcher's keys as a number, which takes less time to compare."""
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(int.__or__, (key.raw_repr() for key in keys))


# Keys of any call, and of any dense tensor of a CPU or a GPU. Modes, tracers and transforms add others to a call; fake,
# batched, negated or distributed tensors have others.
OF_ANY_CALL = _bits("BackendSelect", "ADInplaceOrView")
OF_PLAIN_TENSORS = _bits("ADInplaceOrView", "CPU", "AutogradCPU", "AutocastCPU", "CUDA", "AutogradCUDA", "AutocastCUDA")


def is_compiling() -> bool:
    """Whether a compiler traces this, or anything is exported. PyTorch's own says yes in all threads while one of them
    compiles, and of exports it knows no more than that.

    It must not name `torch`: where a graph breaks, a compiler takes up the next functions that do, and it says yes.
    """
    return is_dynamo_compiling() or is_exporting()


class Op:
    """A function as an op, `torch.ops.modeling_xlstm.<name>`. Its arguments are positional, and none is changed."""

    def __init__(self, name: str, function: Callable[..., Any]):
        functools.update_wrapper(self, function)
        definition = torch.library.custom_op(f"modeling_xlstm::{name}", function, mutates_args=())
        self.name = name
        self.register_fake = definition.register_fake
        self._register_autograd = definition.register_autograd
        self._direct: Callable[..., Any] = function
        kinds = [parameter.annotation for parameter in inspect.signature(function).parameters.values()]
        self._floats = [i for i, kind in enumerate(kinds) if kind in (float, float | None)]

    def register_autograd(self, backward: Callable, setup_context: Callable[[Any, tuple, Any], None]) -> None:
        """`backward(ctx, *gradients)`, and what fills `ctx` from inputs and outputs, as of `torch.library`."""
        function = self._direct

        def forward(ctx, *inputs):
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        backward = differentiable_once(self.name)(backward)
        self._register_autograd(backward, setup_context=setup_context)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        named: Any = type(self.name, (torch.autograd.Function,), methods)  # as graphs and errors call it
        self._direct = named.apply

    def __call__(self, *inputs: Any) -> Any:
        if any(isinstance(inputs[i], int) for i in self._floats):
            inputs = tuple(float(x) if i in self._floats and isinstance(x, int) else x for i, x in enumerate(inputs))
        if _is_watched(inputs):
            return getattr(torch.ops.modeling_xlstm, self.name).default(*inputs)
        return self._direct(*inputs)


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Makes the decorated function an `Op`."""
    return functools.partial(Op, name)


def differentiable_once(name: str) -> Callable[[Callable[..., tuple]], Callable[..., tuple]]:
    """For `backward(ctx, *gradients)` of `name`: who differentiates what it returns is told that this is impossible.

    PyTorch's `once_differentiable` leaves the second derivative out silently if the gradients given are constants.
    """

    def decorate(backward: Callable[..., tuple]) -> Callable[..., tuple]:
        @functools.wraps(backward)
        def once(ctx, *gradients):
            if not torch.is_grad_enabled():
                return backward(ctx, *gradients)
            with torch.no_grad():
                results = backward(ctx, *gradients)
            return tuple(x if x is None else _Final.apply(x.detach().requires_grad_(), name) for x in results)

        return once

    return decorate


class _Final(torch.autograd.Function):
    """A gradient that has no gradients, which is said where they are asked for."""

    @staticmethod
    def forward(ctx, gradient, name):
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"The gradients of {ctx.name} must be the last ones: it has no second derivatives.")


def _is_watched(inputs: tuple) -> bool:
    """Whether the dispatcher would not only pass a call on."""
    if is_compiling() or has_torch_function(inputs):
        return True
    if torch._C._dispatch_tls_local_include_set().raw_repr() & ~OF_ANY_CALL:
        return True
    return any(isinstance(x, Tensor) and torch._C._dispatch_keys(x).raw_repr() & ~OF_PLAIN_TENSORS for x in inputs)
