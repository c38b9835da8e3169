"""The Triton kernels of a gated linear unit against its formula, on a GPU or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_each, assert_matches
from triton_device import DEVICE, GPU, needs_somewhere_to_run

from modeling_xlstm.glu_triton import gated_linear_unit


pytestmark = [pytest.mark.usefixtures("poisoned_memory"), needs_somewhere_to_run]

DTYPES = [torch.float32, torch.float16]
if GPU:  # the interpreter does not round to bfloat16
    DTYPES += [torch.bfloat16]
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}
SHAPES = [(1, 1, 1), (2, 3, 40), (1, 2, 1024), (5, 1, 1500)]
if GPU:
    SHAPES += [(4, 4096, 10944)]


def output_and_grad(fn, x, dy):
    x = x.detach().requires_grad_()
    y = fn(x)
    return {"y": y.detach().cpu(), "gradient of x": torch.autograd.grad(y, x, dy.to(y))[0].cpu()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_right(shape, activation, dtype):
    def formula(x):
        gate, up = x.chunk(2, -1)
        return ACTIVATIONS[activation](gate) * up

    B, T, size = shape
    x, dy = (3 * torch.randn(B, T, 2 * size)).to(dtype), torch.randn(B, T, size).to(dtype)
    actual = output_and_grad(lambda x: gated_linear_unit(x, activation), x.to(DEVICE), dy)
    assert_each(assert_matches, actual, output_and_grad(formula, x.double(), dy), output_and_grad(formula, x, dy))


def test_rows_may_lie_anywhere():
    x = torch.randn(2, 3, 100, device=DEVICE)[..., 10:30]
    assert torch.equal(gated_linear_unit(x, "silu"), gated_linear_unit(x.clone(), "silu"))


def test_large_gates_are_finite():
    most = 1e4 if GPU else 80.0  # the interpreter stops where an exponential is infinite
    x = torch.tensor([[-most, most, -50.0, 50.0, 1.0, 1.0, 1.0, 1.0]], device=DEVICE, requires_grad=True)
    for activation, fn in ACTIVATIONS.items():
        y = gated_linear_unit(x, activation)
        torch.testing.assert_close(y, fn(x[:, :4]) * x[:, 4:])
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_the_op_is_registered_right():
    x = torch.randn(2, 3, 8, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.modeling_xlstm.gated_linear_unit, (x, "silu"))
