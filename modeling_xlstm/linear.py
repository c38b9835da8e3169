"""Linear layers at the speed of the CPU: in float32, PyTorch multiplies with MKL where oneDNN can be faster.

Parameters are the same and results equal up to rounding. How much faster is printed by `python -m benchmarks.cpu`.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .backends import HAS_ONEDNN_LINEAR


class _OneDNNLinear(torch.autograd.Function):
    """`x @ weight.T + bias` with both products of x and weight in oneDNN; MKL is as fast for that of the weight."""

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
        dy = dy.contiguous()
        rows = dy.view(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            dx = _multiply(dy, weight.t(), None)
        if ctx.needs_input_grad[1]:
            dweight = rows.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dx, dweight, dbias


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    plain = (
        x.device.type == "cpu"
        and x.dtype == module.weight.dtype == torch.float32
        and x.shape[-1] == module.in_features
        and type(module.weight) is nn.Parameter
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # the compiler makes its own choice
    )
    if not plain:
        return nn.Linear.forward(module, x)
    inputs = (x, module.weight, module.bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _OneDNNLinear.apply(*inputs)
    return _multiply(*inputs)


def use_onednn(module: nn.Linear) -> nn.Linear:
    """Sends plain float32 tensors on a CPU through oneDNN. The class stays: quantisers replace only `nn.Linear`."""
    if HAS_ONEDNN_LINEAR:
        module.forward = partial(_forward, module)  # type: ignore[method-assign]
    return module
