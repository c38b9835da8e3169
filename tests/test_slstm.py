"""The sLSTM ops: the definition against the paper, the scan against the definition, and what must not matter."""

from functools import lru_cache, partial

import pytest
import torch
from cases import (
    BAD_SEQUENCES,
    BAD_STEP_MASKS,
    LENGTHS,
    PACKED,
    REGIMES,
    fresh,
    in_two,
    outputs_and_grads,
    packed,
    padded,
    padding_mask,
    rounded,
    separately,
    slstm_inputs,
    stepwise,
    unstabilised,
)
from numerics import assert_each, assert_exact, assert_matches

from modeling_xlstm import slstm, slstm_torch
from modeling_xlstm.slstm import SLSTMState, slstm_scan, slstm_step


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def unpack(x):
    return x["gates"], x["R"], SLSTMState(x["h"], x["c"], x["n"], x["m"])


def scan(x, **options):
    return slstm_scan(*unpack(x), **options)


def step(x, **options):
    return slstm_step(*unpack(x), **options)


def recurrent(x, mask=None):
    """The oracle, h in the dtype of the gates as the public ops return it."""
    h, state = slstm_torch.slstm_recurrent(*unpack(x), mask)
    return h.to(x["gates"].dtype), state


def paper(x):
    """Equations 8 to 14 without stabiliser, from a state whose m is 0."""
    gates, R, (h, c, n, m) = unpack(x)
    outputs = []
    for t in range(gates.shape[1]):
        i, f, z, o = (gates[:, t, :, g] + torch.einsum("hoi,bhi->bho", R[:, g], h) for g in range(4))
        c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
        n = torch.sigmoid(f) * n + torch.exp(i)
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    return torch.stack(outputs, 1), SLSTMState(h, c, n, m)


@lru_cache
def oracle(T, regime):
    return outputs_and_grads(recurrent, slstm_inputs(2, T, regime=regime))


# the definition


@pytest.mark.parametrize("op", [recurrent, scan])
def test_the_scan_is_the_recurrence_of_the_paper(op):
    x = slstm_inputs(2, 33)
    state = {"m": torch.zeros_like(x["m"])}
    tokens = {name: x[name] for name in x if name != "m"}
    actual = outputs_and_grads(lambda tokens: unstabilised(op)(tokens | state), tokens)
    assert_each(assert_exact, actual, outputs_and_grads(lambda tokens: paper(tokens | state), tokens))


@pytest.mark.parametrize("op", [recurrent, scan])
def test_the_stabiliser_is_only_a_representation_of_the_state(op):
    x = slstm_inputs(2, 33)
    shift = torch.linspace(-3, 3, x["m"].numel(), dtype=torch.float64).view_as(x["m"])
    shifted = x | {"c": x["c"] * shift.exp(), "n": x["n"] * shift.exp(), "m": x["m"] - shift}

    def from_h(x):
        weights, state = {name: x[name] for name in ("gates", "R")}, unpack(x)[2]
        results = outputs_and_grads(lambda weights: (op(x | weights)[0], state), weights)
        return {name: t for name, t in results.items() if not name.startswith("final")}

    assert_each(assert_exact, from_h(shifted), from_h(x))


def test_no_state_is_a_state_of_zeros():
    x = fresh(slstm_inputs(2, 17))
    gates, R, zeros = unpack(x)
    pairs = (
        (slstm_scan(gates, R), slstm_scan(gates, R, zeros)),
        (slstm_step(gates[:, 0], R), slstm_step(gates[:, 0], R, zeros)),
    )
    for (h, state), (h_zeros, state_zeros) in pairs:
        assert torch.equal(h, h_zeros)
        assert all(map(torch.equal, state, state_zeros))


# the scan equals the definition


@pytest.mark.parametrize("state", ["continued", "fresh"])
@pytest.mark.parametrize("T", LENGTHS)
def test_scan_is_recurrent_for_any_length(T, state):
    x = slstm_inputs(2, T)
    x = fresh(x) if state == "fresh" else x
    assert_each(assert_exact, outputs_and_grads(scan, x), outputs_and_grads(recurrent, x))


@pytest.mark.parametrize("state", ["continued", "fresh"])
@pytest.mark.parametrize("regime", REGIMES)
def test_scan_is_recurrent_for_extreme_gates(regime, state):
    x = slstm_inputs(2, 65, regime=regime)
    x = fresh(x) if state == "fresh" else x
    assert_each(assert_exact, outputs_and_grads(scan, x), outputs_and_grads(recurrent, x))


@pytest.mark.parametrize("state", ["continued", "fresh"])
@pytest.mark.parametrize("B, T, H, D", [(1, 1, 1, 1), (1, 1, 1, 5), (3, 9, 1, 1), (1, 9, 5, 3), (3, 1, 2, 9)])
def test_scan_is_recurrent_for_odd_shapes(B, T, H, D, state):
    x = slstm_inputs(B, T, H, D)
    x = fresh(x) if state == "fresh" else x
    assert_each(assert_exact, outputs_and_grads(scan, x), outputs_and_grads(recurrent, x))


@pytest.mark.parametrize("mask", [None, torch.tensor([[0, 1, 1, 0, 1]], dtype=torch.bool)], ids=["plain", "masked"])
def test_scan_passes_gradcheck(mask):
    x = slstm_inputs(1, 5, 2, 3)

    def outputs(*tensors):
        h, state = scan(dict(zip(x, tensors, strict=True)), mask=mask)
        return h, *state

    assert torch.autograd.gradcheck(outputs, [t.requires_grad_() for t in x.values()])


@pytest.mark.parametrize("state", ["continued", "fresh"])
def test_steps_are_recurrent(state):
    x = slstm_inputs(2, 19)
    x = fresh(x) if state == "fresh" else x
    assert_each(assert_exact, outputs_and_grads(stepwise(step), x), outputs_and_grads(recurrent, x))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("state", ["continued", "fresh"])
def test_scan_without_gradients_is_the_scan_with_them(state, masked):
    x = slstm_inputs(3, 19)
    x = fresh(x) if state == "fresh" else x
    mask = torch.rand(3, 19) > 0.3 if masked else None
    h, final = scan({name: t.clone().requires_grad_() for name, t in x.items()}, mask=mask)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            h_only, final_only = scan(x, mask=mask)
        assert not h_only.requires_grad
        assert torch.equal(h_only, h)
        assert all(map(torch.equal, final_only, final))


# sequences: padded, packed, continued, mixed


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
@pytest.mark.parametrize("state", ["continued", "fresh"])
def test_padded_sequences_are_separate_sequences(state, side):
    x = slstm_inputs(1, sum(PACKED), rows=len(PACKED))
    x = fresh(x) if state == "fresh" else x
    expected = outputs_and_grads(separately(recurrent), x)
    for op in (scan, stepwise(step)):
        assert_each(assert_exact, outputs_and_grads(padded(op, padding_mask(side)), x), expected)


@pytest.mark.parametrize("state", ["continued", "fresh"])
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padded_positions_get_no_gradient_and_repeat_h(side, state):
    mask = padding_mask(side)
    x = slstm_inputs(*mask.shape)
    x = fresh(x) if state == "fresh" else x
    h, _ = scan(x, mask=mask)
    before = torch.cat((x["h"][:, None], h[:, :-1]), 1)
    assert torch.equal(h[~mask], before[~mask])
    grad = outputs_and_grads(partial(scan, mask=mask), x)["gradient of gates"]
    assert (grad[~mask] == 0).all()
    assert (grad[mask] != 0).any()
    assert_each(assert_exact, *(outputs_and_grads(partial(op, mask=mask), x) for op in (scan, recurrent)))


@pytest.mark.parametrize("state", ["continued", "fresh"])
def test_packed_sequences_are_separate_sequences(state):
    x = slstm_inputs(1, sum(PACKED), rows=len(PACKED))
    x = fresh(x) if state == "fresh" else x
    assert_each(assert_exact, outputs_and_grads(packed(scan), x), outputs_and_grads(separately(recurrent), x))


def test_int64_boundaries_do_as_well():
    x = slstm_inputs(1, 9, rows=2)
    bounds = torch.tensor([0, 4, 9])
    h, h_int32 = (scan(x, cu_seqlens=cu_seqlens)[0] for cu_seqlens in (bounds, bounds.int()))
    assert torch.equal(h, h_int32)


@pytest.mark.parametrize("regime", ["ordinary", "wild"])
@pytest.mark.parametrize("split", [1, 37, 64])
def test_a_sequence_in_two_parts_is_the_whole(split, regime):
    actual = outputs_and_grads(in_two(scan, split), slstm_inputs(2, 65, regime=regime))
    assert_each(assert_exact, actual, oracle(65, regime))


@pytest.mark.parametrize("op", [scan, stepwise(step)], ids=["scan", "steps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fresh_rows_do_not_disturb_continued_ones(dtype, op):
    x = slstm_inputs(4, 9)
    for name in SLSTMState._fields:
        x[name][::2] = 0
    x["gates"][:, :, :, 0] -= 200  # without help, the weight of a fresh row's first input underflows
    together = outputs_and_grads(op, rounded(x, dtype))
    for row in range(4):
        alone = rounded({name: t if name == "R" else t[row : row + 1] for name, t in x.items()}, dtype)
        h, state = op(alone)
        expected = {"h": h, **{f"final {name}": t for name, t in state._asdict().items()}}
        for name, t in expected.items():
            assert t.isfinite().all(), name
            torch.testing.assert_close(together[name][row : row + 1], t)
    for name, t in together.items():
        assert t.isfinite().all(), name


# dtypes and memory


@pytest.mark.parametrize("T", [63, 200])
def test_float32_scan_errs_like_float32_recurrent(T):
    x = rounded(slstm_inputs(8, T, 5, 17), torch.float32)
    expected = outputs_and_grads(recurrent, rounded(x, torch.float64))
    assert_each(assert_matches, outputs_and_grads(scan, x), expected, outputs_and_grads(recurrent, x))


@pytest.mark.parametrize("weights", ["same", torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_cost_only_their_own_rounding(dtype, weights):
    x = rounded(slstm_inputs(8, 65, 5, 17), dtype)
    if weights != "same":
        x["R"] = x["R"].to(weights)
    expected = outputs_and_grads(recurrent, rounded(x, torch.float64))
    assert_each(assert_matches, outputs_and_grads(scan, x), expected, outputs_and_grads(recurrent, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", ["continued", "fresh"])
@pytest.mark.parametrize("regime", REGIMES)
def test_extreme_gates_stay_finite_in_every_dtype(regime, state, dtype):
    x = rounded(slstm_inputs(2, 65, regime=regime), dtype)
    x = fresh(x) if state == "fresh" else x
    for name, result in outputs_and_grads(scan, x).items():
        assert result.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_h_has_the_dtype_of_the_gates_and_the_state_is_at_least_float32(dtype):
    x = rounded(slstm_inputs(2, 5), dtype)
    for op, y in ((scan, x), (step, x | {"gates": x["gates"][:, 0]})):
        for weights in (dtype, torch.float32):
            h, state = op(y | {"R": y["R"].to(weights)})
            assert h.dtype == dtype
            assert {t.dtype for t in state} == {torch.promote_types(dtype, torch.float32)}


def test_expanded_gradients_and_inputs_are_fine():
    x = slstm_inputs(1, 33)
    one, _ = scan(x)
    h, _ = scan({name: t if name == "R" else t.expand(3, *t.shape[1:]) for name, t in x.items()})
    assert_exact(h, one.expand_as(h))
    leaf = x["gates"].clone().requires_grad_()
    h, _ = scan(x | {"gates": leaf})
    (expanded,) = torch.autograd.grad(h.sum(), leaf, retain_graph=True)
    (dense,) = torch.autograd.grad(h, leaf, torch.ones_like(h))
    assert_exact(expanded, dense)


def test_incoming_gradients_need_not_be_contiguous():
    leaves = {name: t.requires_grad_() for name, t in slstm_inputs(2, 19).items()}
    h, state = scan(leaves)
    outputs = (h, *state)
    incoming = [torch.randn_like(t) for t in outputs]
    reversed_axes = [t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1]) for t in incoming]
    actual, expected = (
        torch.autograd.grad(outputs, list(leaves.values()), x, retain_graph=True) for x in (reversed_axes, incoming)
    )
    for name, a, b in zip(leaves, actual, expected, strict=True):
        assert_exact(a, b, name)


def test_activations_are_kept_only_where_there_is_something_to_differentiate(monkeypatch):
    kept = []

    def spy(*args):
        kept.append(args[-1])
        return slstm_torch.slstm_scan(*args)

    monkeypatch.setattr(slstm, "slstm_scan_torch", spy)
    x = slstm_inputs(2, 5)
    scan(x)
    for name in x:
        scan(x | {name: x[name].clone().requires_grad_()})
    with torch.no_grad():
        scan({name: t.clone().requires_grad_() for name, t in x.items()})
    assert kept == [False, *[True] * len(x), False]


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("B, T, H", [(1, 1, 1), (1, 9, 1), (1, 9, 3), (2, 1, 1), (2, 9, 3)])
def test_nothing_is_modified_in_place(B, T, H, needs_grad):
    x = slstm_inputs(B, T, H)
    leaves = {name: t.clone().requires_grad_(needs_grad) for name, t in x.items()}
    h, state = scan(leaves)
    last = step(leaves | {"gates": leaves["gates"][:, 0]})
    if needs_grad:
        outputs = (h, *state, last[0], *last[1])
        incoming = [torch.randn_like(t) for t in outputs]
        copies = [t.clone() for t in incoming]
        torch.autograd.grad(outputs, list(leaves.values()), incoming)
        assert all(map(torch.equal, incoming, copies))
    assert all(torch.equal(leaves[name], x[name]) for name in x)


def test_unneeded_gradients_are_left_out():
    x = slstm_inputs(2, 17)
    R = x["R"].clone().requires_grad_()
    h, state = scan(x | {"R": R})
    assert h.requires_grad and all(t.requires_grad for t in state)
    (grad,) = torch.autograd.grad(h.sum() + sum(t.sum() for t in state), R)
    assert grad.isfinite().all()


# the op to PyTorch


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "B, T, H, how",
    [(2, 9, 3, "plain"), (1, 9, 1, "plain"), (2, 9, 3, "masked"), (1, 9, 3, "packed")],
    ids=["batch", "one head", "masked", "packed"],
)
def test_the_op_keeps_the_promises_of_a_custom_op(B, T, H, how, keep):
    lengths = (4, 0, 5)
    x = slstm_inputs(B, T, H, 3, rows=len(lengths) if how == "packed" else None)
    mask = torch.rand(B, T) > 0.3 if how == "masked" else None
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int() if how == "packed" else None
    tensors = [t.requires_grad_(keep) for t in x.values()]
    torch.library.opcheck(torch.ops.modeling_xlstm.slstm_scan, (*tensors, mask, cu_seqlens, keep))


def test_gradients_have_the_dtypes_that_their_op_promises():
    x = slstm_inputs(2, 9, 3, 3)
    gates, R, *state = (x | {"R": x["R"].bfloat16()}).values()
    h, *last, pre, after = slstm_torch.slstm_scan(gates, R, *state, None, None, True)
    _, c, n, _ = last
    incoming = [torch.randn_like(t) for t in (h, *last)]
    inputs = (*incoming, pre, after, c, n, R, *state, None, None)
    torch.library.opcheck(torch.ops.modeling_xlstm.slstm_scan_backward, inputs, test_utils="test_faketensor")


# bad input

BAD = {
    "gates are a list": (lambda x: {"gates": [1.0]}, TypeError, r"gates must be a tensor \[B .*H 4 D\], got list"),
    "gates are integer": (lambda x: {"gates": x["gates"].int()}, TypeError, "must be float16, .* got torch.int32"),
    "gates without heads": (lambda x: {"gates": x["gates"][..., 0, :, :]}, ValueError, r"the \d axes \[B .*H 4 D\]"),
    "gates without batch": (lambda x: {"gates": x["gates"][:0]}, ValueError, r"gates .* must not have an empty axis"),
    "three gates": (lambda x: {"gates": x["gates"][..., 1:, :]}, ValueError, r"gates must hold the 4 gates .* 3, 7\)"),
    "R of another size": (lambda x: {"R": x["R"][..., 1:]}, ValueError, r"shape \(3, 4, 7, 7\), got .* 6\)"),
    "R of other heads": (lambda x: {"R": x["R"][1:]}, ValueError, r"shape \(3, 4, 7, 7\), got \(2, .*\)"),
    "R is missing": (lambda x: {"R": None}, TypeError, "R must be a tensor of shape .* got NoneType"),
    "R is integer": (lambda x: {"R": x["R"].int()}, TypeError, "R must be one of .* got torch.int32"),
    "R elsewhere": (lambda x: {"R": x["R"].to("meta")}, ValueError, "R must be on cpu like the other inputs, got meta"),
    "backend unknown": (lambda x: {"backend": "cuda"}, ValueError, "backend must be one of auto, .* got 'cuda'"),
    "backend not for CPU": (lambda x: {"backend": "triton"}, NotImplementedError, "'triton' was requested .* cpu"),
    "state of another batch": (
        lambda x: {"state": SLSTMState(*(s[:1] for s in x["state"]))},
        ValueError,
        r"state.h must have shape \(2, 3, 7\), got \(1, 3, 7\)",
    ),
    "state of a mixed batch": (
        lambda x: {"state": x["state"]._replace(m=x["state"].m[:1])},
        ValueError,
        r"state.m must have shape \(2, 3, 7\), got \(1, 3, 7\)",
    ),
    "state in bfloat16": (
        lambda x: {"state": x["state"]._replace(n=x["state"].n.bfloat16())},
        TypeError,
        "state.n must be one of torch.float32, got torch.bfloat16",
    ),
    "state in part": (lambda x: {"state": x["state"][:2]}, ValueError, "state must be an SLSTMState .* got 2 tensors"),
}


@pytest.mark.parametrize("op", [slstm_scan, slstm_step])
@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_in_a_sentence(change, error, message, op):
    gates, R, state = unpack(rounded(slstm_inputs(2, 5), torch.float32))
    good = {"gates": gates if op is slstm_scan else gates[:, 0], "R": R, "state": state}
    op(**good)
    with pytest.raises(error, match=message):
        op(**good | change(good))


@pytest.mark.parametrize("mask, error, message", BAD_STEP_MASKS.values(), ids=BAD_STEP_MASKS.keys())
def test_bad_masks_of_a_step_are_refused_in_a_sentence(mask, error, message):
    x = slstm_inputs(2, 1)
    with pytest.raises(error, match=message):
        slstm_step(x["gates"][:, 0], x["R"], mask=mask)


@pytest.mark.parametrize("B, options, error, message", BAD_SEQUENCES.values(), ids=BAD_SEQUENCES.keys())
def test_bad_sequences_are_refused_in_a_sentence(B, options, error, message):
    x = slstm_inputs(B, 5)
    with pytest.raises(error, match=message):
        slstm_scan(x["gates"], x["R"], **options)


def test_a_sequence_holds_a_token_at_least():
    with pytest.raises(ValueError, match=r"gates \[B T H 4 D\] must not have an empty axis, got .*\(2, 0, 3, 4, 7\)"):
        scan(slstm_inputs(2, 0))


def test_packed_sequences_start_from_a_state_each():
    with pytest.raises(ValueError, match=r"state.h must have shape \(2, 3, 7\), got \(1, 3, 7\)"):
        packed(scan, (2, 3))(slstm_inputs(1, 5))
