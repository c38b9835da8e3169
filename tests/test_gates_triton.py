"""The Triton kernel of gates against PyTorch's product in float32, on a GPU or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_each, assert_matches, least_exact
from triton_device import DEVICE, GPU, needs_somewhere_to_run

from modeling_xlstm.gates_triton import gates


pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    needs_somewhere_to_run,
]

DTYPES = [torch.float16]
if GPU:  # the interpreter does not round to bfloat16
    DTYPES += [torch.bfloat16]
# sums of fewer inputs are rounded less by PyTorch than within tensor cores
SHAPES = [(1, 9, 129, 1), (2, 30, 200, 2), (1, 33, 300, 16), (3, 7, 129, 34)]
if GPU:
    SHAPES += [(1, 2048, 4096, 16), (2, 5000, 4096, 16), (2, 20000, 352, 8)]


def output_and_grads(fn, inputs, dy):
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = fn(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y))
    return {"y": y.detach().cpu()} | {f"gradient of {n}": g.cpu() for n, g in zip(leaves, grads, strict=True)}


def formula(x, weight, bias=None):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def one_by_one(x, weight, bias=None):
    """The same, its products added one after the other: what float32 may cost."""
    if x.shape[-1] > 300:
        return formula(x, weight, bias)
    y = sum((x.float()[..., None, :] * weight.float()).unbind(-1))
    return y if bias is None else y + bias.float()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, K, G", SHAPES)
def test_values_and_gradients_are_right(B, T, K, G, dtype, weight_dtype, biased):
    x, dy = torch.randn(B, T, K).to(dtype), torch.randn(B, T, G)
    inputs = {"x": x, "weight": (torch.randn(G, K) / K**0.5).to(weight_dtype)}
    if biased:
        inputs["bias"] = torch.randn(G).to(weight_dtype)
    actual = output_and_grads(
        lambda x, weight, bias=None: gates(x, weight, bias), {n: t.to(DEVICE) for n, t in inputs.items()}, dy
    )
    oracle = output_and_grads(formula, {name: t.double() for name, t in inputs.items()}, dy)
    baselines = (output_and_grads(fn, inputs, dy) for fn in (formula, one_by_one))
    assert_each(assert_matches, actual, oracle, least_exact(oracle, *baselines))


def test_the_ops_are_registered_right():
    x = torch.randn(2, 3, 32, device=DEVICE, requires_grad=True, dtype=torch.float16)
    weight, bias = torch.randn(4, 32, device=DEVICE, requires_grad=True), torch.randn(4, device=DEVICE)
    torch.library.opcheck(torch.ops.modeling_xlstm.gates, (x, weight, bias))
    dy = torch.randn(2, 3, 4, device=DEVICE)
    torch.library.opcheck(torch.ops.modeling_xlstm.gates_backward, (dy, x.detach(), weight.detach()))
