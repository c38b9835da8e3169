"""Linear layers through oneDNN: the same function as `nn.Linear`, whatever is done with the module."""

import copy

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_matches
from torch import nn
from torch.nn.utils import parametrize

from modeling_xlstm.backends import HAS_ONEDNN_LINEAR
from modeling_xlstm.linear import linear


def reference(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight, layer.bias)


def test_this_machine_has_what_the_other_tests_are_about():
    assert HAS_ONEDNN_LINEAR


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(17,), (1, 17), (3, 5, 17), (0, 17)], ids=str)
def test_outputs_and_gradients_are_those_of_a_linear_layer(shape, bias):
    layer = nn.Linear(17, 23, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    inputs = [x, *layer.parameters()]
    dy = torch.randn(*shape[:-1], 23)

    def results(y: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]

    doubled = [t.detach().double().requires_grad_() for t in inputs]
    oracle = results(F.linear(*doubled), doubled)
    baseline = results(reference(layer, x), inputs)
    with torch.no_grad():
        assert torch.equal(linear(layer, x), linear(layer, x.clone().requires_grad_()).detach())
    for actual, exact, base in zip(results(linear(layer, x), inputs), oracle, baseline, strict=True):
        if actual.numel() > 50:
            assert_matches(actual, exact, base)
        else:
            torch.testing.assert_close(actual, base)


@pytest.mark.parametrize("layout", ["strided", "expanded", "transposed"])
def test_inputs_need_not_be_contiguous(layout):
    layer = nn.Linear(17, 23)
    x = {
        "strided": torch.randn(4, 10, 17)[:, ::2],
        "expanded": torch.randn(1, 1, 17).expand(4, 5, 17),
        "transposed": torch.randn(5, 17, 4).permute(2, 0, 1),
    }[layout]
    torch.testing.assert_close(linear(layer, x), reference(layer, x))


def test_other_dtypes_and_autocast_go_the_usual_way():
    layer = nn.Linear(17, 23)
    for dtype in (torch.bfloat16, torch.float64):
        other = copy.deepcopy(layer).to(dtype)
        x = torch.randn(5, 17, dtype=dtype)
        assert torch.equal(linear(other, x), reference(other, x))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(layer, torch.randn(5, 17)).dtype == torch.bfloat16


def test_only_what_needs_a_gradient_gets_one():
    layer = nn.Linear(17, 23)
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 17, requires_grad=True)
    linear(layer, x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, 17))
    torch.testing.assert_close(layer.bias.grad, torch.full((23,), 5.0))


WRAPPINGS = {
    "a forward hook": lambda layer: layer.register_forward_hook(lambda module, inputs, y: y + 1),
    "a hook before": lambda layer: layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
    "a backward hook": lambda layer: layer.register_full_backward_hook(lambda module, dx, dy: (dx[0] + 1,)),
    "another forward": lambda layer: setattr(layer, "forward", lambda x: x[..., :1].expand(*x.shape[:-1], 23)),
    "a parametrisation": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_what_was_put_around_a_layer_is_called(wrap):
    layer, x = nn.Linear(17, 23), torch.randn(5, 17, requires_grad=True)
    wrap(layer)
    results = [(y, torch.autograd.grad(y.sum(), x)[0]) for y in (linear(layer, x), layer(x))]
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_hooks_on_all_modules_and_compiled_layers_are_called():
    layer, x, calls = nn.Linear(17, 23), torch.randn(5, 17), []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append("hook"))
    linear(layer, x)
    handle.remove()
    layer._compiled_call_impl = lambda x: calls.append("compiled")  # what layer.compile() sets
    linear(layer, x)
    assert calls == ["hook", "compiled"]


def test_the_output_may_be_changed_in_place():
    layer, x = nn.Linear(17, 23), torch.randn(2, 5, 17, requires_grad=True)
    y = linear(layer, x)
    y[:, 0] = 0
    y *= 2
    (dx,) = torch.autograd.grad(y.sum(), x)
    expected = 2 * layer.weight.sum(0).expand(2, 5, 17).index_fill(1, torch.tensor([0]), 0.0)
    torch.testing.assert_close(dx, expected)


def test_replicas_of_a_layer_compute_with_their_own_weights():
    layer, x = nn.Linear(17, 23), torch.randn(5, 17)
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = torch.zeros(23, 17), None
    assert not linear(replica, x).any()


def test_one_graph_with_torch_compile():
    layer = nn.Linear(17, 23)
    x = torch.randn(5, 17)
    compiled = torch.compile(lambda x: linear(layer, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), linear(layer, x))


def test_a_bias_alone_gets_its_gradient():
    layer = nn.Linear(17, 23)
    layer.weight.requires_grad_(False)
    linear(layer, torch.randn(5, 17)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((23,), 5.0))


def test_a_wrong_width_is_named_by_its_shapes():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(nn.Linear(17, 23), torch.randn(5, 16))
