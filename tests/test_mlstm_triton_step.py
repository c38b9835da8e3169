"""The step of the mLSTM in Triton against its definition, on a GPU or in Triton's interpreter."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import MLSTM_TOKENS, REGIMES, fresh, mlstm_inputs, outputs_and_grads, rounded, strided
from numerics import assert_each, assert_matches
from triton_device import DEVICE, GPU, RUN, needs_somewhere_to_run

from modeling_xlstm import mlstm_torch
from modeling_xlstm.fused import soft_cap
from modeling_xlstm.mlstm import MLSTMState


pytestmark = [pytest.mark.usefixtures("poisoned_memory"), needs_somewhere_to_run]

if RUN:
    from modeling_xlstm import mlstm_triton_step as triton_step

STATE = MLSTMState._fields
EPILOGUE = ("ogate", "weight", "bias")
INPUT_GATES = ("exp", "sigmoid")
# The interpreter rounds to bfloat16 towards zero.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float32, torch.float16)
# Some entries of everything: two roundings to compare are none.
SHAPES = ((8, 2, 24, 17), (8, 2, 16, 16), (12, 1, 48, 80), (32, 4, 1, 1), (16, 1, 130, 3), (12, 1, 3, 130))
LAYOUTS = ("sparse", "reversed", "slices of one projection")


def inputs(B=2, H=3, K=24, V=17, *, dtype=torch.float32, gates=None, **options):
    """Those of a step, rounded to `dtype`; the gates to `gates` where it is given."""
    x = {name: t[:, 0] if name in MLSTM_TOKENS else t for name, t in mlstm_inputs(B, 1, H, K, V, **options).items()}
    x = rounded(x, dtype)
    return x if gates is None else x | {name: x[name].to(gates) for name in ("igate", "fgate")}


def with_epilogue(x):
    """The same with an output gate, and weight and bias of the norm."""
    ogate = torch.randn(x["v"].flatten(-2).shape)
    weight, bias = torch.randn(2, ogate.shape[-1])
    return x | {name: t.to(x["v"].dtype) for name, t in zip(EPILOGUE, (ogate, weight, bias), strict=True)}


def on_device(x, names):
    return [None if x[name] is None else x[name].to(DEVICE) for name in names]


def results(h, C, n, m):
    return h.cpu(), MLSTMState(C.cpu(), n.cpu(), m.cpu())


def step(x, *, mask=None, input_gate="exp", gate_soft_cap=None, eps=1e-6):
    """The op, for inputs and results on the CPU."""
    mask = None if mask is None else mask.to(DEVICE)
    return results(*triton_step.mlstm_step(*on_device(x, MLSTM_TOKENS + STATE), mask, input_gate, gate_soft_cap, eps))


def with_time(x, names):
    """Those of one step as those of a sequence of one, on the device."""
    return [t.unsqueeze(1) for t in on_device(x, names)]


def step_in_place(x, *, mask=None, input_gate="exp", gate_soft_cap=None, eps=1e-6):
    mask = None if mask is None else mask.to(DEVICE).unsqueeze(1)
    tokens, state = with_time(x, MLSTM_TOKENS), [t.clone() for t in on_device(x, STATE)]
    h = triton_step.mlstm_steps_(*tokens, *state, mask, input_gate, gate_soft_cap, eps)
    return results(h.squeeze(1), *state)


def gated(x, *, mask=None, input_gate="exp", gate_soft_cap=None, eps=1e-6, norm_eps=1e-5, offset=0.0):
    mask = None if mask is None else mask.to(DEVICE).unsqueeze(1)
    tokens, state = with_time(x, (*MLSTM_TOKENS, "ogate")), [t.clone() for t in on_device(x, STATE)]
    options = (mask, input_gate, gate_soft_cap, eps, norm_eps, offset)
    y = triton_step.mlstm_steps_gated_(*tokens, *state, *on_device(x, ("weight", "bias")), *options)
    return results(y.squeeze(1), *state)


def definition(x, *, mask=None, input_gate="exp", gate_soft_cap=None, eps=1e-6):
    q, k, v, igate, fgate = (x[name] for name in MLSTM_TOKENS)
    igate, fgate = soft_cap(igate, gate_soft_cap), soft_cap(fgate, gate_soft_cap)
    held = mlstm_torch.hold_padding(q, k, v, igate, fgate, mask)
    h, state = mlstm_torch.mlstm_step(*held, MLSTMState(*(x[name] for name in STATE)), input_gate, eps)
    return h.to(v.dtype), state


def gated_definition(x, *, norm_eps=1e-5, offset=0.0, **options):
    """As `HeadNorm` and a layer do it, one operation after the other."""
    h, state = definition(x, **options)
    y = F.layer_norm(h, h.shape[-1:], eps=norm_eps).flatten(-2) * (x["weight"] + offset)
    y = y if x["bias"] is None else y + x["bias"]
    return torch.sigmoid(x["ogate"]) * y, state


def doubled(x):
    return {name: t if t is None else t.double() for name, t in x.items()}


def assert_correct(x, op=step, reference=definition, **options):
    """`op` errs like the definition in the same dtype."""
    runs = (op(x, **options), reference(doubled(x), **options), reference(x, **options))
    assert_each(assert_matches, *({"output": h, **state._asdict()} for h, state in runs))


def assert_same(actual, expected):
    """Bit for bit."""
    for a, b in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b)


# the step


@pytest.mark.parametrize("input_gate", INPUT_GATES)
@pytest.mark.parametrize("B, H, K, V", SHAPES)
def test_the_step_is_the_definition_for_any_shape(B, H, K, V, input_gate):
    x = inputs(B, H, K, V, aligned=True)
    assert_correct(x, input_gate=input_gate)
    assert_correct(fresh(x), input_gate=input_gate)


@pytest.mark.parametrize("gates", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_gate", INPUT_GATES)
def test_the_step_errs_like_the_definition_in_every_dtype(input_gate, dtype, gates):
    x = inputs(16, 2, 24, 40, dtype=dtype, gates=gates, aligned=True)
    assert_correct(x, input_gate=input_gate)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("input_gate", INPUT_GATES)
@pytest.mark.parametrize("regime", [*REGIMES, "closed"])
def test_the_step_is_the_definition_for_extreme_gates(regime, input_gate, eps):
    assert_correct(inputs(16, 2, regime=regime), input_gate=input_gate, eps=eps)


@pytest.mark.parametrize("input_gate", INPUT_GATES)
def test_a_shut_gate_lets_nothing_in_or_empties_the_state(input_gate):
    x = inputs(4, 16, aligned=True)
    x["igate"][[0, 2, 3]], x["fgate"][[1, 2, 3]], x["m"][3] = -math.inf, -math.inf, -math.inf
    assert_correct(x, input_gate=input_gate)
    _, (C, n, m) = step(x, input_gate=input_gate)
    assert not C[2:].any() and not n[2:].any() and not m[2:].any()


def test_an_empty_stabiliser_stays_empty():
    x = inputs(2, 16, aligned=True)
    x["m"].fill_(-math.inf)
    x["igate"][0] = -math.inf
    assert_correct(x)


@pytest.mark.parametrize("cap", [2.5, 15.0])
@pytest.mark.parametrize("input_gate", INPUT_GATES)
def test_gates_are_capped_first(input_gate, cap):
    x = inputs(16, 2, regime="wild")
    x["igate"][0], x["fgate"][1] = -math.inf, -math.inf
    assert_correct(x, input_gate=input_gate, gate_soft_cap=cap)


def test_a_gate_that_is_not_a_number_shows():
    for name in ("igate", "fgate"):
        x = inputs()
        x[name][1, 2] = math.nan
        h, state = step(x)
        assert all(t[1, 2].isnan().all() for t in (h, *state))
        assert all(t[0].isfinite().all() for t in (h, *state))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_matter(layout):
    x = inputs(2, 3, 16, 24)
    if layout == "slices of one projection":
        row = torch.cat([x[name].flatten(1) for name in MLSTM_TOKENS], 1)
        parts = row.split([x[name].flatten(1).shape[1] for name in MLSTM_TOKENS], 1)
        views = x | {name: part.view(x[name].shape) for name, part in zip(MLSTM_TOKENS, parts, strict=True)}
        actual = step(views)
    else:
        actual = strided(step, layout)(x)
    assert_same(actual, step(x))


@pytest.mark.skipif(not GPU, reason="takes gigabytes")
def test_addresses_beyond_two_to_the_31_are_fine():
    x = inputs(2, 1, 16, 16, dtype=torch.bfloat16)
    for name in ("q", "k", "v"):
        memory = torch.empty((1 << 31) + 16, dtype=torch.bfloat16, device=DEVICE)
        far = memory.as_strided((2, 1, 16), (1 << 31, 16, 1)).copy_(x[name])
        assert_same(step(x | {name: far}), step(x))


# padding


@pytest.mark.parametrize("op", ["step", "gated"])
@pytest.mark.parametrize("input_gate", INPUT_GATES)
def test_padded_rows_hold_their_state_whatever_is_there(input_gate, op):
    x, mask = with_epilogue(inputs(12, 2, aligned=True)), torch.arange(12) % 3 > 0
    junk = {name: x[name].clone() for name in MLSTM_TOKENS}
    for t in junk.values():
        t[0::6], t[3::6] = math.nan, math.inf
    run, reference = (step, definition) if op == "step" else (gated, gated_definition)
    for cap in (None, 15.0):
        assert_same(run(x | junk, mask=mask, input_gate=input_gate, gate_soft_cap=cap),
                    run(x, mask=mask, input_gate=input_gate, gate_soft_cap=cap))  # fmt: skip
        assert_correct(x, run, reference, mask=mask, input_gate=input_gate, gate_soft_cap=cap)
    h, state = step(x | junk, mask=mask)
    assert not h[~mask].any()
    assert all(torch.equal(t[~mask], x[name][~mask]) for name, t in state._asdict().items())


def test_every_second_entry_of_memory_may_be_a_mask():
    x, mask = inputs(4), torch.tensor([True, False, False, True])
    view = torch.stack((mask, ~mask), 1).to(DEVICE)[:, 0]
    assert_same(step(x, mask=view), step(x, mask=mask))


# norm and output gate


@pytest.mark.parametrize("offset, bias", [(0.0, False), (0.0, True), (1.0, False)])
@pytest.mark.parametrize("input_gate", INPUT_GATES)
@pytest.mark.parametrize("B, H, K, V", [*SHAPES[:3], (8, 2, 8, 130)])
def test_the_gated_step_is_the_norm_of_heads_behind_the_step(B, H, K, V, input_gate, offset, bias):
    x = with_epilogue(inputs(B, H, K, V, aligned=True))
    x = x if bias else x | {"bias": None}
    assert_correct(x, gated, gated_definition, input_gate=input_gate, offset=offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gated_step_errs_like_its_operations_in_every_dtype(dtype):
    x = with_epilogue(inputs(16, 2, 24, 40, dtype=dtype, gates=torch.float32, aligned=True))
    assert_correct(x, gated, gated_definition, gate_soft_cap=15.0)


def test_weights_of_the_norm_may_have_another_dtype():
    x = with_epilogue(inputs(2, dtype=torch.bfloat16))
    double = x | {name: x[name].float() for name in ("weight", "bias")}
    assert_same(gated(double), gated(x))


def test_the_output_gate_may_be_a_slice():
    x = with_epilogue(inputs(2))
    wide = torch.cat((torch.full_like(x["ogate"], math.nan), x["ogate"]), 1)
    assert_same(gated(x | {"ogate": wide.chunk(2, 1)[1]}), gated(x))


# in place


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("B, H, K, V", [(2, 3, 24, 17), (1, 1, 1, 1), (2, 1, 130, 3), (1, 2, 8, 130)])
def test_in_place_is_out_of_place_bit_for_bit(B, H, K, V, masked):
    x = inputs(B, H, K, V)
    mask = torch.rand(B) > 0.5 if masked else None
    assert_same(step_in_place(x, mask=mask), step(x, mask=mask))


def test_the_state_is_not_modified_out_of_place():
    x = inputs()
    before = {name: t.clone() for name, t in x.items()}
    step(x)
    assert all(torch.equal(t, before[name]) for name, t in x.items())


@pytest.mark.parametrize("name", STATE)
def test_a_state_with_gaps_is_read_but_not_overwritten(name):
    x = {key: t.to(DEVICE) for key, t in inputs().items()}
    gaps = x | {name: torch.stack((x[name], x[name]), -1)[..., 0]}
    assert_same(step(gaps), step(x))
    with pytest.raises(ValueError, match=f"state.{name} must be contiguous to be overwritten, got strides"):
        triton_step.mlstm_steps_(*with_time(gaps, MLSTM_TOKENS), *on_device(gaps, STATE), None, "exp", None, 1e-6)


# a few steps


def sequence(B, T, H=8, K=12, V=20, dtype=torch.float32):
    """Tokens of T steps, `[B, T, H, ...]`, and the state before them, with an output gate and a norm."""
    return with_epilogue(rounded(mlstm_inputs(B, T, H, K, V), dtype))


def steps(x, *, mask=None, input_gate="exp"):
    tokens, state = on_device(x, MLSTM_TOKENS), [t.clone() for t in on_device(x, STATE)]
    mask = None if mask is None else mask.to(DEVICE)
    return results(triton_step.mlstm_steps_(*tokens, *state, mask, input_gate, 15.0, 1e-6), *state)


def gated_steps(x, *, mask=None, input_gate="exp"):
    tokens, state = on_device(x, (*MLSTM_TOKENS, "ogate")), [t.clone() for t in on_device(x, STATE)]
    options = (None if mask is None else mask.to(DEVICE), input_gate, 15.0, 1e-6, 1e-5, 0.0)
    y = triton_step.mlstm_steps_gated_(*tokens, *state, *on_device(x, ("weight", "bias")), *options)
    return results(y, *state)


def steps_one_by_one(x, one, *, mask=None, input_gate="exp"):
    h, state = [], MLSTMState(*(x[name] for name in STATE))
    for t in range(x["q"].shape[1]):
        now = x | {name: x[name][:, t] for name in (*MLSTM_TOKENS, "ogate")} | state._asdict()
        masked = None if mask is None else mask[:, t]
        h_t, state = one(now, mask=masked, input_gate=input_gate, gate_soft_cap=15.0)
        h.append(h_t)
    return torch.stack(h, 1), state


STEPS = {"steps": (steps, step_in_place, definition), "gated steps": (gated_steps, gated, gated_definition)}


@pytest.mark.parametrize("op", STEPS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("input_gate", INPUT_GATES)
@pytest.mark.parametrize("B, T", [(4, 2), (2, 5), (1, 16)])
def test_a_few_steps_are_one_after_the_other(B, T, input_gate, masked, op):
    x, mask = sequence(B, T), torch.rand(B, T) > 0.4 if masked else None
    run, one, reference = STEPS[op]
    options = {"mask": mask, "input_gate": input_gate}
    actual = run(x, **options)
    oracle, baseline = (steps_one_by_one(y, reference, **options) for y in (doubled(x), x))
    assert_each(assert_matches, *({"output": h, **state._asdict()} for h, state in (actual, oracle, baseline)))
    assert_same(actual, steps_one_by_one(x, one, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", STEPS)
def test_a_few_steps_err_like_the_definition_in_every_dtype(op, dtype):
    x = sequence(4, 5, dtype=dtype)
    run, _, reference = STEPS[op]
    runs = (run(x), steps_one_by_one(doubled(x), reference), steps_one_by_one(x, reference))
    assert_each(assert_matches, *({"output": h, **state._asdict()} for h, state in runs))


def test_padded_steps_leave_the_state_as_it_was():
    x, mask = sequence(3, 6, 2), torch.tensor([[True] * 3 + [False] * 3, [False] * 6, [False, True] * 3])
    junk = {name: x[name].clone() for name in MLSTM_TOKENS}
    for t in junk.values():
        t[~mask] = math.nan
    _, state = steps(x | junk, mask=mask)
    assert_same(gated_steps(x | junk, mask=mask), gated_steps(x, mask=mask))
    for row in range(3):
        real = {name: x[name][row : row + 1, mask[row]] for name in MLSTM_TOKENS}
        expected = {name: x[name][row : row + 1] for name in STATE}
        if mask[row].any():
            expected = steps(real | expected)[1]._asdict()
        for name, tensor in state._asdict().items():
            assert torch.equal(tensor[row : row + 1], expected[name]), name


@pytest.mark.parametrize("op", STEPS)
def test_steps_may_be_views_of_the_projections_of_a_layer(op):
    x, run = sequence(2, 5, 2, 24, 40), STEPS[op][0]
    views = {}
    for names in (("q", "k", "v", "ogate"), ("igate", "fgate")):
        flat = torch.cat([x[name].view(2, 5, -1) for name in names], -1).to(DEVICE)
        parts = flat.split([x[name][0, 0].numel() for name in names], -1)
        views |= {name: part.view(x[name].shape) for name, part in zip(names, parts, strict=True)}
    assert not any(t.is_contiguous() for t in views.values())
    mask = torch.rand(2, 5) > 0.3
    sparse = torch.stack((mask, ~mask), -1).to(DEVICE)[..., 0]
    assert_same(run(x | views, mask=sparse), run(x, mask=mask))


@pytest.mark.skipif(not GPU, reason="programs of the interpreter run one after the other")
def test_results_do_not_depend_on_the_order_of_programs():
    x = with_epilogue(inputs(4, 8, 256, 512, dtype=torch.bfloat16))
    expected = gated(x)
    for _ in range(200):
        assert_same(gated(x), expected)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_a_captured_step_goes_on_with_the_state_at_each_replay():
    x = with_epilogue(inputs(2, 4, 64, 128, dtype=torch.bfloat16))
    tokens, weights = with_time(x, (*MLSTM_TOKENS, "ogate")), on_device(x, ("weight", "bias"))

    def run(state):
        return triton_step.mlstm_steps_gated_(*tokens, *state, *weights, None, "exp", None, 1e-6, 1e-5, 0.0)

    eager, captured = (on_device(x, STATE) for _ in range(2))
    expected = [run(eager) for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(captured)
    for one in expected:
        graph.replay()
        assert torch.equal(y, one)
    assert all(map(torch.equal, captured, eager))


@pytest.mark.skipif(not GPU, reason="counts what is compiled for a GPU")
def test_nothing_is_compiled_again_for_another_batch():
    def run(B):
        x = with_epilogue(inputs(B, 2, 24, 40, dtype=torch.bfloat16))
        for op in (step, step_in_place, gated):
            op(x)
            op(x, mask=torch.rand(B) > 0.5)
        return sum(len(cache) for cache, *_ in triton_step.mlstm_step_kernel.device_caches.values())

    run(1)  # which is started early on a GPU that can do that
    compiled = run(2)
    assert compiled > 0
    assert [run(B) for B in (1, 3, 16, 33)] == [compiled] * 4


# gradients, and the ops to PyTorch


@pytest.mark.parametrize("gate_soft_cap, masked", [(None, False), (15.0, False), (None, True)])
@pytest.mark.parametrize("input_gate", INPUT_GATES)
def test_gradients_are_those_of_the_definition(input_gate, gate_soft_cap, masked):
    x = inputs(15, 2, aligned=True)
    options = {
        "input_gate": input_gate,
        "gate_soft_cap": gate_soft_cap,
        "mask": torch.arange(15) % 3 > 0 if masked else None,
    }
    runs = [
        outputs_and_grads(lambda leaves, op=op: op(leaves, **options), leaves)
        for op, leaves in ((step, x), (definition, doubled(x)), (definition, x))
    ]
    assert_each(assert_matches, *runs)


def test_one_tensor_may_be_queries_and_keys():
    x = inputs(2)
    x["q"] = x["k"].clone()
    both, apart = x["k"].clone().requires_grad_(), [x[name].clone().requires_grad_() for name in "qk"]
    (grad,) = torch.autograd.grad(step(x | {"q": both, "k": both})[0].sum(), both)
    dq, dk = torch.autograd.grad(step(x | {"q": apart[0], "k": apart[1]})[0].sum(), apart)
    assert torch.equal(grad, dq + dk)


def test_a_second_derivative_is_refused():
    x = inputs(1)
    x["q"].requires_grad_()
    (grad,) = torch.autograd.grad(step(x)[0].square().sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="must be the last ones"):
        grad.sum().backward()


@pytest.mark.parametrize("input_gate", INPUT_GATES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_step_keeps_the_promises_of_a_custom_op(input_gate, masked):
    tensors = [t.requires_grad_() for t in on_device(inputs(2, 1, 4, 3), MLSTM_TOKENS + STATE)]
    mask = torch.tensor([True, False], device=DEVICE) if masked else None
    op = torch.ops.modeling_xlstm.mlstm_step_triton
    torch.library.opcheck(op, (*tensors, mask, input_gate, 15.0, 1e-6))


@pytest.mark.parametrize("name", ["mlstm_steps_triton_", "mlstm_steps_gated_triton_"])
def test_the_ops_in_place_keep_the_promises_of_custom_ops(name):
    x = with_epilogue(inputs(2, 1, 4, 3))
    options = (None, "exp", None, 1e-6)
    if "gated" in name:
        tokens, weights = with_time(x, (*MLSTM_TOKENS, "ogate")), on_device(x, ("weight", "bias"))
        arguments = (*tokens, *on_device(x, STATE), *weights, *options, 1e-5, 0.0)
    else:
        arguments = (*with_time(x, MLSTM_TOKENS), *on_device(x, STATE), *options)
    torch.library.opcheck(getattr(torch.ops.modeling_xlstm, name), arguments)


def test_a_compiled_step_in_place_is_the_eager_one():
    torch._dynamo.reset()
    x = with_epilogue(inputs())
    tokens, weights = with_time(x, (*MLSTM_TOKENS, "ogate")), on_device(x, ("weight", "bias"))
    options = (None, "exp", 15.0, 1e-6, 1e-5, 0.0)

    def run(state):
        return triton_step.mlstm_steps_gated_(*tokens, *state, *weights, *options)

    eager, compiled = ([t.clone() for t in on_device(x, STATE)] for _ in range(2))
    y = torch.compile(run, fullgraph=True, backend="aot_eager")(compiled)
    assert torch.equal(y, run(eager))
    assert all(map(torch.equal, compiled, eager))
