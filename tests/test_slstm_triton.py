"""The Triton kernels of the sLSTM against the definition, on a GPU or (one program a head) in Triton's interpreter."""

import math
from functools import partial

import pytest
import torch
from cases import (
    PACKED,
    REGIMES,
    WEIGHTS,
    fresh,
    in_two,
    outputs_and_grads,
    packed,
    padded,
    padding_mask,
    pick,
    rounded,
    slstm_inputs,
    stepwise,
    strided,
    unstabilised,
)
from numerics import assert_each, assert_matches, least_exact
from triton_device import DEVICE, GPU, RUN, needs_somewhere_to_run

from modeling_xlstm.slstm import SLSTMState, slstm_scan, slstm_step


pytestmark = [pytest.mark.usefixtures("poisoned_memory"), needs_somewhere_to_run]

if RUN:
    from modeling_xlstm import slstm_triton

# The interpreter has no products in bfloat16.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float32, torch.float16)
HALF = DTYPES[-1]
# in one program, and cut, the last ones into parts that are not full
WIDTHS = (8, 24, 64, 128, 192, 200) if GPU else (8, 24)
WIDE = 192 if GPU else 24


def unpack(x):
    return x["gates"], x["R"], SLSTMState(x["h"], x["c"], x["n"], x["m"])


def inputs(*sizes, **options):
    return {name: t.to(DEVICE) for name, t in slstm_inputs(*sizes, **options).items()}


def scan(x, backend, **options):
    return slstm_scan(*unpack(x), backend=backend, **options)


def step(x, backend, **options):
    return slstm_step(*unpack(x), backend=backend, **options)


on_triton, on_torch = (partial(scan, backend=backend) for backend in ("triton", "torch"))


def plain(x):
    """A loop of steps in plain PyTorch, products in the dtype of the inputs, all else in float32."""
    gates, R, (h, c, n, m) = unpack(x)
    outputs = []
    for t in range(gates.shape[1]):
        i, f, z, o = (gates[:, t] + torch.einsum("hgoi,bhi->bhgo", R, h.to(R.dtype))).float().unbind(-2)
        log_f = torch.nn.functional.logsigmoid(f) + m
        m_new = torch.where(n == 0, i, torch.maximum(i, log_f))
        decay, enter = torch.exp((log_f - m_new).clamp(max=80.0)), torch.exp(i - m_new)
        c, n, m = decay * c + enter * z.tanh(), decay * n + enter, m_new
        h = o.sigmoid() * c / n
        outputs.append(h.to(gates.dtype))
    return torch.stack(outputs, 1), SLSTMState(h, c, n, m)


def results(x, dtype, way=lambda op: op, weights=None):
    """Outputs, final state and all gradients of the kernels, for inputs `x` in `dtype` (recurrent weights in that of
    `weights`, if given) that `way` feeds to an op, those of the definition in float64, and the less exact of our
    PyTorch backend, which computes in float32, and plain PyTorch. In half precision rounding may move the step that a
    stabiliser is from, and with it a gradient, so states are compared by what they stand for."""
    x = rounded(x, dtype) if weights is None else rounded(x, dtype) | {"R": x["R"].to(weights)}
    whole = way if x["R"].dtype == torch.float32 else lambda op: unstabilised(way(op))
    oracle = outputs_and_grads(whole(on_torch), {name: t.double() for name, t in x.items()})
    actual, *baselines = (outputs_and_grads(whole(op), x) for op in (on_triton, on_torch, plain))
    return actual, oracle, least_exact(oracle, *baselines)


def assert_correct(x, dtype, way=lambda op: op, weights=None):
    assert_each(assert_matches, *results(x, dtype, way, weights))


def assert_those_of_pytorch(x, *ways):
    """In float32, by ops that have more options than plain PyTorch: the kernels' way, and that of the definition."""
    x = rounded(x, torch.float32)
    oracle = {name: t.double() for name, t in x.items()}
    of_triton, of_torch = ways if len(ways) == 2 else ways * 2
    runs = ((of_triton(on_triton), x), (of_torch(on_torch), oracle), (of_torch(on_torch), x))
    assert_each(assert_matches, *(outputs_and_grads(op, tensors) for op, tensors in runs))


@pytest.mark.parametrize("state", ["continued", "fresh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
def test_any_head_size_is_right(D, dtype, state):
    x = inputs(5, 40 if GPU else 12, 2, D)
    assert_correct(fresh(x) if state == "fresh" else x, dtype)


@pytest.mark.skipif(not GPU, reason="parts of a head wait for each other")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, H, D", [(3, 2, 256), (16, 4, 384), (8, 2, 512), (16, 1, 768), (5, 1, 1024), (64, 4, 256)])
def test_wide_heads_are_right(B, H, D, dtype):
    if slstm_triton.obstacle(D, dtype, DEVICE):
        pytest.skip("does not fit on this GPU")
    assert_correct(inputs(B, 30, H, D), dtype)


@pytest.mark.parametrize("B", [1, 2, 8, 9, 17])
@pytest.mark.parametrize("T", [1, 2, 65] if GPU else [1, 2])
def test_any_batch_and_length_is_right(T, B):
    assert_correct(inputs(B, T, 3, WIDE), torch.float32)


@pytest.mark.skipif(not GPU, reason="parts of a head wait for each other")
@pytest.mark.parametrize("B", [40, 300])
def test_more_rows_than_fit_at_once_are_right(B):
    assert_correct(inputs(B, 9, 4, 136), torch.bfloat16)


@pytest.mark.skipif(not GPU, reason="too slow in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [64, 192])
def test_errors_do_not_grow_over_a_long_sequence(D, dtype):
    assert_correct(inputs(2, 8192, 2, D), dtype)


@pytest.mark.parametrize("state", ["continued", "fresh"])
@pytest.mark.parametrize("regime", REGIMES)
def test_extreme_gates_are_right(regime, state):
    x = inputs(3, 65 if GPU else 20, 2, WIDE, regime=regime)
    assert_correct(fresh(x) if state == "fresh" else x, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
def test_extreme_gates_stay_finite_in_every_dtype(regime, dtype):
    x = rounded(inputs(3, 65 if GPU else 20, 2, WIDE, regime=regime), dtype)
    for name, result in outputs_and_grads(on_triton, x).items():
        assert result.isfinite().all(), name


def test_packed_sequences_are_right():
    assert_those_of_pytorch(inputs(1, sum(PACKED), 2, WIDE, rows=len(PACKED)), packed)


@pytest.mark.parametrize("lengths", [(5, *[0] * 12), (*[0] * 8, 5), (*[0] * 17, 3, 0, 7, *[0] * 16)])
def test_packed_sequences_that_are_empty_have_the_gradients_of_their_state(lengths):
    """Also where a program has nothing else."""
    x = inputs(1, sum(lengths), 2, WIDE, rows=len(lengths))
    assert_those_of_pytorch(x, partial(packed, lengths=lengths))


def test_arguments_of_other_kinds_do_as_well():
    x = rounded(inputs(1, 9, 2, WIDE, rows=2), torch.float32)
    bounds = torch.tensor([0, 4, 9], device=DEVICE)
    assert torch.equal(*(on_triton(x, cu_seqlens=cu_seqlens)[0] for cu_seqlens in (bounds, bounds.int())))
    x = rounded(inputs(3, 9, 2, WIDE), torch.float32)
    assert torch.equal(*(on_triton(x | {"R": R})[0] for R in (x["R"], x["R"].double())))
    mask = (torch.arange(9, device=DEVICE) > 3).expand(3, 9)
    assert torch.equal(*(on_triton(x, mask=m)[0] for m in (mask, mask.contiguous())))


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padding_is_right(side):
    mask = padding_mask(side).to(DEVICE)
    assert_those_of_pytorch(inputs(1, sum(PACKED), 2, WIDE, rows=len(PACKED)), partial(padded, mask=mask))


def test_padded_positions_get_no_gradient_and_repeat_h():
    mask = padding_mask("scattered").to(DEVICE)
    x = rounded(inputs(*mask.shape, 2, WIDE), torch.float32)
    h, _ = on_triton(x, mask=mask)
    before = torch.cat((x["h"][:, None], h[:, :-1]), 1)
    assert torch.equal(h[~mask], before[~mask])
    assert not outputs_and_grads(partial(on_triton, mask=mask), x)["gradient of gates"][~mask].any()


def test_a_sequence_in_two_parts_is_right():
    assert_correct(inputs(2, 21, 2, WIDE), torch.float32, partial(in_two, split=8))


def test_steps_are_right():
    assert_those_of_pytorch(
        inputs(3, 5, 2, WIDE), lambda op: stepwise(partial(step, backend="triton")) if op is on_triton else op
    )
    x, mask = rounded(pick(inputs(4, 1, 2, WIDE), slice(0, 1)), torch.float32), torch.tensor([1, 0, 1, 0]).bool()
    now = x | {"gates": x["gates"][:, 0]}
    h, state = step(now, "triton", mask=mask.to(DEVICE))
    assert all(torch.equal(t[~mask], x[name][~mask]) for name, t in state._asdict().items())
    assert torch.equal(h, state.h)


def test_no_state_is_a_state_of_zeros():
    gates, R, zeros = unpack(rounded(fresh(inputs(2, 17, 2, WIDE)), torch.float32))
    (h, state), (h_zeros, state_zeros) = (slstm_scan(gates, R, s, backend="triton") for s in (None, zeros))
    assert torch.equal(h, h_zeros)
    assert all(map(torch.equal, state, state_zeros))


@pytest.mark.parametrize("layout", ["sparse", "reversed"])
def test_views_that_are_not_contiguous_are_right(layout):
    assert_correct(inputs(2, 9, 2, WIDE), torch.float32, partial(strided, layout=layout))


def test_two_runs_are_bit_equal():
    x = rounded(inputs(9, 50 if GPU else 9, 2, WIDE), DTYPES[-1])
    first, second = (outputs_and_grads(on_triton, x) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype):
    x = rounded(inputs(9, 9, 2, WIDE), dtype)
    h, state = on_triton(x)
    for row in (0, 8):
        alone = {name: t if name in WEIGHTS else t[row : row + 1] for name, t in x.items()}
        h_alone, state_alone = on_triton(alone)
        assert torch.equal(h[row : row + 1], h_alone)
        assert all(torch.equal(t[row : row + 1], t_alone) for t, t_alone in zip(state, state_alone, strict=True))


def test_without_gradients_nothing_is_kept_and_results_are_the_same():
    x = rounded(inputs(3, 9, 2, WIDE), torch.float32)
    h, final = on_triton({name: t.clone().requires_grad_() for name, t in x.items()})
    with torch.no_grad():
        h_only, final_only = on_triton(x)
    assert h.requires_grad and not h_only.requires_grad
    assert torch.equal(h_only, h)
    assert all(map(torch.equal, final_only, final))


@pytest.mark.parametrize("D", WIDTHS)
def test_gates_in_float32_with_weights_in_half_precision_are_right(D):
    """As in a model in half precision that keeps its gates in float32."""
    assert_correct(inputs(5, 40 if GPU else 9, 2, D), torch.float32, weights=HALF)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_under_autocast_products_are_in_its_dtype():
    x = rounded(inputs(5, 9, 2, WIDE), torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        h, _ = on_triton(x)
    assert h.dtype == torch.float32
    assert torch.equal(h, on_triton(x | {"R": x["R"].bfloat16()})[0])


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float32])
def test_weights_of_another_dtype_are_rounded_to_that_of_the_gates(dtype):
    x = rounded(inputs(3, 9, 2, WIDE), dtype)
    single = x | {"R": x["R"].float()}
    actual, expected = (outputs_and_grads(on_triton, t) for t in (single, x))
    for name, result in actual.items():
        if name == "gradient of R":
            assert result.dtype == torch.float32
            torch.testing.assert_close(result, expected[name].float(), atol=1e-2, rtol=1e-2)
        else:
            assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gates", "R", "h", "c", "n", "m"])
def test_what_is_not_a_number_shows(name, dtype):
    """In all that the definition has it in, and nowhere else; and nobody waits for it, whatever its bits."""
    clean = rounded(inputs(3, 9, 2, WIDE), dtype)
    x = clean | {name: clean[name].clone()}
    place = (1, 4, 1) if name == "gates" else (1,) if name == "R" else (1, 1)
    bits = {2: torch.int16, 4: torch.int32}[x[name].dtype.itemsize]
    x[name].view(bits)[place] = -1
    assert x[name][place].isnan().all()
    h, state = on_triton(clean)
    outputs = [(h, *state) for h, state in (op(x) for op in (on_triton, on_torch))]
    for actual, expected, right in zip(*outputs, (h, *state), strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual[~actual.isnan()], right[~actual.isnan()])
    assert outputs[0][0].isnan().any()
    gradient = outputs_and_grads(on_triton, x)["gradient of gates"]
    assert gradient.isnan().any() and gradient[:, :, 0].isfinite().all()


def test_gradients_of_parts_of_the_outputs_are_right():
    x = rounded(inputs(2, 9, 2, WIDE), torch.float32)
    for part in range(5):
        grads = []
        for op in (on_triton, on_torch):
            leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
            h, state = op(leaves)
            output = (h, *state)[part]
            loss = (output * torch.linspace(-1, 1, output.numel(), device=DEVICE).view_as(output)).sum()
            grads.append(torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True))
        for name, actual, expected in zip(x, *grads, strict=True):
            scale = max(expected.abs().max().item(), 1e-3)
            torch.testing.assert_close(actual, expected, atol=2e-5 * scale, rtol=1e-4, msg=name)


@pytest.mark.skipif(not GPU, reason="too slow in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [16, 40, 64, 72, 120, 128, 136, 192, 256, 384])
def test_random_shapes_are_right(D, dtype):
    """All shapes together, each tensor in units of its largest entry: a few numbers are no measure of an error."""
    generator = torch.Generator().manual_seed(D + 1000 * DTYPES.index(dtype))

    def draw(most):
        return int(torch.randint(1, most, (), generator=generator))

    together: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    for seed in range(4):  # 120 different ones in all
        actual, oracle, baseline = results(inputs(draw(20), draw(150), draw(4), D, seed=seed), dtype)
        for name, expected in oracle.items():
            assert actual[name].dtype == baseline[name].dtype, name
            scale = expected.abs().max().clamp(min=1e-300)
            scaled = ((t.double() / scale).flatten() for t in (actual[name], expected, baseline[name]))
            together.setdefault(name, []).append(tuple(scaled))
    for name, parts in together.items():
        assert_matches(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)), name)


# the op to PyTorch


@pytest.mark.parametrize("how", ["plain", "masked", "packed"])
@pytest.mark.parametrize("keep", [False, True])
def test_the_op_keeps_the_promises_of_a_custom_op(keep, how):
    lengths = (4, 0, 5)
    B = 1 if how == "packed" else 3
    x = rounded(inputs(B, 9, 2, 8, rows=len(lengths)), torch.float32)
    mask = torch.rand(B, 9, device=DEVICE) > 0.3 if how == "masked" else None
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int() if how == "packed" else None
    tensors = [t.requires_grad_(keep) for t in x.values()]
    torch.library.opcheck(
        torch.ops.modeling_xlstm.slstm_scan_triton,
        (*tensors, mask, bounds, keep),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_it_is_one_op_to_a_compiler():
    x = rounded(inputs(2, 9, 2, WIDE), torch.float32)
    leaves = [{name: t.clone().requires_grad_() for name, t in x.items()} for _ in range(2)]
    grads = []
    for op, tensors in zip(
        (on_triton, torch.compile(on_triton, fullgraph=True, backend="aot_eager")), leaves, strict=True
    ):
        h, state = op(tensors)
        loss = h.square().sum() + sum(t.sum() for t in state)
        grads.append(torch.autograd.grad(loss, list(tensors.values())))
    assert all(map(torch.equal, *grads))


def test_it_is_one_op_in_an_exported_program():
    class Module(torch.nn.Module):
        def forward(self, gates, R):
            return slstm_scan(gates, R, backend="triton")[0]

    def tensors(B, T):
        return unpack(rounded(inputs(B, T, 2, WIDE), torch.float32))[:2]

    shapes = ({0: torch.export.Dim("B", max=64), 1: torch.export.Dim("T", max=4096)}, None)
    program = torch.export.export(Module(), tensors(2, 9), dynamic_shapes=shapes)
    ops = [node.target for node in program.graph.nodes if "modeling_xlstm" in str(node.target)]
    assert ops == [torch.ops.modeling_xlstm.slstm_scan_triton.default]
    assert torch.equal(program.module()(*tensors(3, 7)), Module()(*tensors(3, 7)))


# what is refused


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("backend, error", [("triton", NotImplementedError), ("auto", None)])
def test_heads_that_do_not_fit_are_refused_or_left_to_pytorch(backend, error):
    gates, R = torch.zeros(1, 1, 1, 4, 4096, device=DEVICE), torch.zeros(1, 4, 4096, 4096, device=DEVICE)
    if error is None:
        assert torch.equal(*(slstm_scan(gates, R, backend=name)[0] for name in (backend, "torch")))
    else:
        with pytest.raises(error, match="weights of a head of 4096 channels in torch.float32 do not fit on the chip"):
            slstm_scan(gates, R, backend=backend)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_programs_that_cannot_all_run_raise_instead_of_waiting(monkeypatch):
    monkeypatch.setattr(slstm_triton, "processors", lambda device: 1 << 20)
    x = rounded(inputs(2000, 2, 4, 192), torch.bfloat16)
    with pytest.raises(RuntimeError, match="cooperative launch"):
        on_triton(x)
    monkeypatch.undo()
    h, _ = on_triton(x)
    assert h.isfinite().all()


@pytest.mark.skipif(GPU, reason="about the interpreter")
def test_the_interpreter_cannot_wait():
    with pytest.raises(NotImplementedError, match="interpreter runs heads of at most 128 channels, got 136"):
        on_triton(rounded(inputs(1, 2, 1, 136), torch.float32))


def test_float64_is_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match="the kernels take float16, bfloat16 and float32, not float64"):
        on_triton(inputs(2, 5, 1, 8))


def test_activations_that_were_not_kept_are_missed_in_a_sentence():
    x = rounded(inputs(1, 2, 1, 8), torch.float32)
    y = slstm_triton.slstm_scan(*(t.requires_grad_() for t in x.values()), None, None, False)[0]
    with pytest.raises(RuntimeError, match="must keep its activations to be differentiated"):
        y.sum().backward()


def test_an_infinite_forget_gate_empties_the_state():
    x = rounded(inputs(2, 9, 2, WIDE), torch.float32)
    x["gates"][:, 4, :, 1] = -math.inf
    assert_those_of_pytorch(x, lambda op: op)
