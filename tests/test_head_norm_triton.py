"""The Triton kernels of norm and gate against the plain formula, on a GPU or in Triton's interpreter."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_each, assert_matches
from triton_device import DEVICE, GPU, compilations, needs_somewhere_to_run

from modeling_xlstm.head_norm_triton import gated_head_norm


pytestmark = [pytest.mark.usefixtures("poisoned_memory"), needs_somewhere_to_run]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMS = {
    "xLSTM-7B": {"names": ("h", "o", "weight"), "offset": 0.0},
    "with a bias": {"names": ("h", "o", "weight", "bias"), "offset": 0.0},
    "offset": {"names": ("h", "o", "weight"), "offset": 1.0},
    "without a gate": {"names": ("h", "weight", "bias"), "offset": 0.0},
    "only a norm": {"names": ("h", "weight"), "offset": 1.0},
    "first paper": {"names": ("h", "o", "weight", "c", "skip"), "offset": 1.0},
    "first paper with a bias": {"names": ("h", "o", "weight", "bias", "c", "skip"), "offset": 0.0},
}


def drawn(B, T, H, V, dtype=torch.float32, weight_dtype=None, names=("h", "o", "weight", "bias")):
    """Inputs and the gradient of the output, on a CPU."""
    shapes = {"h": (B, T, H, V), **dict.fromkeys(("o", "c", "dy"), (B, T, H * V))}
    channels = dict.fromkeys(("weight", "bias", "skip"), (H * V,))
    x = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    x |= {name: torch.randn(shape).to(weight_dtype or dtype) for name, shape in channels.items()}
    x["h"] = 2 * x["h"] + 1
    return {name: x[name] for name in (*names, "dy")}


def kernels(h, weight, o=None, bias=None, c=None, skip=None, offset=0.0, eps=1e-6):
    """The op on the device, for inputs and results on the CPU."""
    h, o, weight, bias, c, skip = (None if x is None else x.to(DEVICE) for x in (h, o, weight, bias, c, skip))
    return gated_head_norm(h, o, weight, bias, offset, eps, c, skip).cpu()


def plain(h, weight, o=None, bias=None, c=None, skip=None, offset=0.0, eps=1e-6):
    y = F.layer_norm(h, h.shape[-1:], eps=eps).flatten(-2) * (weight + offset)
    y = y if bias is None else y + bias
    if c is not None:
        return ((y + skip * c) * F.silu(o)).to(h.dtype)
    return (y if o is None else torch.sigmoid(o) * y).to(h.dtype)


def output_and_grads(op, x, **options):
    leaves = {name: t.detach().requires_grad_() for name, t in x.items() if name != "dy"}
    y = op(**leaves, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), x["dy"])
    return {"y": y.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}


def assert_correct(x, **options):
    oracle = {name: t.double() for name, t in x.items()}
    results = [output_and_grads(op, t, **options) for op, t in ((kernels, x), (plain, oracle), (plain, x))]
    assert_each(assert_matches, *results)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [24, 17, 64, *([512] if GPU else [])])
def test_any_form_and_head_size_is_right(V, dtype, form):
    assert_correct(drawn(2, 9, 3, V, dtype, names=FORMS[form]["names"]), offset=FORMS[form]["offset"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B, T, H, V", [(1, 1, 1, 300), (3, 1, 2, 24), (2, 5, 1, 2500), (1, 3, 600 if GPU else 20, 5), (1, 67, 5, 128)]
)
def test_any_shape_is_right(B, T, H, V, dtype):
    assert_correct(drawn(B, T, H, V, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [24, 88] if GPU else [24])
def test_programs_that_walk_over_many_rows_are_right(V, dtype):
    assert_correct(drawn(2, 12000 if GPU else 250, 2, V, dtype))


def test_heads_of_one_channel_have_nothing_but_a_bias():
    x = drawn(2, 5, 3, 1)
    results = output_and_grads(kernels, x)
    # the division by the deviation, the root of eps, magnifies rounding a thousand times
    torch.testing.assert_close(results["gradient of h"], torch.zeros(2, 5, 3, 1), atol=1e-4, rtol=0.0)
    assert torch.equal(results["gradient of weight"], torch.zeros(3))
    torch.testing.assert_close(results["y"], torch.sigmoid(x["o"]) * x["bias"])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_weights_may_have_another_dtype(dtype):
    assert_correct(drawn(2, 9, 3, 24, dtype, weight_dtype=torch.float32))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # by the interpreter
def test_gates_that_are_shut_or_open_are_right():
    x = drawn(2, 9, 3, 24)
    x["o"] = torch.where(x["o"] > 0, 200.0, -200.0)
    results = output_and_grads(kernels, x)
    norm = kernels(x["h"], x["weight"], bias=x["bias"])
    assert torch.equal(results["y"], torch.where(x["o"] > 0, norm, 0.0))
    assert torch.equal(results["gradient of o"], torch.zeros_like(x["o"]))


def test_rows_beyond_the_end_do_not_divide_by_an_eps_of_zero():
    assert_correct(drawn(1, 5, 2, 24), eps=0.0)


@pytest.mark.parametrize("V", [24, 17])
def test_slices_of_fused_projections_are_as_good_as_copies(V):
    B, T, H = 2, 9, 3
    x = drawn(B, T, H, V, names=("h", "o", "weight", "c", "skip"))
    expected = output_and_grads(kernels, x)
    widths = {"h": 2, "o": 3, "dy": 4, "c": 2}
    views = {name: torch.full((B, T, n * H * V), torch.nan)[..., H * V : 2 * H * V] for name, n in widths.items()}
    views["h"] = views["h"].unflatten(-1, (H, V))
    for name, view in views.items():
        view.copy_(x[name])
    results = output_and_grads(kernels, x | views)
    assert all(torch.equal(results[name], t) for name, t in expected.items())


def test_axes_in_any_order_are_as_good_as_copies():
    x = drawn(2, 9, 3, 24)
    expected = output_and_grads(kernels, x)
    reverse = {name: tuple(reversed(range(t.dim()))) for name, t in x.items()}
    results = output_and_grads(
        kernels, {n: t.permute(reverse[n]).contiguous().permute(reverse[n]) for n, t in x.items()}
    )
    assert all(torch.equal(results[name], t) for name, t in expected.items())
    ones = x | {"dy": torch.ones(1, 1, 1).expand_as(x["dy"])}
    results, expected = (output_and_grads(kernels, t) for t in (ones, ones | {"dy": ones["dy"].contiguous()}))
    assert all(torch.equal(results[name], t) for name, t in expected.items())


def test_two_runs_are_bit_equal():
    x = drawn(2, 12000 if GPU else 250, 2, 24, DTYPES[-1])
    first, second = (output_and_grads(kernels, x) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_unneeded_gradients_are_left_out():
    x = drawn(2, 9, 3, 24)
    o = x["o"].clone().requires_grad_()
    y = kernels(x["h"], x["weight"], o, x["bias"])
    (grad,) = torch.autograd.grad(y, o, x["dy"])
    assert torch.equal(grad, output_and_grads(kernels, x)["gradient of o"])
    with torch.no_grad():
        assert not kernels(x["h"], x["weight"], o, x["bias"]).requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_the_op_keeps_the_promises_of_a_custom_op(form):
    x = {name: t.to(DEVICE).requires_grad_() for name, t in drawn(2, 5, 3, 8, names=FORMS[form]["names"]).items()}
    inputs = [x.get(name) for name in ("h", "o", "weight", "bias")]
    skipped, numbers = [x.get(name) for name in ("c", "skip")], (FORMS[form]["offset"], 1e-6)
    torch.library.opcheck(torch.ops.modeling_xlstm.gated_head_norm, (*inputs, *numbers, *skipped))
    *detached, c, skip = (None if t is None else t.detach() for t in (x["dy"], *inputs, *skipped))
    torch.library.opcheck(torch.ops.modeling_xlstm.gated_head_norm_backward, (*detached, *numbers, c, skip))


@pytest.mark.parametrize("form", FORMS)
def test_it_is_one_op_to_a_compiler(form):
    x = drawn(2, 9, 3, 24, names=FORMS[form]["names"])
    op = partial(kernels, offset=FORMS[form]["offset"])
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    results, expected = (output_and_grads(run, x) for run in (compiled, op))
    assert all(torch.equal(results[name], t) for name, t in expected.items())


@pytest.mark.skipif(not GPU, reason="counts what is compiled for a GPU")
def test_nothing_is_compiled_again_for_another_batch_or_length():
    from modeling_xlstm import head_norm_triton

    def run(B, T):
        output_and_grads(kernels, drawn(B, T, 2, 40, torch.bfloat16))
        return compilations(head_norm_triton)

    compiled = run(1, 1)
    assert compiled > 0
    assert [run(B, T) for B, T in ((2, 17), (3, 256), (16, 16), (5, 513))] == [compiled] * 4


@pytest.mark.skipif(not GPU, reason="needs fifteen gigabytes")
def test_addresses_beyond_32_bits_are_right():
    B, T, H, V = 1, 2**20 + 3, 4, 520
    assert B * T * H * V > 2**31
    h = torch.randn(B, T, H, V, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.ones(H * V, device=DEVICE)
    y = gated_head_norm(h, None, weight, None, 0.0, 1e-6, None, None)
    (dh,) = torch.autograd.grad(y, h, y.detach())
    tail = h.detach()[:, -5:].requires_grad_()
    expected = gated_head_norm(tail, None, weight, None, 0.0, 1e-6, None, None)
    (expected_dh,) = torch.autograd.grad(expected, tail, expected.detach())
    assert torch.equal(y[:, -5:], expected) and torch.equal(dh[:, -5:], expected_dh)
