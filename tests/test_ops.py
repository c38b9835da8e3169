"""What holds for the mLSTM and the sLSTM alike: autocast, memory layouts, partial losses, and `torch.compile`."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import test_mlstm
import test_slstm
import torch
from cases import (
    PACKED,
    TOKENS,
    Inputs,
    Op,
    fresh,
    mlstm_inputs,
    outputs_and_grads,
    packed,
    rounded,
    slstm_inputs,
    stepwise,
    strided,
)
from numerics import assert_each, assert_exact
from torch._subclasses.fake_tensor import FakeTensorMode


class Family(NamedTuple):
    """The ops of a cell on a dict of inputs: over whole sequences, a step, and the definition."""

    inputs: Callable[..., Inputs]
    whole: Op
    step: Op
    recurrent: Op


MLSTM = Family(mlstm_inputs, partial(test_mlstm.chunkwise, chunk_size=16), test_mlstm.step, test_mlstm.recurrent)
SLSTM = Family(slstm_inputs, test_slstm.scan, test_slstm.step, test_slstm.recurrent)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.parametrize("cell", [MLSTM, SLSTM], ids=["mlstm", "slstm"]),
]


@pytest.mark.parametrize("steps", [False, True], ids=["whole", "steps"])
def test_autocast_does_not_reach_into_the_op(cell, steps):
    op = stepwise(cell.step) if steps else cell.whole
    x = rounded(cell.inputs(2, 33), torch.float32)

    def autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return op(x)

    actual, expected = outputs_and_grads(autocast, x), outputs_and_grads(op, x)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_autocast_does_not_reach_into_the_gradients(cell):
    x = rounded(cell.inputs(2, 33), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = outputs_and_grads(cell.whole, x)
    for name, expected in outputs_and_grads(cell.whole, x).items():
        assert torch.equal(actual[name], expected), name


def test_boundaries_may_be_made_in_inference_mode(cell):
    x = cell.inputs(1, sum(PACKED), rows=len(PACKED))
    h, state = packed(cell.whole)(x)
    with torch.inference_mode():
        h_inference, state_inference = packed(cell.whole)(x)
    for actual, expected in zip((h_inference, *state_inference), (h, *state), strict=True):
        assert_exact(actual, expected)


@pytest.mark.parametrize("layout", ["sparse", "reversed"])
def test_inputs_need_not_be_contiguous(cell, layout):
    x = cell.inputs(2, 33)
    for op in (cell.whole, stepwise(cell.step)):
        assert_each(assert_exact, outputs_and_grads(strided(op, layout), x), outputs_and_grads(op, x))


@pytest.mark.parametrize("steps", [False, True], ids=["whole", "steps"])
def test_padding_may_hold_anything(cell, steps):
    op = stepwise(cell.step) if steps else cell.whole
    mask = torch.rand(2, 33) > 0.3
    x = cell.inputs(2, 33)
    junk = {name: t.index_put((~mask,), torch.tensor(float("nan")).double()) for name, t in x.items() if name in TOKENS}
    (h, state), (h_junk, state_junk) = (op(inputs, mask=mask) for inputs in (x, x | junk))
    for actual, expected in zip((h_junk[mask], *state_junk), (h[mask], *state), strict=True):
        assert_exact(actual, expected)


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_fake_kernels_have_the_strides_of_the_real_ones(cell, layout):
    x = cell.inputs(2, 33)
    if layout == "permuted":
        x = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in x.items()}
    op = partial(cell.whole, mask=torch.rand(2, 33) > 0.3)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_h, fake_state = op({name: mode.from_tensor(t) for name, t in x.items()})
    h, state = op(x)
    assert [t.stride() for t in (fake_h, *fake_state)] == [t.stride() for t in (h, *state)]


@pytest.mark.parametrize("output", range(5), ids=["h", "first state", "second state", "third state", "fourth state"])
def test_a_loss_may_read_a_single_output(cell, output):
    mask = torch.rand(2, 70) > 0.3
    x = cell.inputs(2, 70)
    leaves = [t.requires_grad_() for t in x.values()]
    grads = []
    for op in (cell.whole, cell.recurrent):
        h, state = op(x, mask=mask)
        outputs = (h, *state)
        loss = outputs[output % len(outputs)].square().sum()
        grads.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    for name, actual, expected in zip(x, *grads, strict=True):
        assert_exact(actual, expected, name)


@pytest.mark.parametrize("how", ["plain", "masked", "packed"])
def test_the_compiled_op_is_the_eager_one(cell, how):
    torch._dynamo.reset()
    x = cell.inputs(1, sum(PACKED), rows=len(PACKED) if how == "packed" else 1)
    mask = torch.rand(1, sum(PACKED)) > 0.3
    op = {"plain": cell.whole, "masked": partial(cell.whole, mask=mask), "packed": packed(cell.whole)}[how]
    compiled = torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")
    assert_each(assert_exact, outputs_and_grads(compiled, x), outputs_and_grads(op, x))


def test_compiled_steps_are_eager_steps_and_compile_once(cell):
    torch._dynamo.reset()
    x = fresh(cell.inputs(2, 5))
    compiled = torch.compile(cell.step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        h, state = stepwise(compiled)(x)
    h_eager, state_eager = stepwise(cell.step)(x)
    for actual, expected in zip((h, *state), (h_eager, *state_eager), strict=True):
        assert_exact(actual, expected)
    torch._dynamo.reset()
    token = {name: t[:, 0] if name in TOKENS else t for name, t in cell.inputs(2, 1).items()}
    assert_each(assert_exact, outputs_and_grads(compiled, token), outputs_and_grads(cell.step, token))
