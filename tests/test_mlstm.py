"""The mLSTM ops: the definition against the paper, chunkwise against the definition, and what must not matter."""

import math
from functools import lru_cache, partial

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BAD_SEQUENCES,
    BAD_STEP_MASKS,
    LENGTHS,
    MLSTM_TOKENS,
    PACKED,
    REGIMES,
    fresh,
    in_two,
    mlstm_inputs,
    outputs_and_grads,
    packed,
    padded,
    padding_mask,
    rounded,
    separately,
    stepwise,
)
from numerics import assert_each, assert_exact, assert_matches
from torch.utils.flop_counter import FlopCounterMode

from modeling_xlstm import mlstm_torch
from modeling_xlstm.mlstm import MLSTMState, mlstm_chunkwise, mlstm_step


pytestmark = pytest.mark.usefixtures("poisoned_memory")

INPUT_GATES = ("exp", "sigmoid")


def unpack(x):
    return [x[name] for name in MLSTM_TOKENS], MLSTMState(x["C"], x["n"], x["m"])


def chunkwise(x, **options):
    inputs, state = unpack(x)
    return mlstm_chunkwise(*inputs, state, **options)


def step(x, **options):
    inputs, state = unpack(x)
    return mlstm_step(*inputs, state, **options)


def recurrent(x, input_gate="exp", eps=1e-6, mask=None):
    """The oracle, h in the dtype of v as the public ops return it."""
    (q, k, v, igate, fgate), state = unpack(x)
    q, k, v, igate, fgate = mlstm_torch.hold_padding(q, k, v, igate, fgate, mask)
    h, state = mlstm_torch.mlstm_recurrent(q, k, v, igate, fgate, state, input_gate, eps)
    return h.to(v.dtype), state


def parallel(x, exact_normaliser=True):
    """The paper's parallel form (equations 24 to 27) without stabiliser or eps, from an empty state; h only."""
    q, k, v, igate, fgate = (t.transpose(1, 2) for t in unpack(x)[0])
    logf = F.logsigmoid(fgate).cumsum(-1)
    D = (logf[..., :, None] - logf[..., None, :] + igate[..., None, :]).exp().tril()
    S = q @ k.mT / q.shape[-1] ** 0.5 * D
    normaliser = S.sum(-1, keepdim=True).abs().clamp(min=1)
    return (S @ v / (normaliser if exact_normaliser else normaliser.detach())).transpose(1, 2)


def from_h(op, x):
    """h of `op`, which returns it alone, and the gradients of all inputs but the state from a loss on h."""
    tokens, state = {name: x[name] for name in MLSTM_TOKENS}, unpack(x)[1]
    results = outputs_and_grads(lambda tokens: (op(x | tokens), state), tokens)
    return {name: t for name, t in results.items() if not name.startswith("final")}


@lru_cache
def oracle(T, regime, input_gate, eps):
    return outputs_and_grads(partial(recurrent, input_gate=input_gate, eps=eps), mlstm_inputs(2, T, regime=regime))


# the definition


def test_recurrent_is_the_parallel_form_of_the_paper():
    x = fresh(mlstm_inputs(2, 33))
    actual = from_h(lambda x: recurrent(x, eps=0.0)[0], x)
    assert_each(assert_exact, actual, from_h(parallel, x))


def test_sigmoid_input_gate_is_the_exponential_one_of_its_logarithm():
    x = fresh(mlstm_inputs(2, 33))
    actual = from_h(lambda x: recurrent(x, input_gate="sigmoid", eps=0.0)[0], x)
    expected = from_h(lambda x: parallel(x | {"igate": F.logsigmoid(x["igate"])}), x)
    assert_each(assert_exact, actual, expected)


def test_a_gradient_that_ignores_the_normaliser_would_be_noticed():
    x = fresh(mlstm_inputs(2, 33))
    actual = from_h(lambda x: chunkwise(x, eps=0.0)[0], x)
    wrong = from_h(partial(parallel, exact_normaliser=False), x)
    assert_exact(actual["h"], wrong["h"])
    assert_exact(actual["gradient of v"], wrong["gradient of v"])
    for name in ("q", "k", "igate", "fgate"):
        error = (actual[f"gradient of {name}"] - wrong[f"gradient of {name}"]).norm()
        assert error > 0.1 * actual[f"gradient of {name}"].norm(), name


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_a_step_in_place_is_the_step_and_overwrites_the_state(input_gate):
    tokens, state = unpack({name: x[:, 0] if name in MLSTM_TOKENS else x for name, x in mlstm_inputs(2, 1).items()})
    h, new = mlstm_torch.mlstm_step(*tokens, state, input_gate, 1e-6)
    held = MLSTMState(*(x.clone() for x in state))
    h_in_place, same = mlstm_torch.mlstm_step(*tokens, held, input_gate, 1e-6, in_place=True)
    assert torch.equal(h, h_in_place)
    for x, before, after in zip(held, state, new, strict=True):
        assert torch.equal(x, after)
        assert not torch.equal(x, before) or input_gate == "sigmoid"  # whose m stays 0
    assert all(a is b for a, b in zip(same, held, strict=True))


@pytest.mark.parametrize("op", [recurrent, chunkwise])
def test_the_stabiliser_is_only_a_representation_of_the_state(op):
    x = mlstm_inputs(2, 33)
    shift = torch.linspace(-3, 3, 6, dtype=torch.float64).view(2, 3)
    shifted = x | {
        "C": x["C"] * shift.exp()[..., None, None],
        "n": x["n"] * shift.exp()[..., None],
        "m": x["m"] - shift,
    }
    assert_each(assert_exact, *(from_h(lambda x: op(x, eps=0.0)[0], y) for y in (shifted, x)))


def test_no_state_is_a_state_of_zeros():
    x = fresh(mlstm_inputs(2, 17))
    inputs, zeros = unpack(x)
    token = [t[:, 0] for t in inputs]
    pairs = (
        (mlstm_chunkwise(*inputs), mlstm_chunkwise(*inputs, zeros)),
        (mlstm_step(*token), mlstm_step(*token, zeros)),
    )
    for (h, state), (h_zeros, state_zeros) in pairs:
        assert torch.equal(h, h_zeros)
        assert all(map(torch.equal, state, state_zeros))


# chunkwise equals the definition


@pytest.mark.parametrize("input_gate", INPUT_GATES)
@pytest.mark.parametrize("chunk_size", [1, 16, 64, 128, None])
@pytest.mark.parametrize("T", LENGTHS)
def test_chunkwise_is_recurrent_for_any_length_and_chunk_size(T, chunk_size, input_gate):
    op = partial(chunkwise, input_gate=input_gate, chunk_size=chunk_size)
    expected = oracle(T, "ordinary", input_gate, 1e-6)
    assert_each(assert_exact, outputs_and_grads(op, mlstm_inputs(2, T)), expected)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("input_gate", INPUT_GATES)
@pytest.mark.parametrize("regime", [*REGIMES, "closed"])
def test_chunkwise_is_recurrent_for_extreme_gates(regime, input_gate, eps):
    x = mlstm_inputs(2, 65, regime=regime)
    expected = oracle(65, regime, input_gate, eps)
    for chunk_size in (16, 64):
        actual = outputs_and_grads(partial(chunkwise, input_gate=input_gate, chunk_size=chunk_size, eps=eps), x)
        assert_each(assert_exact, actual, expected)


@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("shift", [-100, 100])
def test_chunkwise_is_recurrent_where_the_stabiliser_is_beyond_the_bounds_of_the_floor(shift, eps):
    x = mlstm_inputs(2, 33, regime="huge")
    x["igate"] += shift - 40
    x["m"] += shift
    actual = outputs_and_grads(partial(chunkwise, chunk_size=16, eps=eps), x)
    assert_each(assert_exact, actual, outputs_and_grads(partial(recurrent, eps=eps), x))


@pytest.mark.parametrize("op", [recurrent, partial(chunkwise, chunk_size=4), stepwise(step)])
@pytest.mark.parametrize("name, value", [("igate", math.nan), ("igate", math.inf), ("fgate", math.nan)])
def test_what_a_gate_that_is_no_number_reaches_is_no_number_either(name, value, op):
    x = mlstm_inputs(2, 9)
    x[name][0, 4, 1] = value
    h, state = op(x)
    expected, _ = op(mlstm_inputs(2, 9))
    assert h[0, 4:, 1].isnan().all() and not state.m[0, 1].isfinite()
    assert state.C[0, 1].isnan().all() and state.n[0, 1].isnan().all()
    h[0, 4:, 1] = expected[0, 4:, 1]
    assert_exact(h, expected)


@pytest.mark.parametrize("op", [partial(chunkwise, chunk_size=16), step], ids=["chunkwise", "step"])
@pytest.mark.parametrize("input_gate", INPUT_GATES)
def test_a_soft_cap_bounds_both_gates_before_all_else(input_gate, op):
    def by_hand(x):
        gates = {name: 3 * torch.tanh(x[name] / 3) for name in ("igate", "fgate")}
        return run(x | gates, input_gate=input_gate)

    def run(x, **options):
        return stepwise(partial(op, **options))(x) if op is step else op(x, **options)

    x = mlstm_inputs(2, 19, regime="wild")
    actual = outputs_and_grads(partial(run, input_gate=input_gate, gate_soft_cap=3.0), x)
    assert_each(assert_exact, actual, outputs_and_grads(by_hand, x))


@pytest.mark.parametrize("B, T, H, K, V", [(1, 1, 1, 1, 1), (3, 5, 1, 1, 7), (1, 33, 5, 7, 1), (3, 19, 2, 9, 32)])
def test_chunkwise_is_recurrent_for_odd_shapes(B, T, H, K, V):
    x = mlstm_inputs(B, T, H, K, V)
    actual = outputs_and_grads(partial(chunkwise, chunk_size=8), x)
    assert_each(assert_exact, actual, outputs_and_grads(recurrent, x))


@pytest.mark.parametrize("input_gate", INPUT_GATES)
def test_chunkwise_passes_gradcheck(input_gate):
    x = mlstm_inputs(1, 5, 2, 3, 2)

    def outputs(*tensors):
        h, state = chunkwise(dict(zip(x, tensors, strict=True)), input_gate=input_gate, chunk_size=2, eps=1e-2)
        return h, *state

    assert torch.autograd.gradcheck(outputs, [t.requires_grad_() for t in x.values()])


@pytest.mark.parametrize("input_gate", INPUT_GATES)
def test_steps_are_recurrent(input_gate):
    x = mlstm_inputs(2, 19)
    actual = outputs_and_grads(stepwise(partial(step, input_gate=input_gate)), x)
    assert_each(assert_exact, actual, outputs_and_grads(partial(recurrent, input_gate=input_gate), x))


# sequences: padded, packed, continued, reset


def of_sequences(op, input_gate):
    """Results for packed sequences; with the sigmoid gate m is no input, and 0."""
    x = mlstm_inputs(1, sum(PACKED), rows=len(PACKED))
    fixed = {} if input_gate == "exp" else {"m": torch.zeros_like(x.pop("m"))}
    return outputs_and_grads(lambda x: op(x | fixed), x)


@pytest.mark.parametrize("input_gate", INPUT_GATES)
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padded_sequences_are_separate_sequences(side, input_gate):
    expected = of_sequences(separately(partial(recurrent, input_gate=input_gate)), input_gate)
    for op in (
        partial(chunkwise, input_gate=input_gate, chunk_size=16),
        stepwise(partial(step, input_gate=input_gate)),
    ):
        assert_each(assert_exact, of_sequences(padded(op, padding_mask(side)), input_gate), expected)


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padded_positions_get_no_gradient_and_read_the_held_state(side):
    mask = padding_mask(side)
    x = mlstm_inputs(*mask.shape)
    h, _ = chunkwise(x, mask=mask)
    assert_exact(h, recurrent(x, mask=mask)[0])
    assert not h[~mask].any()
    grads = outputs_and_grads(lambda x: (lambda h, state: (h[mask], state))(*chunkwise(x, mask=mask)), x)
    for name in MLSTM_TOKENS:
        assert (grads[f"gradient of {name}"][~mask] == 0).all(), name
        assert (grads[f"gradient of {name}"][mask] != 0).any(), name


@pytest.mark.parametrize("input_gate", INPUT_GATES)
@pytest.mark.parametrize("chunk_size", [1, 16, None])
def test_packed_sequences_are_separate_sequences(chunk_size, input_gate):
    op = packed(partial(chunkwise, input_gate=input_gate, chunk_size=chunk_size))
    expected = of_sequences(separately(partial(recurrent, input_gate=input_gate)), input_gate)
    assert_each(assert_exact, of_sequences(op, input_gate), expected)


def test_int64_boundaries_do_as_well():
    x = mlstm_inputs(1, 9, rows=2)
    bounds = torch.tensor([0, 4, 9])
    h, h_int32 = (chunkwise(x, cu_seqlens=cu_seqlens)[0] for cu_seqlens in (bounds, bounds.int()))
    assert torch.equal(h, h_int32)


@pytest.mark.parametrize("regime", ["ordinary", "wild"])
@pytest.mark.parametrize("split", [1, 16, 37, 64])
def test_a_sequence_in_two_parts_is_the_whole(split, regime):
    op = partial(chunkwise, chunk_size=16)
    actual = outputs_and_grads(in_two(op, split), mlstm_inputs(2, 65, regime=regime))
    assert_each(assert_exact, actual, oracle(65, regime, "exp", 1e-6))


@pytest.mark.parametrize("input_gate", INPUT_GATES)
@pytest.mark.parametrize("at", [0, 5, 16, 30])
def test_a_closed_forget_gate_forgets_everything_before_it_exactly(at, input_gate):
    op = partial(chunkwise, input_gate=input_gate, chunk_size=16)
    x, other = (mlstm_inputs(2, 31, seed=seed) for seed in (0, 1))
    for t in (x, other):
        t["fgate"][:, at] = -torch.inf
    other = {name: torch.cat((100 * other[name][:, :at], x[name][:, at:]), 1) for name in MLSTM_TOKENS} | {
        name: 100 * other[name] for name in MLSTMState._fields
    }
    (h, state), (h_other, state_other) = op(x), op(other)
    assert torch.equal(h[:, at:], h_other[:, at:])
    assert all(map(torch.equal, state, state_other))
    grads = outputs_and_grads(lambda x: (lambda h, state: (h[:, at:], state))(*op(x)), x)
    assert all((grads[f"gradient of {name}"][:, :at] == 0).all() for name in MLSTM_TOKENS)
    assert all((grads[f"gradient of {name}"] == 0).all() for name in MLSTMState._fields)


# dtypes and memory


@pytest.mark.parametrize("input_gate", INPUT_GATES)
@pytest.mark.parametrize("T, chunk_size", [(63, None), (200, 16), (200, None)])
def test_float32_chunkwise_errs_like_float32_recurrent(T, chunk_size, input_gate):
    x = rounded(mlstm_inputs(32, T, aligned=True), torch.float32)
    expected = outputs_and_grads(partial(recurrent, input_gate=input_gate), rounded(x, torch.float64))
    baseline = outputs_and_grads(partial(recurrent, input_gate=input_gate), x)
    actual = outputs_and_grads(partial(chunkwise, input_gate=input_gate, chunk_size=chunk_size), x)
    assert_each(assert_matches, actual, expected, baseline)


@pytest.mark.parametrize("gates", ["same", torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_gate", INPUT_GATES)
def test_low_precision_inputs_cost_only_their_own_rounding(input_gate, dtype, gates):
    x = rounded(mlstm_inputs(32, 65, aligned=True), dtype)
    if gates != "same":
        x |= {name: x[name].to(gates) for name in ("igate", "fgate")}
    expected = outputs_and_grads(partial(recurrent, input_gate=input_gate), rounded(x, torch.float64))
    baseline = outputs_and_grads(partial(recurrent, input_gate=input_gate), x)
    actual = outputs_and_grads(partial(chunkwise, input_gate=input_gate, chunk_size=16), x)
    assert_each(assert_matches, actual, expected, baseline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("regime", [*REGIMES, "closed"])
def test_extreme_gates_stay_finite_in_every_dtype(dtype, regime):
    x = rounded(mlstm_inputs(2, 65, regime=regime), dtype)
    for name, result in outputs_and_grads(partial(chunkwise, chunk_size=16), x).items():
        assert result.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_h_has_the_dtype_of_v_and_the_state_is_at_least_float32(dtype):
    x = rounded(mlstm_inputs(2, 5), dtype)
    for op, y in ((chunkwise, x), (step, {name: t[:, 0] if name in MLSTM_TOKENS else t for name, t in x.items()})):
        for gates in (dtype, torch.float32):
            h, state = op(y | {name: y[name].to(gates) for name in ("igate", "fgate")})
            assert h.dtype == dtype
            assert {t.dtype for t in state} == {torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize("op", [recurrent, stepwise(step)], ids=["recurrent", "steps"])
def test_gradients_of_steps_stay_finite_where_the_stabiliser_is_low(op):
    x = rounded(mlstm_inputs(2, 33, regime="faint"), torch.float32)
    for name, result in outputs_and_grads(op, x).items():
        assert result.isfinite().all(), name


def test_expanded_gradients_and_inputs_are_fine():
    x = mlstm_inputs(1, 33)
    one, _ = chunkwise(x)
    h, _ = chunkwise({name: t.expand(3, *t.shape[1:]) for name, t in x.items()})
    assert_exact(h, one.expand_as(h))
    leaf = x["q"].clone().requires_grad_()
    h, _ = chunkwise(x | {"q": leaf})
    (expanded,) = torch.autograd.grad(h.sum(), leaf, retain_graph=True)
    (dense,) = torch.autograd.grad(h, leaf, torch.ones_like(h))
    assert_exact(expanded, dense)


@pytest.mark.parametrize("input_gate", INPUT_GATES)
def test_incoming_gradients_need_not_be_contiguous(input_gate):
    leaves = {name: t.requires_grad_() for name, t in mlstm_inputs(2, 19).items()}
    h, state = chunkwise(leaves, input_gate=input_gate, chunk_size=8)
    outputs = (h, *state)
    incoming = [torch.randn_like(t) for t in outputs]
    reversed_axes = [t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1]) for t in incoming]
    options = {"retain_graph": True, "materialize_grads": True}
    actual, expected = (
        torch.autograd.grad(outputs, list(leaves.values()), x, **options) for x in (reversed_axes, incoming)
    )
    for name, a, b in zip(leaves, actual, expected, strict=True):
        assert_exact(a, b, name)


def products(op, *inputs):
    """How many numbers `op`, as it is behind its door, multiplies."""
    with FlopCounterMode(display=False) as counter:
        op.__wrapped__(*inputs)
    return counter.get_total_flops()


def test_the_work_of_chunks_grows_with_the_length_and_not_with_its_square():
    def work(T, bounds=None):
        x = mlstm_inputs(1, T, rows=None if bounds is None else len(bounds) - 1)
        cu_seqlens = None if bounds is None else torch.tensor(bounds)
        return products(mlstm_torch.mlstm_chunkwise, *x.values(), cu_seqlens, "exp", 16, 1e-6)

    assert work(160) == 10 * work(16)
    assert work(4) < work(16) / 4
    assert work(64, [0, 32, 64]) == work(64)
    assert work(64, [0, 1, 1, 64]) == work(80)


@pytest.mark.parametrize("B, T, H", [(1, 1, 1), (2, 16, 1), (2, 1, 3), (1, 5, 3), (2, 19, 3)])
def test_nothing_is_modified_in_place(B, T, H):
    x = mlstm_inputs(B, T, H)
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    h, state = chunkwise(leaves, chunk_size=16)
    last = step({name: t[:, 0] if name in MLSTM_TOKENS else t for name, t in leaves.items()})
    outputs = (h, *state, last[0], *last[1])
    incoming = [torch.randn_like(t) for t in outputs]
    copies = [t.clone() for t in incoming]
    torch.autograd.grad(outputs, list(leaves.values()), incoming)
    assert all(map(torch.equal, incoming, copies))
    assert all(torch.equal(leaves[name], x[name]) for name in x)


def test_unneeded_gradients_are_left_out():
    x = mlstm_inputs(2, 17)
    v = x["v"].clone().requires_grad_()
    h, state = chunkwise(x | {"v": v})
    assert h.requires_grad and all(t.requires_grad for t in state)
    (grad,) = torch.autograd.grad(h.sum() + sum(t.sum() for t in state), v)
    assert grad.isfinite().all()
    with torch.no_grad():
        assert not chunkwise(x | {"v": v})[0].requires_grad


# the op to PyTorch


@pytest.mark.parametrize(
    "B, T, H, bounds",
    [(2, 19, 3, None), (1, 16, 1, None), (1, 19, 3, [0, 7, 7, 19])],
    ids=["batch", "one chunk of one head", "packed"],
)
def test_the_op_keeps_the_promises_of_a_custom_op(B, T, H, bounds):
    x = mlstm_inputs(B, T, H, 4, 3, rows=None if bounds is None else len(bounds) - 1)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    tensors = [t.requires_grad_() for t in x.values()]
    torch.library.opcheck(torch.ops.modeling_xlstm.mlstm_chunkwise, (*tensors, cu_seqlens, "exp", 16, 1e-6))


# bad input

BAD = {
    "q is a list": (lambda x: {"q": [1.0]}, TypeError, r"q must be a tensor \[B .*H K\], got list"),
    "q is integer": (lambda x: {"q": x["q"].int()}, TypeError, "q must be float16, .* got torch.int32"),
    "q without heads": (lambda x: {"q": x["q"][..., 0, :]}, ValueError, r"the \d axes \[B .*H K\], got shape"),
    "q without batch": (lambda x: {"q": x["q"][:0]}, ValueError, r"q \[B .*H K\] must not have an empty axis"),
    "k of another size": (lambda x: {"k": x["k"][..., 1:]}, ValueError, r"k must have shape .* 24\), got .* 23\)"),
    "k is missing": (lambda x: {"k": None}, TypeError, "k must be a tensor of shape .* got NoneType"),
    "k elsewhere": (lambda x: {"k": x["k"].to("meta")}, ValueError, "k must be on cpu like the other inputs, got meta"),
    "k of another dtype": (lambda x: {"k": x["k"].half()}, TypeError, "must have one dtype, got .* k torch.float16"),
    "v of another batch": (lambda x: {"v": x["v"][1:]}, ValueError, r"v must have shape \(2, .* got \(1, .* 17\)"),
    "v without channels": (lambda x: {"v": x["v"][..., :0]}, ValueError, r"v \[B .*H V\] must not have an empty axis"),
    "igate with an axis more": (lambda x: {"igate": x["igate"][..., None]}, ValueError, r"shape .* got .* 3, 1\)"),
    "fgate is bool": (lambda x: {"fgate": x["fgate"] > 0}, TypeError, "fgate must be one of .* got torch.bool"),
    "input_gate unknown": (lambda x: {"input_gate": "tanh"}, ValueError, "must be 'exp' or 'sigmoid', got 'tanh'"),
    "soft cap of zero": (lambda x: {"gate_soft_cap": 0}, ValueError, "must be finite and more than 0, or None, got 0"),
    "soft cap infinite": (lambda x: {"gate_soft_cap": math.inf}, ValueError, "must be finite and .*, got inf"),
    "eps infinite": (lambda x: {"eps": math.inf}, ValueError, "eps must be finite and not negative, got inf"),
    "eps not a number": (lambda x: {"eps": math.nan}, ValueError, "eps must be finite and not negative, got nan"),
    "eps negative": (lambda x: {"eps": -1e-6}, ValueError, "eps must be finite and not negative, got -1e-06"),
    "backend unknown": (lambda x: {"backend": "cuda"}, ValueError, "backend must be one of auto, .* got 'cuda'"),
    "backend not for CPU": (lambda x: {"backend": "triton"}, NotImplementedError, "'triton' was requested .* cpu"),
    "state of another batch": (
        lambda x: {"state": MLSTMState(*(s[:1] for s in x["state"]))},
        ValueError,
        r"state.C must have shape \(2, 3, 24, 17\), got \(1, 3, 24, 17\)",
    ),
    "state of a mixed batch": (
        lambda x: {"state": x["state"]._replace(m=x["state"].m[:1])},
        ValueError,
        r"state.m must have shape \(2, 3\), got \(1, 3\)",
    ),
    "state transposed": (
        lambda x: {"state": x["state"]._replace(C=x["state"].C.mT)},
        ValueError,
        r"state.C must have shape \(2, 3, 24, 17\), got \(2, 3, 17, 24\)",
    ),
    "state in bfloat16": (
        lambda x: {"state": x["state"]._replace(n=x["state"].n.bfloat16())},
        TypeError,
        "state.n must be one of torch.float32, got torch.bfloat16",
    ),
    "state in part": (lambda x: {"state": x["state"][:2]}, ValueError, "state must be an MLSTMState .* got 2 tensors"),
}


@pytest.mark.parametrize("op", [mlstm_chunkwise, mlstm_step])
@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_in_a_sentence(change, error, message, op):
    x = rounded(mlstm_inputs(2, 5), torch.float32)
    inputs, state = unpack(x)
    if op is mlstm_step:
        inputs = [t[:, 0] for t in inputs]
    good = dict(zip(MLSTM_TOKENS, inputs, strict=True)) | {"state": state}
    op(**good)
    with pytest.raises(error, match=message):
        op(**good | change(good))


@pytest.mark.parametrize("mask, error, message", BAD_STEP_MASKS.values(), ids=BAD_STEP_MASKS.keys())
def test_bad_masks_of_a_step_are_refused_in_a_sentence(mask, error, message):
    with pytest.raises(error, match=message):
        mlstm_step(*(t[:, 0] for t in unpack(mlstm_inputs(2, 1))[0]), mask=mask)


@pytest.mark.parametrize("B, options, error, message", BAD_SEQUENCES.values(), ids=BAD_SEQUENCES.keys())
def test_bad_sequences_are_refused_in_a_sentence(B, options, error, message):
    with pytest.raises(error, match=message):
        mlstm_chunkwise(*unpack(mlstm_inputs(B, 5))[0], **options)


@pytest.mark.parametrize("chunk_size", [0, -16, 2.5])
def test_chunks_hold_a_token_at_least(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be an integer of at least 1, got {chunk_size}"):
        chunkwise(mlstm_inputs(2, 5), chunk_size=chunk_size)


def test_a_sequence_holds_a_token_at_least():
    with pytest.raises(ValueError, match=r"q \[B T H K\] must not have an empty axis, got shape \(2, 0, 3, 24\)"):
        chunkwise(mlstm_inputs(2, 0))


def test_packed_sequences_start_from_a_state_each():
    with pytest.raises(ValueError, match=r"state.C must have shape \(2, 3, 24, 17\), got \(1, 3, 24, 17\)"):
        packed(chunkwise, (2, 3))(mlstm_inputs(1, 5))
