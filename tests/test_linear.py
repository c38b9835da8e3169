"""Linear layers through oneDNN: the same function as `nn.Linear`, whatever is done with the module."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_matches
from torch import nn

from modeling_xlstm.backends import HAS_ONEDNN_LINEAR
from modeling_xlstm.linear import use_onednn


def reference(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight, layer.bias)


def test_this_machine_has_what_the_other_tests_are_about():
    assert HAS_ONEDNN_LINEAR


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(17,), (1, 17), (3, 5, 17), (0, 17)], ids=str)
def test_outputs_and_gradients_are_those_of_a_linear_layer(shape, bias):
    layer = use_onednn(nn.Linear(17, 23, bias=bias))
    x = torch.randn(shape, requires_grad=True)
    inputs = [x, *layer.parameters()]
    dy = torch.randn(*shape[:-1], 23)

    def results(y: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]

    doubled = [t.detach().double().requires_grad_() for t in inputs]
    oracle = results(F.linear(*doubled), doubled)
    baseline = results(reference(layer, x), inputs)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.clone().requires_grad_()).detach())
    for actual, exact, base in zip(results(layer(x), inputs), oracle, baseline, strict=True):
        if actual.numel() > 50:
            assert_matches(actual, exact, base)
        else:
            torch.testing.assert_close(actual, base)


@pytest.mark.parametrize("layout", ["strided", "expanded", "transposed"])
def test_inputs_need_not_be_contiguous(layout):
    layer = use_onednn(nn.Linear(17, 23))
    x = {
        "strided": torch.randn(4, 10, 17)[:, ::2],
        "expanded": torch.randn(1, 1, 17).expand(4, 5, 17),
        "transposed": torch.randn(5, 17, 4).permute(2, 0, 1),
    }[layout]
    torch.testing.assert_close(layer(x), reference(layer, x))


def test_other_dtypes_and_autocast_go_the_usual_way():
    layer = use_onednn(nn.Linear(17, 23))
    for dtype in (torch.bfloat16, torch.float64):
        other = copy.deepcopy(layer).to(dtype)
        x = torch.randn(5, 17, dtype=dtype)
        assert torch.equal(other(x), reference(other, x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 17)).dtype == torch.bfloat16


def test_only_what_needs_a_gradient_gets_one():
    layer = use_onednn(nn.Linear(17, 23))
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 17, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, 17))
    torch.testing.assert_close(layer.bias.grad, torch.full((23,), 5.0))


def test_copies_and_pickles_compute_with_their_own_weights():
    layer = use_onednn(nn.Linear(17, 23))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert type(other) is nn.Linear
        nn.init.zeros_(other.weight)
        assert torch.equal(other(torch.randn(5, 17)), other.bias.expand(5, 23))
    assert layer.weight.any()


def test_one_graph_with_torch_compile():
    layer = use_onednn(nn.Linear(17, 23))
    x = torch.randn(5, 17)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_a_bias_alone_gets_its_gradient():
    layer = use_onednn(nn.Linear(17, 23))
    layer.weight.requires_grad_(False)
    layer(torch.randn(5, 17)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((23,), 5.0))


def test_functional_gradients_work():
    layer = use_onednn(nn.Linear(17, 23))
    x = torch.randn(5, 17)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, x).square().sum()

    expected = torch.func.grad(lambda p: F.linear(x, p["weight"], p["bias"]).square().sum())(parameters)
    torch.testing.assert_close(torch.func.grad(loss)(parameters), expected)


def test_a_wrong_width_is_named_by_its_shapes():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        use_onednn(nn.Linear(17, 23))(torch.randn(5, 16))
