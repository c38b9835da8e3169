"""What rounding adds up to over a long text: `python -m benchmarks.stress [--tokens N] [--picture FILE]`.

The ops read one sequence in float32, a piece at a time, each from the state that the one before left. Printed is how
far h, whose size is about 1, is from the definition in float64, over parts of the sequence that each are ten times as
long as the one before: of the op, and of the definition in float32, a loop of steps. There are three memories: a head
that forgets half of what it has in about 20 tokens, one in about 10,000, and one that keeps all of it for ever.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.command import command_line, integer, new_file, run, show
from modeling_xlstm.mlstm import MLSTMState, mlstm_chunkwise
from modeling_xlstm.mlstm_torch import mlstm_recurrent
from modeling_xlstm.slstm import SLSTMState, slstm_scan
from modeling_xlstm.slstm_torch import slstm_recurrent


EXAMPLES = """examples:
  python -m benchmarks stress --tokens 20000 --picture error.svg
"""
# Half-life: mean forget gate of a head, before its sigmoid.
MEMORIES = {"20 tokens": 3.4, "10,000 tokens": 9.6, "for ever": 300.0}
D = 8  # channels of a head
FIRST = 1000  # tokens of the first part
PIECE = 10_000  # tokens at once


class Error(NamedTuple):
    """Of h of one head over one part."""

    rms: float
    largest: float


Op = Callable[[list[Tensor], Any], tuple[Tensor, Any]]


class Cell(NamedTuple):
    """Inputs of one piece, a new state, and two ways from them to h and the next state."""

    inputs: Callable[[int, torch.Generator], list[Tensor]]
    state: Callable[[torch.dtype], Any]
    op: Op
    definition: Op


def _fgates(T: int, generator: torch.Generator, *dims: int) -> Tensor:
    means = torch.tensor(list(MEMORIES.values()), dtype=torch.float64).view(-1, *[1] * len(dims))
    return means + torch.randn(1, T, len(MEMORIES), *dims, generator=generator, dtype=torch.float64)


def _mlstm_inputs(T: int, generator: torch.Generator) -> list[Tensor]:
    """With normalisers that do not cancel, which would show the rounding of anything."""
    q, k, v = torch.randn(3, 1, T, len(MEMORIES), D, generator=generator, dtype=torch.float64)
    igate = torch.randn(1, T, len(MEMORIES), generator=generator, dtype=torch.float64)
    return [q.abs(), k.abs(), 1 + v, igate, _fgates(T, generator)]


def _slstm_inputs(T: int, generator: torch.Generator) -> list[Tensor]:
    H = len(MEMORIES)
    R = torch.randn(H, 4, D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / D**0.5
    igate, zgate, ogate = torch.randn(3, 1, T, H, D, generator=generator, dtype=torch.float64)
    return [torch.stack((igate, _fgates(T, generator, D), 1 + zgate, ogate), 3), R]


def _mlstm_state(dtype: torch.dtype) -> MLSTMState:
    H = len(MEMORIES)
    return MLSTMState(*(torch.zeros(1, H, *dims, dtype=dtype) for dims in ((D, D), (D,), ())))


def _slstm_state(dtype: torch.dtype) -> SLSTMState:
    return SLSTMState(*torch.zeros(4, 1, len(MEMORIES), D, dtype=dtype))


def _mlstm_op(inputs: list[Tensor], state: MLSTMState) -> tuple[Tensor, MLSTMState]:
    q, k, v, igate, fgate = inputs
    return mlstm_chunkwise(q, k, v, igate, fgate, state, backend="torch")


def _mlstm_definition(inputs: list[Tensor], state: MLSTMState) -> tuple[Tensor, MLSTMState]:
    q, k, v, igate, fgate = inputs
    return mlstm_recurrent(q, k, v, igate, fgate, state, "exp", 1e-6)


def _slstm_op(inputs: list[Tensor], state: SLSTMState) -> tuple[Tensor, SLSTMState]:
    gates, R = inputs
    return slstm_scan(gates, R, state, backend="torch")


def _slstm_definition(inputs: list[Tensor], state: SLSTMState) -> tuple[Tensor, SLSTMState]:
    gates, R = inputs
    return slstm_recurrent(gates, R, state)


CELLS = {
    "mLSTM": Cell(_mlstm_inputs, _mlstm_state, _mlstm_op, _mlstm_definition),
    "sLSTM": Cell(_slstm_inputs, _slstm_state, _slstm_op, _slstm_definition),
}


def parts(tokens: int) -> list[tuple[int, int]]:
    """First token and end of each part."""
    ends = [FIRST * 10**i for i in range(20) if FIRST * 10**i < tokens]
    return list(zip([0, *ends], [*ends, tokens], strict=True))


def _pieces(start: int, end: int) -> Iterator[int]:
    for at in range(start, end, PIECE):
        yield min(PIECE, end - at)


@torch.no_grad()
def measure(cell: Cell, tokens: int) -> tuple[list[list[Error]], list[list[Error]]]:
    """Errors of the op, and of the definition in float32, for each part and each memory."""
    generator = torch.Generator().manual_seed(0)
    ways = ((cell.definition, torch.float64), (cell.op, torch.float32), (cell.definition, torch.float32))
    states = [cell.state(dtype) for _, dtype in ways]
    of_op, of_definition = list[list[Error]](), list[list[Error]]()
    for start, end in parts(tokens):
        squares, largest = (torch.zeros(2, len(MEMORIES), dtype=torch.float64) for _ in range(2))
        for T in _pieces(start, end):
            inputs = [x.float() for x in cell.inputs(T, generator)]
            h = []
            for i, (way, dtype) in enumerate(ways):
                y, states[i] = way([x.to(dtype) for x in inputs], states[i])
                h.append(y.double())
            errors = (torch.stack(h[1:]) - h[0]).squeeze(1)  # [2, T, H, D]
            squares += errors.square().sum((1, 3))
            largest = torch.maximum(largest, errors.abs().amax((1, 3)))
        rms = (squares / ((end - start) * D)).sqrt()
        for i, errors_of in enumerate((of_op, of_definition)):
            errors_of.append([Error(*pair) for pair in zip(rms[i].tolist(), largest[i].tolist(), strict=True)])
    return of_op, of_definition


def draw(axes: Any, tokens: int, errors: dict[str, tuple[list[list[Error]], list[list[Error]]]]) -> None:
    """Draws mean errors on axes of matplotlib, those of the definition dashed."""
    ends = [end for _, end in parts(tokens)]
    for cell, (of_op, of_definition) in errors.items():
        for i, memory in enumerate(MEMORIES):
            style = {"marker": "os^"[i], "color": "#0072B2" if cell == "mLSTM" else "#D55E00"}
            axes.plot(ends, [part[i].rms for part in of_op], label=f"{cell}, {memory}", **style)
            axes.plot(ends, [part[i].rms for part in of_definition], linestyle="--", linewidth=0.8, **style)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="error of h (root mean square)")
    axes.set_title("float32 against float64; dashed: a loop of steps", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def build_parser() -> argparse.ArgumentParser:
    parser = command_line("stress", __doc__, EXAMPLES)
    parser.add_argument("--tokens", type=integer(1), default=1_000_000, metavar="N", help="of the text (%(default)s)")
    parser.add_argument("--picture", type=new_file, metavar="FILE", help="draw the errors over the length too")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.picture:
        try:
            import matplotlib  # here, as the table needs none
            from matplotlib.figure import Figure
        except ImportError:
            parser.error("--picture needs matplotlib, which is not installed: pip install matplotlib.")
    errors = {}
    show("| half-life | tokens | op: rms, largest | loop of steps: rms, largest |\n|---|---|---|---|")
    for name, cell in CELLS.items():
        errors[name] = measure(cell, args.tokens)
        for i, memory in enumerate(MEMORIES):
            for (start, end), *both in zip(parts(args.tokens), *errors[name], strict=True):
                of_op, of_definition = (f"{part[i].rms:.1e}, {part[i].largest:.1e}" for part in both)
                show(f"| {name}, {memory} | {start:,} to {end:,} | {of_op} | {of_definition} |")
    if args.picture:
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "modeling_xlstm"})
        figure = Figure(figsize=(8, 3.8), layout="constrained")
        draw(figure.subplots(), args.tokens, errors)
        figure.savefig(args.picture)


if __name__ == "__main__":
    run(main)
