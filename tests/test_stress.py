"""Numbers at the edges of their range, and long sequences: all that comes out are numbers, and the right ones.

Each row of a batch is a case: how its input gates go, how its forget gates go, and the state that it starts from; one
call tries all of them. What does not fit in float32 together, such as a product of q, k and v, is not tried.

Results are compared with the definition in float64, each row in units of its own largest number. Baselines are the
definition in the dtype of the case and, of the mLSTM, the parallel form of the paper.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import test_mlstm
import test_slstm
import torch
import torch.nn.functional as F
from cases import (
    MLSTM_TOKENS,
    TOKENS,
    Inputs,
    Op,
    fresh,
    in_two,
    mlstm_inputs,
    outputs_and_grads,
    packed,
    padded,
    padding_mask,
    rounded,
    slstm_inputs,
    stepwise,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import KINDS, gradients, random_ids, states, tiny_model
from numerics import assert_each, assert_exact, assert_matches, least_exact
from torch import Tensor, nn
from torture import tried, tries

from benchmarks import stress
from modeling_xlstm import XLSTMCache
from modeling_xlstm.checks import state_dtype
from modeling_xlstm.fused import soft_cap
from modeling_xlstm.mlstm import MLSTMState


pytestmark = pytest.mark.usefixtures("poisoned_memory")

Results = dict[str, Tensor]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = {"40": (40.0, 30.0), "300": (300.0, 300.0), "80": (80.0, 80.0), "10000": (1e4, 1e4)}  # input and forget gates
COURSES = ("zero", "high", "low", "flips", "any", "shut")  # of a gate over time
STATES = ("fresh", "ordinary", "low", "high", "large")
SMALLEST = 1e-290  # what is measured in float64
LOGARITHMS = ("gradient of igate", "gradient of fgate", "gradient of gates", "gradient of m")


def gates(course: str, size: float, T: int, generator: torch.Generator) -> Tensor:
    """Pre-activations of a gate over T tokens."""
    t, zero = torch.arange(T), torch.zeros(T, dtype=torch.float64)
    if course == "any":
        levels = torch.tensor([0, 1, -1, size / 2, -size / 2, size, -size], dtype=torch.float64)
        return levels[torch.randint(0, len(levels), (T,), generator=generator)]
    return {
        "zero": zero,
        "high": zero + size,
        "low": zero - size,
        "flips": size * (1 - 2.0 * (t % 2)).double(),
        "shut": zero.masked_fill(t % 3 == 1, -math.inf),
    }[course]


def noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """x with a little on top, so that no stabiliser is a tie."""
    return x + torch.randn(x.shape, generator=generator, dtype=x.dtype)


def set_state(x: Inputs, row: int, state: str) -> None:
    """The state of one row; c and n, or C and n, are the memory."""
    memory = [name for name in "Ccn" if name in x]
    if state == "fresh":
        for name in (*memory, "m", *({"h"} & x.keys())):
            x[name][row] = 0
    elif state == "large":
        for name in memory:
            x[name][row] *= 1e30
    elif state != "ordinary":
        x["m"][row] += {"low": -300.0, "high": 300.0, "lowest": -math.inf, "highest": math.inf}[state]


class Cell(NamedTuple):
    """Cases with gates of these sizes, and the ops that they are for."""

    cases: Callable[..., Inputs]
    whole: Op
    step: Op
    definition: Op
    others: tuple[Op, ...] = ()  # baselines beside the definition
    input_gate: str | None = None

    def bound(self, **options: Any) -> "Cell":
        """The cell with options of its ops."""
        whole, step, definition, *others = (
            partial(op, **options) for op in (self.whole, self.step, self.definition, *self.others)
        )
        return Cell(self.cases, whole, step, definition, tuple(others), options.get("input_gate", self.input_gate))


def mlstm_cases(sizes: tuple[float, float], *, ties: bool, T: int = 24, start: tuple[str, ...] = STATES) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rows = list(product(COURSES, COURSES, start))
    x = mlstm_inputs(len(rows), T, 1, 5, 4, aligned=True)
    for name, size, i in (("igate", sizes[0], 0), ("fgate", sizes[1], 1)):
        courses = torch.stack([gates(row[i], size, T, generator) for row in rows])[..., None]
        x[name] = courses if ties else noise(courses, generator)
    for row, (*_, state) in enumerate(rows):
        set_state(x, row, state)
    return x


def slstm_cases(sizes: tuple[float, float], *, ties: bool, T: int = 24, start: tuple[str, ...] = STATES) -> Inputs:
    """Gates z and o are of any size too; input gates may not be shut."""
    generator = torch.Generator().manual_seed(0)
    rows = list(product(COURSES[:-1], COURSES, start))
    x = slstm_inputs(len(rows), T, 1, 3)
    for gate, size in enumerate((*sizes, sizes[0], sizes[0])):
        courses = torch.stack([gates(row[gate] if gate < 2 else "any", size, T, generator) for row in rows])
        courses = courses[..., None, None].expand(-1, -1, 1, 3)
        x["gates"][:, :, :, gate] = courses if ties else noise(courses, generator)
    for row, (*_, state) in enumerate(rows):
        set_state(x, row, state)
    return x


def parallel(
    x: Inputs, input_gate: str = "exp", eps: float = 1e-6, larger: Callable = torch.maximum
) -> tuple[Tensor, MLSTMState]:
    """The parallel form of the paper, in the dtype of the state. `larger` is of the normaliser and its floor."""
    C, n, m = x["C"], x["n"], x["m"]
    q, k, v, igate, fgate = (x[name].to(C.dtype).transpose(1, 2) for name in MLSTM_TOKENS)
    logf, T = F.logsigmoid(fgate), q.shape[2]
    closed = torch.isneginf(igate) & torch.isneginf(fgate)
    k, igate = k.masked_fill(closed[..., None], 0.0), igate.masked_fill(closed, 0.0)
    igate = F.logsigmoid(igate) if input_gate == "sigmoid" else igate
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    D = logf[..., None].expand(*logf.shape, T).masked_fill(~causal.tril(-1), 0.0).cumsum(-2) + igate[..., None, :]
    D, through = D.masked_fill(~causal, -math.inf), logf.cumsum(-1)
    m_rows = torch.zeros_like(through)
    if input_gate == "exp":
        through = through + m[..., None]
        m_rows = torch.maximum(through, D.max(-1)[0])
    W, g = (D - m_rows[..., None]).exp(), (through - m_rows).exp()
    q = q * q.shape[-1] ** -0.5
    S = (q @ k.mT) * W
    normaliser = S.sum(-1) + g * (q * n[..., None, :]).sum(-1)
    denominator = larger(normaliser.abs(), (-m_rows).clamp(-80, 80).exp()) + eps
    h = (S @ v + g[..., None] * (q @ C)) / denominator[..., None]
    k = k * W[..., -1, :, None]
    C, n = g[..., -1, None, None] * C + k.mT @ v, g[..., -1, None] * n + k.sum(-2)
    return h.transpose(1, 2).to(x["v"].dtype), MLSTMState(C, n, m_rows[..., -1])


MLSTM = Cell(
    mlstm_cases, partial(test_mlstm.chunkwise, chunk_size=8), test_mlstm.step, test_mlstm.recurrent, (parallel,)
)
SLSTM = Cell(slstm_cases, test_slstm.scan, test_slstm.step, test_slstm.recurrent)
CELLS = {
    "mlstm": MLSTM.bound(input_gate="exp"),
    "mlstm sigmoid": MLSTM.bound(input_gate="sigmoid"),
    "slstm": SLSTM,
}


def ready(cell: Cell, x: Inputs, dtype: torch.dtype, gate_dtype: torch.dtype | None = None) -> Inputs:
    """Cases in a dtype, gates in another one if given; m is no input of a sigmoid gate."""
    largest = torch.finfo(state_dtype(dtype)).max
    given = rounded(x | {"m": x["m"].clamp(-largest, largest)}, dtype)
    if gate_dtype is not None:
        given |= {name: x[name].to(gate_dtype) for name in ("igate", "fgate") if name in x}
    if cell.input_gate == "sigmoid":
        del given["m"]
    return given


def results(op: Op, x: Inputs, ends: bool = True) -> Results:
    """Outputs and gradients, with an m of 0 where none is given. Without `ends` from a loss on h alone: where the
    stabiliser is a tie, the final state has more than one gradient."""

    def run(x: Inputs):
        m = {} if "m" in x else {"m": torch.zeros_like(x["n"][..., 0])}
        h, state = op(x | m)
        return h, state if ends else type(state)(*(t.detach() for t in state))

    return outputs_and_grads(run, x)


def double(x: Inputs) -> Inputs:
    return {name: t.double() for name, t in x.items()}


def assert_number(actual: Tensor, oracle: Tensor, name: str) -> None:
    """Not NaN, and infinite only where the result is beyond the range of the dtype."""
    assert actual.shape == oracle.shape
    assert not actual.isnan().any(), f"{name} is NaN in row {actual.isnan().nonzero()[0].tolist()}"
    wrong = actual.isinf() & (oracle.abs() <= torch.finfo(actual.dtype).max)
    assert not wrong.any(), f"{name} is infinite at {wrong.nonzero()[0].tolist()}"


def units(x: Inputs, oracle: Results) -> Results:
    """What each row of each result is measured by: its largest number, but for gradients that are left of sums which
    cancel. These are of logarithms, and have products of an input and its gradient, or of what is multiplied: 1 at
    least, as inputs are of this size. Of m, a logarithm itself, an exponential is taken."""

    def largest(t: Tensor) -> Tensor:
        return t.abs().flatten(1).amax(1).double().clamp(min=SMALLEST)

    grads = {name: t for name in ("q", "k", "v", "C", "c", "n") if (t := oracle.get(f"gradient of {name}")) is not None}
    terms = torch.stack([largest(x[name].double() * t) for name, t in grads.items()]).amax(0)
    result = {}
    for name, t in oracle.items():
        unit, of = largest(t), name.removeprefix("gradient of ")
        if name in LOGARITHMS or name == "gradient of h":
            unit = torch.maximum(unit, terms.clamp(min=1))
        elif name in ("gradient of q", "gradient of k"):
            unit = torch.maximum(unit, (terms / largest(x[of])).clamp(min=1))
        elif name == "gradient of R":
            unit = torch.maximum(unit.amax(), terms.clamp(min=1).amax()).expand(len(t))
        elif name == "final m":
            unit = unit.clamp(min=1)
        result[name] = unit.view(-1, *[1] * (t.dim() - 1))
    return result


def together(results: Results) -> Results:
    """Gradients of logarithms as one tensor: the few of m alone are no measure of an error."""
    logarithms = [results[name].flatten() for name in LOGARITHMS if name in results]
    return {name: t for name, t in results.items() if name not in LOGARITHMS} | {
        "gradients of logarithms": torch.cat(logarithms)
    }


def assert_right(x: Inputs, oracle: Results, actual: Results, *baselines: Results) -> None:
    """In float64 exactly, else within the budget of numerics.py."""
    assert_each(assert_number, actual, oracle)
    by = units(x, oracle)
    expected, measured, *allowed = (
        together({name: t.double() / by[name] for name, t in result.items()}) for result in (oracle, actual, *baselines)
    )
    if baselines:
        assert_each(assert_matches, measured, expected, least_exact(expected, *allowed))
    else:
        assert_each(assert_exact, measured, expected)


def assert_ways_right(cell: Cell, x: Inputs, *ways: Op, ends: bool) -> None:
    """Each way is right, by the definition of the cell and, but in float64, its baselines."""
    oracle, exact = results(cell.definition, double(x), ends), x["n"].dtype == torch.float64
    baselines = [] if exact else [results(op, x, ends) for op in (cell.definition, *cell.others)]
    for way in ways:
        assert_right(x, oracle, results(way, x, ends), *baselines)
        tried("numerical cases", len(x["n"]))


# gates and states


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_gates_of_any_size_give_numbers_from_any_state(name, dtype):
    """Gates up to the largest number that there is, as are stabilisers. What cancels in a gradient from a large memory
    would not fit in float16."""
    cell, largest, ends = CELLS[name], torch.finfo(dtype).max, dtype != torch.float16
    for size in (largest, 300, 40, 80, 1e4)[: tries(2, 5)]:
        x = ready(cell, cell.cases((size, size), ties=True, start=(*STATES, "lowest", "highest")), dtype)
        oracle = results(cell.definition, double(x), ends)
        for op in (cell.whole, stepwise(cell.step)):
            assert_each(assert_number, results(op, x, ends), oracle)
            tried("numerical cases", len(x["n"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", list(SIZES)[: tries(2, 4)])
@pytest.mark.parametrize("ties", [False, True], ids=["noise", "ties"])
@pytest.mark.parametrize("name", CELLS)
def test_large_gates_are_right_from_any_state(name, ties, size, dtype):
    """Ties have no eps, by which the stabiliser would matter, and gates in the dtype of all else. There is no large
    memory where it would make ties of a floor that does not follow the stabiliser, or all of the gradient of R."""
    cell = CELLS[name] if name == "slstm" else CELLS[name].bound(eps=0.0 if ties else 1e-6)
    ends = not ties and dtype in (torch.float64, torch.float32)  # noise is rounded off in others
    start = STATES if ties == (name == "slstm") else STATES[:-1]
    gate_dtype = None if ties else state_dtype(dtype)
    x = ready(cell, cell.cases(SIZES[size], ties=ties, start=start), dtype, gate_dtype)
    assert_ways_right(cell, x, cell.whole, stepwise(cell.step), ends=ends)


def in_one_row(op: Op) -> Op:
    """Sequences of one length by an op that is given their tokens one after the other, in a batch of 1."""

    def run(x: Inputs):
        B, T = next(x[name] for name in TOKENS if name in x).shape[:2]
        h, state = op({name: t.flatten(0, 1)[None] if name in TOKENS else t for name, t in x.items()})
        return h[0].unflatten(0, (B, T)), state

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_large_gates_are_right_in_parts_packed_and_padded(name, dtype):
    cell, T = CELLS[name] if name == "slstm" else CELLS[name].bound(eps=0.0), 10
    x = ready(cell, cell.cases(SIZES["300"], ties=True, T=T, start=("fresh", "high")), dtype)
    lengths = [T] * len(x["n"])
    masks = {side: padding_mask(side, lengths, T + 6) for side in ("left", "right", "scattered")}
    ways = (
        in_two(cell.whole, 7),
        in_one_row(packed(cell.whole, lengths)),
        *(in_one_row(padded(cell.whole, mask)) for mask in masks.values()),
        in_one_row(padded(stepwise(cell.step), masks["scattered"])),
    )
    assert_ways_right(cell, x, *ways, ends=False)


def capped(op: Op, cap: float) -> Op:
    """Gates through a soft cap by its formula."""
    return lambda x: op(x | {name: cap * torch.tanh(x[name] / cap) for name in ("igate", "fgate")})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", [0.01, 15.0, 1000.0])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_soft_caps_keep_gates_of_any_size_right(input_gate, cap, dtype):
    """Gates are in float32 at least: what a cap makes of them is rounded to their dtype."""
    cell = MLSTM.bound(input_gate=input_gate, eps=0.0)
    given, others = cell.bound(gate_soft_cap=cap), tuple(capped(op, cap) for op in cell.others)
    cell = cell._replace(definition=capped(cell.definition, cap), others=others)
    for size in (1e4, torch.finfo(state_dtype(dtype)).max):
        x = cell.cases((size, size), ties=True, T=10, start=("fresh", "ordinary"))
        x = ready(cell, x, dtype, state_dtype(dtype))
        assert_ways_right(cell, x, given.whole, stepwise(given.step), ends=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", [1e-30, 0.01, 30.0, 1e4, 1e30])
def test_a_soft_cap_of_any_size_is_right_with_its_gradient(cap, dtype):
    """The baseline has its slope from the value, which is all that is kept."""
    largest, wide = torch.finfo(dtype).max, state_dtype(dtype)
    powers, bent = 10.0 ** torch.arange(-44, 39, dtype=torch.float64), cap * torch.linspace(-5, 5, 1000)
    x = torch.cat((powers, -powers, bent, torch.tensor([0.0, largest, -largest]))).clamp(-largest, largest).to(dtype)

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(x / cap) * cap
        return y, 1 - (y.double() / cap).square()

    def in_units(y: Tensor, slope: Tensor) -> Results:
        return {"value": y.double() / cap, "slope": slope.double()}

    leaf = x.clone().requires_grad_()
    y = soft_cap(leaf, cap)
    actual, oracle = in_units(y.detach(), *torch.autograd.grad(y.sum(), leaf)), in_units(*formula(x.double()))
    if dtype == torch.float64:
        assert_each(assert_exact, actual, oracle)
    else:
        assert_each(assert_matches, actual, oracle, in_units(*(t.to(dtype) for t in formula(x.to(wide)))))
    tried("numerical cases", len(x))


# queries, keys and values


def scaled_cases(dtype: torch.dtype) -> Inputs:
    """Some of q, k and v, as large as they may be together, or so small that they hardly differ from zero."""
    info, range_of_sums = torch.finfo(dtype), torch.finfo(state_dtype(dtype)).max / 2**14
    rows = []
    for names in ("q", "k", "v", "qk", "qv", "kv", "qkv"):
        largest = min(info.max / 4, range_of_sums ** (1 / len(names)))
        smallest = info.tiny * info.eps  # of one digit
        rows += [(names, size) for size in (0.0, smallest, 100 * smallest, info.tiny, 1e-3 * largest, largest)]
    x = fresh(mlstm_inputs(len(rows), 12, 1, 5, 4, aligned=True))
    for row, (names, size) in enumerate(rows):
        for name in names:
            x[name][row] *= size / x[name][row].abs().max()
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_queries_keys_and_values_of_any_size_are_right(input_gate, dtype):
    """In float16 without a loss on the memory, as gradients from a large one would not fit."""
    cell = MLSTM.bound(input_gate=input_gate)
    x = ready(cell, scaled_cases(dtype), dtype, state_dtype(dtype))
    assert_ways_right(cell, x, cell.whole, stepwise(cell.step), ends=dtype != torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_of_zeros_reads_zeros_without_eps(dtype):
    """However large the stabiliser is, of which exp(-m) would be zero."""
    cell, x = MLSTM.bound(eps=0.0), mlstm_inputs(5, 10)
    sizes = torch.tensor([-1e4, -300, 0, 300, 1e4])
    x["m"], x["igate"], x["q"][:, ::2] = x["m"] + sizes[:, None], x["igate"] + sizes[:, None, None], 0
    for op in (cell.whole, stepwise(cell.step)):
        h, _ = op(ready(cell, x, dtype))
        assert (h[:, ::2] == 0).all() and h.isfinite().all()
        tried("numerical cases", len(h))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_a_memory_that_fades_beyond_all_range_is_empty(input_gate, dtype):
    """Forget gates are as far below zero as there are numbers, and nothing enters: no stabiliser is minus infinity."""
    cell, x = MLSTM.bound(input_gate=input_gate, eps=0.0), mlstm_inputs(2, 21, regime="huge")
    x["igate"][:, 5:12], x["fgate"][:, 5:12] = -math.inf, torch.finfo(dtype).min
    assert_ways_right(cell, ready(cell, x, dtype), cell.whole, stepwise(cell.step), ends=False)


# where the normaliser meets its floor


def at_the_floor(T: int) -> tuple[Inputs, Tensor]:
    """Last rows of T tokens where |q n| is exp(-m), a little more or a little less, of both signs; and which: 0, 1, -1.
    Nothing is forgotten: n is the sum of keys. With an m of 0 and a T that is a power of 2 all numbers are exact."""
    rows = list(product((0.0, -3.0, 3.0, -70.0, 70.0), (1.0, -1.0), (0, 1, -1)))
    m, sign, side = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    x, floor = fresh(mlstm_inputs(len(rows), T, 1, 4, 3)), torch.exp(-m)
    x["k"][..., 1:], x["k"][..., 0] = 0, 1
    x["m"], x["igate"], x["fgate"] = m[:, None], m[:, None, None].expand(-1, T, 1), torch.full_like(x["fgate"], 300)
    x["q"] *= floor.view(-1, 1, 1, 1)
    x["q"][:, -1, 0, 0] = sign * (1 + side / 32) * 2 * floor / T
    return x, side


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 8])
def test_the_gradient_at_the_floor_of_the_normaliser_is_one_of_two(T, dtype):
    """Or between them, where both are right: |q n| and exp(-m) are the same number."""
    x, side = at_the_floor(T)
    x = ready(MLSTM, x, dtype)

    def from_last(op: Op, x: Inputs) -> Results:
        def last(x: Inputs) -> tuple[Tensor, Any]:
            h, state = op(x)
            return h[:, -1:], state

        grads = results(last, x, ends=False)
        return {name: grads[name] for name in ("h", *(f"gradient of {name}" for name in MLSTM_TOKENS))}

    above, below = (
        from_last(partial(parallel, eps=0.0, larger=lambda *both, i=i: both[i]), double(x)) for i in range(2)
    )

    def distances(result: Results) -> Results:
        """From what lies between the two, in units of the row."""
        by, outside = units(x, above), {}
        for name, t in result.items():
            row = side.view(-1, *[1] * (t.dim() - 1))
            ends = torch.where(row < 0, below[name], above[name]), torch.where(row > 0, above[name], below[name])
            between = t.double().clamp(torch.minimum(*ends), torch.maximum(*ends))
            outside[name] = (t.double() - between) / by[name]
        return outside

    cell = MLSTM.bound(eps=0.0)
    nothing = {name: torch.zeros_like(t) for name, t in distances(above).items()}
    baselines = [distances(from_last(op, x)) for op in (cell.definition, *cell.others)]
    for op in (partial(cell.whole, chunk_size=2), cell.whole, stepwise(cell.step)):
        actual = distances(from_last(op, x))
        if dtype == torch.float64:
            assert_each(assert_exact, actual, nothing)
        else:
            assert_each(
                assert_matches,
                together(actual),
                together(nothing),
                least_exact(together(nothing), *map(together, baselines)),
            )
        tried("numerical cases", len(side))


# any of these together

LEVELS = (
    0.0, 1e-40, -1e-40, 1.0, -1.0, 40.0, -40.0, 89.0, -104.0, 300.0, -300.0, 1e4, -1e4, 1e30, -1e30, math.inf, -math.inf
)  # fmt: skip
WAYS = ("whole", "steps", "in two", "packed", "left", "right", "scattered")


def drawn_cases(
    name: str, dtype: torch.dtype, B: int, T: int, levels: Sequence[Sequence[float]], scales: Sequence[float], seed: int
) -> Inputs:
    """Rows whose gates are any of the levels of each gate; scales are of q, k and v."""
    generator, largest = torch.Generator().manual_seed(seed), torch.finfo(dtype).max

    def course(of: Sequence[float]) -> Tensor:
        choices = torch.tensor(of, dtype=torch.float64).clamp(-largest, largest)
        return choices[torch.randint(0, len(of), (B, T), generator=generator)]

    if name == "slstm":
        x = slstm_inputs(B, T, 1, 3, seed=seed)
        for gate, of in enumerate(levels):
            x["gates"][:, :, 0, gate] = course(of)[..., None]
        return x
    x = mlstm_inputs(B, T, 1, 5, 4, aligned=True, seed=seed)
    for token, scale in zip("qkv", scales, strict=True):
        x[token] = x[token] * scale
    return x | {"igate": course(levels[0])[..., None], "fgate": course(levels[1])[..., None]}


def way_of(cell: Cell, way: str, B: int, T: int) -> Op:
    if way in ("whole", "steps"):
        return cell.whole if way == "whole" else stepwise(cell.step)
    if way == "in two":
        return in_two(cell.whole, T // 2) if T > 1 else cell.whole
    return in_one_row(
        packed(cell.whole, [T] * B) if way == "packed" else padded(cell.whole, padding_mask(way, [T] * B, T + 3))
    )


some_levels = st.lists(st.sampled_from(LEVELS), min_size=1, max_size=4)


@given(
    name=st.sampled_from(list(CELLS)),
    dtype=st.sampled_from(DTYPES),
    B=st.integers(1, 3),
    T=st.integers(1, 20),
    levels=st.tuples(*[some_levels] * 4),
    scales=st.tuples(*[st.sampled_from((1.0, 1e-3, 1e-40, 0.0))] * 3),
    start=st.sampled_from((*STATES, "lowest", "highest")),
    way=st.sampled_from(WAYS),
    cap=st.sampled_from((None, 0.01, 15.0, 1e3)),
    chunk_size=st.integers(1, 8),
    seed=st.integers(0, 9),
)
@settings(
    max_examples=tries(500, 3000),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_any_gates_states_and_ways_together_give_numbers(
    name, dtype, B, T, levels, scales, start, way, cap, chunk_size, seed
):
    """In float64 the right ones, unless gates are so large that their differences are rounded off."""
    x, cell, definition = drawn_cases(name, dtype, B, T, levels, scales, seed), CELLS[name], CELLS[name].definition
    set_state(x, slice(None), start)
    if name != "slstm":
        cell = cell._replace(whole=partial(cell.whole, chunk_size=chunk_size))
        if cap is not None:
            cell, definition = cell.bound(gate_soft_cap=cap)._replace(definition=definition), capped(definition, cap)
    x, ends = ready(cell, x, dtype), dtype != torch.float16
    oracle, actual = results(definition, double(x), ends), results(way_of(cell, way, B, T), x, ends)
    assert_each(assert_number, actual, oracle)
    exact = dtype == torch.float64 and start not in ("lowest", "highest")
    if exact and all(abs(level) <= 1e4 for of in levels for level in of):
        for key in ("h", *(key for key in oracle if key.startswith("final"))):
            assert_exact(actual[key], oracle[key], key)
    tried("numerical cases", B)


# models


def extreme_model(kind: str, dtype: torch.dtype, size: float, **fields: Any) -> nn.Module:
    """A model without soft caps whose gates are around plus or minus `size`."""
    model = tiny_model(kind, gate_soft_cap=None, output_logit_soft_cap=None, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate_proj.bias", "gate_bias")):
                parameter.copy_(size * parameter.sign())
    return model.to(dtype)


def padded_ids() -> tuple[Tensor, Tensor]:
    """Token ids, and a mask by which some are padding."""
    ids, mask = random_ids(4, 24), torch.ones(4, 24, dtype=torch.long)
    mask[1, :9] = mask[2, :20] = 0
    return ids, mask


def set_memories(cache: XLSTMCache) -> None:
    """Memories of 1e30, and stabilisers of -300 and 300 from row to row."""
    for name, t in states(cache).items():
        if name.endswith((".C", ".c", ".n")):
            t *= 1e30
        elif name.endswith(".m"):
            t[::2], t[1::2] = -300, 300


@torch.no_grad()
def read_on(model: Any, *, at_once: bool) -> Results:
    """Logits of 8 tokens behind others, between which memories become extreme, and the states then."""
    (ids, mask), cache, logits, T = padded_ids(), XLSTMCache(model.config), [], 8
    model(ids[:, :-T], attention_mask=mask[:, :-T], past_key_values=cache)
    set_memories(cache)
    for new in ids[:, -T:].split(T if at_once else 1, 1):
        seen = cache.get_seq_length() + new.shape[1]
        logits.append(model(new, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    return {"logits": torch.cat(logits, 1), **states(cache)}


def training(model: nn.Module) -> Results:
    """The loss, and gradients of all parameters."""
    ids, mask = padded_ids()
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_models_with_extreme_gates_and_memories_are_right(kind, dtype):
    """Tokens at once as one by one. Some normaliser always cancels, which magnifies rounding: so of errors is compared
    what is typical."""
    for size in (40.0, 300.0):
        model = extreme_model(kind, dtype, size)
        oracle = read_on(copy.deepcopy(model).double(), at_once=False)
        whole, steps = read_on(model, at_once=True), read_on(model, at_once=False)
        for result in (whole, steps):
            assert_each(assert_number, result, oracle)
        if dtype == torch.float64:
            assert_each(assert_exact, whole, oracle)
        else:
            one, other = ((x["logits"].double() - oracle["logits"]).abs().median() for x in (whole, steps))
            assert one <= 2 * other and other <= 2 * one
        tried("numerical cases", len(oracle["logits"]))


@pytest.mark.parametrize("kind", KINDS)
def test_models_with_extreme_gates_have_numbers_for_gradients(kind):
    """In float64 the right ones, which are those of chunks of one token."""
    oracle = training(extreme_model(kind, torch.float64, 300.0, chunk_size=1))
    for dtype in DTYPES:
        actual = training(extreme_model(kind, dtype, 300.0))
        assert_each(assert_number, actual, oracle)
        if dtype == torch.float64:
            assert_each(assert_exact, actual, oracle)
        tried("numerical cases")


# long sequences


@pytest.mark.parametrize("name", stress.CELLS)
def test_errors_over_a_long_sequence_are_those_of_single_steps(name):
    """And do not grow with the length, but for what is never forgotten, once all else has been."""
    tokens = tries(20_000, 1_000_000)
    of_op, of_definition = stress.measure(stress.CELLS[name], tokens)
    for op, definition in zip(of_op, of_definition, strict=True):
        for memory, error, allowed in zip(stress.MEMORIES, op, definition, strict=True):
            assert 0 < error.largest <= 4 * allowed.largest, memory
            assert error.rms <= 2 * allowed.rms, memory
    for i, half_life in enumerate((20, 10_000)):
        settled = [
            part[i].rms for (start, _), part in zip(stress.parts(tokens), of_op, strict=True) if start >= half_life
        ]
        assert all(rms <= 2 * settled[0] for rms in settled)
    tried("tokens read in a row", tokens)


@pytest.mark.parametrize("cell", [MLSTM, SLSTM], ids=["mlstm", "slstm"])
def test_errors_of_gradients_do_not_grow_over_a_long_sequence(cell):
    """From the last part to the first of each input; what is of states is few numbers, which are compared together."""
    T, parts = tries(500, 20_000), 4
    x = mlstm_inputs(1, T, 2, 5, 4, aligned=True) if cell is MLSTM else slstm_inputs(1, T, 2, 3)
    forget = x["fgate"] if cell is MLSTM else x["gates"][:, :, :, 1]
    forget += 4
    x = rounded(x, torch.float32)
    oracle = results(cell.definition, double(x))
    compared = results(cell.whole, x), oracle, results(cell.definition, x)
    over_time = [name for name in oracle if name == "h" or name.removeprefix("gradient of ") in TOKENS]
    for name in over_time:
        for i, piece in enumerate(zip(*(result[name].chunk(parts, 1) for result in compared), strict=True)):
            assert_matches(*piece, f"part {i} of {name}")
    largest = {name: t.abs().max() for name, t in oracle.items() if name not in over_time}
    rest = (torch.cat([(result[name].double() / by).flatten() for name, by in largest.items()]) for result in compared)
    assert_matches(*rest, "states, their gradients and those of weights")
    tried("tokens differentiated in a row", T)


def test_the_table_and_picture_of_errors_are_made_by_a_command(tmp_path, capsys):
    stress.main(["--tokens", "1100", "--picture", str(tmp_path / "errors.svg")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(stress.CELLS) * len(stress.MEMORIES) * 2
    assert lines[2].startswith("| mLSTM, 20 tokens | 0 to 1,000 | ") and lines[3].split(" | ")[1] == "1,000 to 1,100"
    assert "sLSTM, for ever" in (tmp_path / "errors.svg").read_text()
