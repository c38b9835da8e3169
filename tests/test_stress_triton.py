"""Numbers at the edges of their range through the Triton kernels, on a GPU or (float32, float16) in their interpreter.

The cases, and what is right, are those of `test_stress`.
"""

from functools import partial
from typing import Any

import pytest
import test_mlstm
import test_mlstm_triton
import test_slstm
import test_slstm_triton
import test_stress
import torch
from cases import WEIGHTS, Inputs, Op, stepwise
from numerics import assert_each
from test_stress import CELLS, SIZES, Cell, assert_number, assert_ways_right, double, ready, results
from torch import Tensor
from torture import tried
from triton_device import DEVICE, GPU, needs_somewhere_to_run

from modeling_xlstm.checks import state_dtype


pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # of the interpreter, about what is masked afterwards
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    needs_somewhere_to_run,
]

# The interpreter has no products in bfloat16.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float32, torch.float16)
# The interpreter is slow.
STATES, LENGTH, MANY = (test_stress.STATES, 24, 4) if GPU else (test_stress.STATES[:1], 8, 1)


def on_device(op: Op) -> Op:
    """An op where kernels are tested, for inputs and results on the CPU."""

    def run(x: Inputs, **options: Any) -> tuple[Tensor, Any]:
        h, state = op({name: t.to(DEVICE) for name, t in x.items()}, **options)
        return h.cpu(), type(state)(*(t.cpu() for t in state))

    return run


def through_triton(cell: Cell) -> Cell:
    """The cell with its ops through Triton. Baselines have products in the dtype of the inputs too."""
    if cell.input_gate is None:
        whole, step, plain = test_slstm.scan, test_slstm.step, test_slstm_triton.plain
    else:
        whole, step, plain = (
            partial(op, input_gate=cell.input_gate)
            for op in (test_mlstm.chunkwise, test_mlstm.step, test_mlstm_triton.plain)
        )
    whole, step = (on_device(partial(op, backend="triton")) for op in (whole, step))
    return cell._replace(whole=whole, step=step, others=(*cell.others, on_device(plain)))


def some(x: Inputs) -> Inputs:
    """Cases that the interpreter has time for: of each course of a gate a few."""
    return x if GPU else {name: t if name in WEIGHTS else t[::5] for name, t in x.items()}


TRITON = {name: through_triton(cell) for name, cell in CELLS.items()}
# Gradients of the sLSTM come from stabilisers that are kept in float32, which shows where gates are larger.
LARGE = [(name, size) for name in TRITON for size in list(SIZES)[: 1 if name == "slstm" else MANY]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRITON)
def test_gates_of_any_size_give_numbers_from_any_state(name, dtype):
    cell, largest, ends = TRITON[name], torch.finfo(dtype).max, dtype != torch.float16
    for size in (largest, 300, 40)[:MANY]:
        x = some(cell.cases((size, size), ties=True, T=LENGTH, start=(*STATES[1:], "lowest", "highest")))
        x = ready(cell, x, dtype)
        oracle = results(cell.definition, double(x), ends)
        for op in (cell.whole, stepwise(cell.step)):
            assert_each(assert_number, results(op, x, ends), oracle)
            tried("numerical cases", len(x["n"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, size", LARGE)
def test_large_gates_are_right_from_any_state(name, size, dtype):
    cell = TRITON[name]
    x = some(cell.cases(SIZES[size], ties=False, T=LENGTH, start=STATES))
    x = ready(cell, x, dtype, state_dtype(dtype))
    assert_ways_right(cell, x, cell.whole, stepwise(cell.step), ends=dtype == torch.float32)
