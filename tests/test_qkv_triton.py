"""The Triton kernels of the first paper's q, k, v and gates against PyTorch, on a GPU or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_each, assert_matches, least_exact
from triton_device import DEVICE, GPU, compilations, needs_somewhere_to_run

from modeling_xlstm.qkv_triton import qkv_and_gates


pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    needs_somewhere_to_run,
]

DTYPES = [torch.float16]
if GPU:  # the interpreter multiplies no matrices of bfloat16
    DTYPES += [torch.bfloat16]
NAMES = ("c", "x", "squares", "gate_weight", "gate_bias")
OUTPUTS = ("q", "k", "v", "gates")
SHAPES = [(1, 1, 1, 16, 2), (2, 37, 2, 64, 8), (3, 50, 3, 24, 1), (1, 130, 2, 12, 20)]  # B, T, N, W, G
if GPU:
    SHAPES += [(4, 2048, 16, 64, 8), (1, 5000, 32, 64, 8)]


def drawn(B, T, N, W, G, dtype, weight_dtype=torch.float32, biased=True):
    """Inputs and the gradients of outputs, on a CPU."""
    x = {"c": torch.randn(B, T, N * W), "x": torch.randn(B, T, N * W), "squares": torch.randn(3, N, W, W) / W**0.5}
    x = {name: t.to(dtype) for name, t in x.items()}
    x["gate_weight"] = (torch.randn(G, 3 * N * W) / (3 * N * W) ** 0.5).to(weight_dtype)
    if biased:
        x["gate_bias"] = torch.randn(G).to(weight_dtype)
    x |= {f"d{name}": torch.randn(B, T, N * W).to(dtype) for name in "qkv"}
    return x | {"dgates": torch.randn(B, T, G)}


def kernels(**inputs):
    """The op on the device, for inputs and results on the CPU."""
    return [y.cpu() for y in qkv_and_gates(*(inputs[name].to(DEVICE) if name in inputs else None for name in NAMES))]


def formula(c, x, squares, gate_weight, gate_bias=None):
    _, N, W, _ = squares.shape

    def through(x, square):
        return torch.einsum("btni,noi->btno", x.unflatten(-1, (N, W)), square).flatten(-2)

    q, k, v = (through(t, square) for t, square in zip((c, c, x), squares, strict=True))
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = None if gate_bias is None else gate_bias.to(dtype)
    return q, k, v, F.linear(torch.cat((q, k, v), -1).to(dtype), gate_weight.to(dtype), bias)


def one_by_one(c, x, squares, gate_weight, gate_bias=None):
    """The same, the products of the gates added one after the other: what float32 may cost."""
    q, k, v, _ = formula(c, x, squares, gate_weight)
    products = torch.cat((q, k, v), -1).float()[..., None, :] * gate_weight.float()
    gates = sum(products.unbind(-1))
    return q, k, v, gates if gate_bias is None else gates + gate_bias.float()


def outputs_and_grads(op, x):
    leaves = {name: x[name].detach().requires_grad_() for name in NAMES if name in x}
    outputs = dict(zip(OUTPUTS, op(**leaves), strict=True))
    grads = torch.autograd.grad([*outputs.values()], [*leaves.values()], [x[f"d{n}"].to(y) for n, y in outputs.items()])
    named = {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: y.detach() for name, y in outputs.items()} | named


def assert_correct(x):
    oracle = outputs_and_grads(formula, {name: t.double() for name, t in x.items()})
    baselines = [outputs_and_grads(formula, x)]
    if x["gate_weight"].shape[1] <= 300:
        baselines.append(outputs_and_grads(one_by_one, x))
    assert_each(assert_matches, outputs_and_grads(kernels, x), oracle, least_exact(oracle, *baselines))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_is_right(shape, dtype):
    assert_correct(drawn(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_the_same_dtype_and_no_bias_are_right(dtype):
    assert_correct(drawn(2, 37, 2, 64, 8, dtype, weight_dtype=dtype, biased=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_programs_that_walk_over_many_rows_are_right(dtype):
    assert_correct(drawn(2, 40000 if GPU else 300, 1, 16, 2, dtype))


def test_gates_are_those_of_what_is_returned():
    """q, k and v are rounded first: another op, or a step of decoding, has nothing else."""
    x = drawn(2, 37, 2, 64, 8, DTYPES[-1])
    q, k, v, gates = kernels(**{name: x[name] for name in NAMES})
    oracle = F.linear(torch.cat((q, k, v), -1).double(), x["gate_weight"].double(), x["gate_bias"].double())
    assert (gates - oracle).abs().max() < 4e-6


def test_slices_and_axes_in_any_order_are_as_good_as_copies():
    x = drawn(2, 37, 2, 24, 4, DTYPES[-1])
    expected = outputs_and_grads(kernels, x)
    views = {}
    for name in ("c", "x", "dq", "dk", "dv"):
        views[name] = torch.full((2, 37, 3 * 48), torch.nan, dtype=x[name].dtype)[..., 48:96]
        views[name].copy_(x[name])
    reverse = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in x.items() if t.dim() == 3}
    for other in (views, reverse):
        results = outputs_and_grads(kernels, x | other)
        assert all(torch.equal(results[name], t) for name, t in expected.items())


def test_two_runs_are_bit_equal():
    x = drawn(2, 12000 if GPU else 250, 2, 24, 4, DTYPES[-1])
    first, second = (outputs_and_grads(kernels, x) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_the_ops_keep_the_promises_of_a_custom_op():
    x = drawn(2, 5, 2, 16, 4, DTYPES[-1])
    inputs = [x[name].to(DEVICE).requires_grad_() for name in NAMES]
    torch.library.opcheck(torch.ops.modeling_xlstm.qkv_and_gates, inputs)
    q, k, v, _ = (y.detach() for y in qkv_and_gates(*inputs))
    grads = [x[f"d{name}"].to(DEVICE) for name in OUTPUTS]
    c, x, squares, gate_weight, _ = (t.detach() for t in inputs)
    saved = (c, x, q, k, v, squares, gate_weight)
    torch.library.opcheck(torch.ops.modeling_xlstm.qkv_and_gates_backward, (*grads, *saved))


def test_it_is_one_op_to_a_compiler():
    x = drawn(2, 9, 2, 16, 4, DTYPES[-1])
    compiled = torch.compile(kernels, fullgraph=True, backend="aot_eager")
    results, expected = (outputs_and_grads(run, x) for run in (compiled, kernels))
    assert all(torch.equal(results[name], t) for name, t in expected.items())


@pytest.mark.skipif(not GPU, reason="counts what is compiled for a GPU")
def test_nothing_is_compiled_again_for_another_batch_or_length():
    from modeling_xlstm import qkv_triton

    def run(B, T):
        outputs_and_grads(kernels, drawn(B, T, 2, 24, 4, torch.bfloat16))
        return compilations(qkv_triton)

    compiled = run(1, 1)
    assert compiled > 0
    assert [run(B, T) for B, T in ((2, 17), (3, 256), (16, 16), (5, 513))] == [compiled] * 4
