"""Ops are called directly where nobody watches, and through PyTorch's dispatcher where somebody does."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM, fused, mlstm_torch, slstm_torch
from modeling_xlstm.backends import HAS_ONEDNN_LINEAR
from modeling_xlstm.custom_op import op
from modeling_xlstm.linear import linear


needs_onednn = pytest.mark.skipif(not HAS_ONEDNN_LINEAR, reason="needs oneDNN's linear layer")
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
OPS = torch.ops.modeling_xlstm


@op("with_backward_for_tests")
def with_backward(x: Tensor, factor: float) -> Tensor:
    """`scaled`, whose backward pass is an op too."""
    return x * factor


with_backward.register_fake(lambda x, factor: x.new_empty(x.shape))
with_backward.register_autograd(lambda ctx, dy: (scaled(dy, ctx.factor), None), _setup_context)


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


CELLS = pytest.mark.parametrize(
    ("inputs", "function"), [(mlstm, mlstm_torch.mlstm_chunkwise), (slstm, slstm_torch.slstm_scan)]
)


@CELLS
def test_both_ways_have_the_same_bits(inputs, function):
    torch.manual_seed(0)
    inputs = inputs()
    registered = getattr(OPS, function.__name__)
    expected, actual = values_and_grads(registered, inputs), values_and_grads(function, inputs)
    assert len(expected) > 8
    assert all(map(torch.equal, expected, actual))


@pytest.fixture
def asked(monkeypatch):
    """What goes through the dispatcher: names of ops, of both passes."""
    names: list[str] = []

    class Namespace:
        def __getattr__(self, name):
            names.append(name)
            return getattr(OPS, name)

    monkeypatch.setattr(torch.ops, "modeling_xlstm", Namespace())
    return names


@CELLS
def test_calls_and_their_gradients_go_around_the_dispatcher_where_nobody_watches(inputs, function, asked):
    inputs = inputs()
    values_and_grads(function, inputs)
    with torch.no_grad():
        function(*inputs)
    with torch.inference_mode():
        function(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))
    assert asked == []


def test_a_mode_sees_both_passes_of_a_model_as_ops():
    torch.manual_seed(0)
    model = XLSTMForCausalLM(XLSTMConfig(hidden_size=32, num_hidden_layers=2, num_heads=2, vocab_size=16))
    ids = torch.randint(16, (1, 8))
    with Watch() as watch:
        model(ids, labels=ids).loss.backward()
    assert watch.ops.count(OPS.mlstm_chunkwise.default) == 2
    assert watch.ops.count(OPS.mlstm_chunkwise_backward.default) == 2


def test_selective_checkpointing_may_keep_what_an_op_gave():
    keep = partial(create_selective_checkpoint_contexts, [OPS.scaled_for_tests.default])

    def double(x):
        return scaled(x.sin(), 2.0).cos()

    x = torch.randn(5, requires_grad=True)
    for contexts, expected in ((None, 2), (keep, 1)):
        calls.clear()
        options = {} if contexts is None else {"context_fn": contexts}
        checkpoint(double, x, use_reentrant=False, **options).sum().backward()
        assert calls.count("forward") == expected
        assert calls.count("backward") == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda x: scaled(x.to("meta"), 2.0),
        lambda x: scaled(x.as_subclass(Marked), 2.0),
        lambda x: scaled(torch._neg_view(x), 2.0),
        lambda x: torch.func.vmap(lambda x: scaled(x, 2.0))(x),
        lambda x: torch.jit.trace(lambda x: scaled(x, 2.0), x),
        lambda x: make_fx(lambda x: scaled(x, 2.0), pre_dispatch=True)(x),
    ],
    ids=["meta", "subclass", "negated", "vmap", "trace", "make_fx"],
)
def test_what_the_dispatcher_has_more_to_do_with_goes_through_it(call, asked):
    result = call(torch.ones(2, 3))
    assert asked
    if isinstance(result, torch.fx.GraphModule):
        assert OPS.scaled_for_tests.default in [node.target for node in result.graph.nodes]
    elif isinstance(result, torch.jit.ScriptFunction):
        assert "modeling_xlstm::scaled_for_tests" in str(result.graph)
    elif not result.is_meta:
        assert torch.equal(result.abs(), torch.full((2, 3), 2.0))


def test_a_mode_for_functions_sees_the_call(asked):
    with torch.device("cpu"):
        scaled(torch.ones(3), 2.0)
    assert set(asked) == {"scaled_for_tests"}


def test_gradients_of_many_rows_at_once():
    """Which PyTorch computes on batched tensors."""
    x = torch.randn(4, requires_grad=True)
    (actual,) = torch.autograd.grad(scaled(x, 3.0), x, torch.eye(4), is_grads_batched=True)
    assert torch.equal(actual, 3 * torch.eye(4))


@pytest.mark.parametrize("how", [None, "mode"])
def test_a_number_may_be_an_integer(how):
    """As the dispatcher takes it; kernels are compiled for floats."""
    kinds = []

    def look(x: Tensor, factor: float, other: float | None, count: int) -> Tensor:
        kinds.append((type(factor), type(other), type(count)))
        return x * factor

    name = f"look_{how}_for_tests"
    with Watch() if how else nullcontext():
        op(name)(look)(torch.ones(1), 2, None, 3)
        op(name)(look)(torch.ones(1), 2, 4, 3)
    assert kinds == [(float, type(None), int), (float, float, int)]


def test_the_first_of_two_definitions_goes_on():
    """As where the code of a checkpoint on the Hub is loaded beside the package."""

    def double(x: Tensor) -> Tensor:
        return x * 2

    first, second = (op("double_for_tests")(double) for _ in range(2))
    for function in (first, second, first):
        with Watch() as watch:
            assert torch.equal(function(torch.ones(2)), torch.full((2,), 2.0))
        assert OPS.double_for_tests.default in watch.ops


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
def test_a_compiler_sees_one_op_in_each_pass():
    backend = AotEagerAndRecordGraphs()
    x = torch.randn(4, requires_grad=True)
    compiled = torch.compile(lambda x: with_backward(x, 3.0) + 1, backend=backend, fullgraph=True)
    y = compiled(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x * 3 + 1) and torch.equal(grad, torch.full((4,), 3.0))
    passes = zip((backend.fw_graphs, backend.bw_graphs), ("with_backward_for_tests", "scaled_for_tests"), strict=True)
    for (graph,), name in passes:
        assert getattr(OPS, name).default in [node.target for node in graph.graph.nodes]


@pytest.mark.parametrize("watched", [False, True])
def test_second_derivatives_are_refused(watched):
    """Whatever the first ones depend on, and never left out silently."""
    x = torch.ones(3, requires_grad=True)
    for loss in (Tensor.sum, lambda y: y.square().sum()):
        with Watch() if watched else nullcontext():
            y = scaled(x, 2.0)
        (grad,) = torch.autograd.grad(loss(y), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="The gradients of scaled_for_tests must be the last ones"):
            grad.sum().backward()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("soft_cap", lambda x: fused.soft_cap(x, 5.0)),
        ("rms_norm", lambda x: fused.rms_norm(x, torch.ones(8), 1e-6)),
        pytest.param("linear", lambda x: linear(torch.nn.Linear(8, 4), x), marks=needs_onednn),
        ("causal_lm_loss", lambda x: fused.causal_lm_loss(x[None], torch.arange(2)[None], 8)),
    ],
)
def test_so_are_those_of_functions_on_a_cpu(name, function):
    x = torch.randn(2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"The gradients of {name} must be the last ones"):
        grad.square().sum().backward()


def test_other_kinds_of_derivatives_are_refused():
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        scaled(forward_ad.make_dual(torch.ones(3), torch.ones(3)), 2.0)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: scaled(x, 2.0).sum())(torch.ones(3))


def test_graphs_and_errors_tell_the_name_of_an_op():
    y = scaled(torch.ones(3, requires_grad=True), 2.0)
    assert y.grad_fn.name() == "scaled_for_testsBackward"
