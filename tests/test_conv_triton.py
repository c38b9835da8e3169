"""The Triton kernels of the causal convolution against the plain formula, on a GPU or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_each, assert_matches
from triton_device import DEVICE, GPU, compilations, needs_somewhere_to_run

from modeling_xlstm import conv_triton
from modeling_xlstm.conv_triton import causal_conv


pytestmark = [pytest.mark.usefixtures("poisoned_memory"), needs_somewhere_to_run]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("x", "weight", "bias")


@pytest.fixture
def few_programs(monkeypatch):
    """So few that each has several tiles, without a large input."""
    monkeypatch.setattr(conv_triton, "PROGRAMS", dict.fromkeys(conv_triton.PROGRAMS, 2))


def drawn(B, S, C, J, padding, dtype=torch.float32, weight_dtype=None):
    """Inputs and the gradient of the output, on a CPU."""
    shapes = {"x": (B, S, C), "weight": (C, J), "bias": (C,), "dy": (B, S + padding - (J - 1), C)}
    dtypes = {"weight": weight_dtype or dtype, "bias": weight_dtype or dtype}
    return {name: torch.randn(shape).to(dtypes.get(name, dtype)) for name, shape in shapes.items()}


def kernels(x, weight, bias, padding):
    """The op on the device, for inputs and results on the CPU."""
    return causal_conv(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), padding).cpu()


def plain(x, weight, bias, padding):
    x_before = F.pad(x, (0, 0, padding, 0))
    T, J = x_before.shape[1] - (weight.shape[1] - 1), weight.shape[1]
    return F.silu(bias + sum(weight[:, j] * x_before[:, j : j + T] for j in range(J))).to(x.dtype)


def output_and_grads(op, x, padding):
    leaves = {name: x[name].detach().requires_grad_() for name in NAMES}
    y = op(**leaves, padding=padding)
    grads = torch.autograd.grad(y, list(leaves.values()), x["dy"])
    return {"y": y.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}


def assert_correct(x, padding):
    oracle = {name: t.double() for name, t in x.items()}
    results = [output_and_grads(op, t, padding) for op, t in ((kernels, x), (plain, oracle), (plain, x))]
    assert_each(assert_matches, *results)


def assert_equal(results, expected):
    for name, t in expected.items():
        assert torch.equal(results[name], t), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("from_start", [True, False])
@pytest.mark.parametrize("J", [1, 2, 4, 5, *([9] if GPU else [])])
def test_any_kernel_size_is_right_with_and_without_a_past(J, from_start, dtype):
    padding = J - 1 if from_start else 0
    assert_correct(drawn(2, 21, 24, J, padding, dtype), padding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B, S, C, padding",
    [(1, 1, 40, 3), (3, 1, 17, 3), (2, 4, 40, 0), (1, 17, 150, 3), (2, 16, 128, 3), (1, 35, 5, 0), (2, 19, 64, 1)],
)
def test_any_shape_is_right(B, S, C, padding, dtype):
    assert_correct(drawn(B, S, C, 4, padding, dtype), padding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_programs_that_walk_over_many_tiles_are_right(dtype, few_programs):
    assert_correct(drawn(3, 1000 if GPU else 35, 24, 4, 3, dtype), 3)


@pytest.mark.parametrize("dtype", DTYPES[1:] if GPU else DTYPES[1:2])  # the interpreter does not round to bfloat16
def test_weights_may_have_another_dtype(dtype):
    assert_correct(drawn(2, 9, 24, 4, 3, dtype, weight_dtype=torch.float32), 3)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # by the interpreter
def test_activations_far_from_zero_are_right():
    x = drawn(2, 9, 24, 4, 3)
    x["bias"] = torch.where(x["bias"] > 0, 200.0, -200.0)
    results = output_and_grads(kernels, x, 3)
    is_open = x["bias"] > 0
    assert not results["y"][..., ~is_open].any() and not results["gradient of x"][..., ~is_open].any()
    assert torch.equal(results["gradient of bias"][~is_open], torch.zeros_like(x["bias"])[~is_open])
    torch.testing.assert_close(results["gradient of bias"][is_open], x["dy"].sum((0, 1))[is_open])


def test_the_past_in_front_of_a_text_is_as_good_as_its_start():
    x = drawn(2, 40, 24, 4, 3)
    y, parts = kernels(x["x"], x["weight"], x["bias"], 3), ((slice(0, 23), 3), (slice(20, 40), 0))
    cut = [kernels(x["x"][:, positions], x["weight"], x["bias"], padding) for positions, padding in parts]
    assert torch.equal(torch.cat(cut, 1), y)


@pytest.mark.parametrize("C", [32, 24, 17])
def test_slices_of_fused_projections_are_as_good_as_copies(C):
    B, S = 2, 19
    x = drawn(B, S, C, 4, 3)
    expected = output_and_grads(kernels, x, 3)
    views = {name: torch.full((B, S + 2, 3 * C), torch.nan)[:, 1:-1, C : 2 * C] for name in ("x", "dy")}
    for name, view in views.items():
        view.copy_(x[name])
    assert_equal(output_and_grads(kernels, x | views, 3), expected)


def test_axes_in_any_order_are_as_good_as_copies():
    x = drawn(2, 19, 24, 4, 3)
    expected = output_and_grads(kernels, x, 3)
    reverse = {name: tuple(reversed(range(t.dim()))) for name, t in x.items()}
    permuted = {n: t.permute(reverse[n]).contiguous().permute(reverse[n]) for n, t in x.items()}
    assert_equal(output_and_grads(kernels, x | permuted, 3), expected)
    by_time = {n: x[n].transpose(0, 1).contiguous().transpose(0, 1) for n in ("x", "dy")}
    assert_equal(output_and_grads(kernels, x | by_time, 3), expected)
    ones = x | {"dy": torch.ones(1, 1, 1).expand_as(x["dy"])}
    assert_equal(*(output_and_grads(kernels, t, 3) for t in (ones, ones | {"dy": ones["dy"].contiguous()})))


def test_two_runs_are_bit_equal(few_programs):
    x = drawn(3, 20000 if GPU else 35, 24, 4, 3, DTYPES[-1])
    assert_equal(*(output_and_grads(kernels, x, 3) for _ in range(2)))


def test_unneeded_gradients_are_left_out():
    x = drawn(2, 9, 24, 4, 3)
    weight = x["weight"].clone().requires_grad_()
    y = kernels(x["x"], weight, x["bias"], 3)
    (grad,) = torch.autograd.grad(y, weight, x["dy"])
    assert torch.equal(grad, output_and_grads(kernels, x, 3)["gradient of weight"])
    with torch.no_grad():
        assert not kernels(x["x"], weight, x["bias"], 3).requires_grad


@pytest.mark.parametrize("padding", [-1, 4])
def test_another_padding_is_refused_in_a_sentence(padding):
    x = drawn(2, 9, 24, 4, padding)
    with pytest.raises(ValueError, match=f"^padding must be from 0 to 3, .* got {padding}.$"):
        kernels(x["x"], x["weight"], x["bias"], padding)


def test_a_text_shorter_than_the_kernel_is_refused_in_a_sentence():
    x = drawn(2, 9, 24, 4, 0)
    with pytest.raises(ValueError, match="^x must have at least 4 positions .* got 3.$"):
        kernels(x["x"][:, :3], x["weight"], x["bias"], 0)


@pytest.mark.parametrize("J, padding", [(4, 3), (4, 0), (1, 0)])
def test_the_op_keeps_the_promises_of_a_custom_op(J, padding):
    x = {name: t.to(DEVICE) for name, t in drawn(2, 5, 8, J, padding).items()}
    inputs = [x[name].requires_grad_() for name in NAMES]
    torch.library.opcheck(torch.ops.modeling_xlstm.causal_conv, (*inputs, padding))
    detached = [t.detach() for t in (x["dy"], *inputs)]
    torch.library.opcheck(torch.ops.modeling_xlstm.causal_conv_backward, (*detached, padding))


@pytest.mark.parametrize("padding", [3, 0])
def test_it_is_one_op_to_a_compiler(padding):
    x = drawn(2, 9, 24, 4, padding)
    compiled = torch.compile(kernels, fullgraph=True, backend="aot_eager")
    assert_equal(*(output_and_grads(op, x, padding) for op in (compiled, kernels)))


@pytest.mark.skipif(not GPU, reason="counts what is compiled for a GPU")
def test_nothing_is_compiled_again_for_another_batch_or_length():
    def run(B, S, padding):
        output_and_grads(kernels, drawn(B, S, 40, 4, padding, torch.bfloat16), padding)
        return compilations(conv_triton)

    compiled = run(1, 4, 3)
    assert compiled > 0
    sizes = ((2, 17, 3), (3, 256, 0), (16, 16, 3), (5, 513, 0), (1, 1, 3))
    assert [run(*size) for size in sizes] == [compiled] * len(sizes)


@pytest.mark.skipif(not GPU, reason="needs twenty gigabytes")
def test_addresses_beyond_32_bits_are_right():
    B, S, C = 2, 2**19 + 3, 2080
    assert B * S * C > 2**31
    x = torch.randn(B, S, C, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight, bias = torch.randn(C, 4, device=DEVICE), torch.randn(C, device=DEVICE)
    y = causal_conv(x, weight, bias, 3)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    tail = x.detach()[1:, -9:].requires_grad_()
    expected = causal_conv(tail, weight, bias, 0)
    (expected_dx,) = torch.autograd.grad(expected, tail, expected.detach())
    assert torch.equal(y[1:, -6:], expected) and torch.equal(dx[1:, -6:], expected_dx[:, 3:])
