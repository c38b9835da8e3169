"""Ops are called directly where nobody watches, and through PyTorch's dispatcher where somebody does."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM, mlstm_torch, slstm_torch
from modeling_xlstm.custom_op import op


calls: list[str] = []


@op("scaled_for_tests")
def scaled(x: Tensor, factor: float) -> Tensor:
    """A product that tells when it is computed."""
    calls.append("forward")
    return x * factor


@scaled.register_fake
def _(x, factor):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    ctx.factor = inputs[1]


def _backward(ctx, dy):
    calls.append("backward")
    return dy * ctx.factor, None


scaled.register_autograd(_backward, _setup_context)
REGISTERED = torch.ops.modeling_xlstm.scaled_for_tests.default


class Watch(TorchDispatchMode):
    """Which ops were called."""

    def __init__(self):
        super().__init__()
        self.ops: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


class Marked(Tensor):
    """A tensor of a class of its own."""


def mlstm() -> tuple:
    x = [torch.randn(2, 9, 2, 4, requires_grad=True) for _ in range(3)]
    x += [torch.randn(2, 9, 2, requires_grad=True) for _ in range(2)]
    x += [torch.randn(2, 2, *sizes, requires_grad=True) for sizes in ((4, 4), (4,), ())]
    return (*x, None, "exp", 4, 1e-6)


def slstm() -> tuple:
    x = [torch.randn(2, 9, 2, 4, 4, requires_grad=True), torch.randn(2, 4, 4, 4, requires_grad=True)]
    x += [torch.randn(2, 2, 4).exp().requires_grad_() for _ in range(4)]
    return (*x, torch.rand(2, 9) > 0.3, None, True)


def values_and_grads(function, inputs: tuple) -> list[Tensor]:
    outputs = [y for y in function(*inputs) if y.requires_grad]
    torch.manual_seed(1)
    real = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, real, [torch.randn_like(y) for y in outputs])]


@pytest.mark.parametrize(("inputs", "kept"), [(mlstm, mlstm_torch.mlstm_chunkwise), (slstm, slstm_torch.slstm_scan)])
def test_both_ways_have_the_same_bits(inputs, kept):
    torch.manual_seed(0)
    inputs = inputs()
    registered = getattr(torch.ops.modeling_xlstm, kept.__name__)
    expected, actual = values_and_grads(registered, inputs), values_and_grads(kept, inputs)
    assert len(expected) > 8
    assert all(map(torch.equal, expected, actual))


def test_a_call_that_nobody_watches_goes_around_the_dispatcher(monkeypatch):
    """With and without gradients, and whatever of its inputs needs them."""

    def unused(*inputs):
        raise AssertionError("The dispatcher was asked.")

    monkeypatch.setattr(scaled, "_registered", unused)
    for x in (torch.ones(3), torch.ones(3, requires_grad=True), torch.nn.Parameter(torch.ones(3))):
        assert torch.equal(scaled(x, 2.0), torch.full((3,), 2.0))
        with torch.no_grad():
            assert not scaled(x, 2.0).requires_grad
    with torch.inference_mode():
        scaled(x, 2.0)


def test_a_mode_sees_both_passes_of_a_model_as_ops():
    torch.manual_seed(0)
    model = XLSTMForCausalLM(XLSTMConfig(hidden_size=32, num_hidden_layers=2, num_heads=2, vocab_size=16))
    ids = torch.randint(16, (1, 8))
    with Watch() as watch:
        model(ids, labels=ids).loss.backward()
    ops = torch.ops.modeling_xlstm
    assert watch.ops.count(ops.mlstm_chunkwise.default) == 2
    assert watch.ops.count(ops.mlstm_chunkwise_backward.default) == 2


def test_selective_checkpointing_may_keep_what_an_op_gave():
    keep = partial(create_selective_checkpoint_contexts, [REGISTERED])

    def double(x):
        return scaled(x.sin(), 2.0).cos()

    x = torch.randn(5, requires_grad=True)
    for contexts, expected in ((None, 2), (keep, 1)):
        calls.clear()
        options = {} if contexts is None else {"context_fn": contexts}
        checkpoint(double, x, use_reentrant=False, **options).sum().backward()
        assert calls.count("forward") == expected
        assert calls.count("backward") == 1


def test_what_is_no_plain_tensor_goes_through_the_dispatcher(monkeypatch):
    asked = []
    monkeypatch.setattr(scaled, "_registered", lambda *inputs: asked.append(inputs) or REGISTERED(*inputs))
    assert scaled(torch.ones(3, device="meta"), 2.0).is_meta
    scaled(torch.ones(3).as_subclass(Marked), 2.0)
    assert len(asked) == 2


def test_a_compiler_sees_one_op():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(4)
    y = torch.compile(lambda x: scaled(x, 3.0) + 1, backend=backend, fullgraph=True)(x)
    assert torch.equal(y, x * 3 + 1)
    (graph,) = graphs
    assert REGISTERED in [node.target for node in graph.graph.nodes]


def test_what_has_no_formula_is_refused():
    """Second derivatives, and tangents of forward mode: neither is left out silently."""
    x = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad(scaled(x, 2.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        scaled(forward_ad.make_dual(torch.ones(3), torch.ones(3)), 2.0)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: scaled(x, 2.0).sum())(torch.ones(3))
