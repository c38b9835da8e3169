"""Inputs of the op tests, the loss that they are differentiated from, and ways to run an op that must not matter.

An op here is a function of a dict of named inputs that returns `(h, state)`. All data is drawn in float64 from a seed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


Inputs = dict[str, Tensor]
Op = Callable[..., tuple[Tensor, Any]]

MLSTM_TOKENS = ("q", "k", "v", "igate", "fgate")
TOKENS = (*MLSTM_TOKENS, "gates")  # inputs with a time axis
WEIGHTS = ("R",)  # inputs that all rows share; all others are states, one row a sequence
LENGTHS = (1, 63, 64, 65, 200)  # of sequences: around the default chunk size, and beyond
PACKED = (7, 0, 1, 65, 16)  # lengths of packed or padded sequences
REGIMES = ("ordinary", "keep", "overwrite", "huge", "faint", "wild", "resets")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _gates(shape: Sequence[int], regime: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pre-activations of input and forget gates, without ties of the stabiliser's max."""
    igate, fgate = _randn(2, *shape, generator=generator)
    coin = torch.randint(0, 2, (2, *shape), generator=generator)
    die = torch.rand(shape, generator=generator)
    if regime == "keep":
        igate, fgate = igate - 15, fgate + 30
    elif regime == "overwrite":
        igate, fgate = igate + 15, fgate - 30
    elif regime == "huge":
        igate = igate + 40
    elif regime == "faint":
        igate, fgate = igate - 120, fgate - 6
    elif regime == "wild":
        igate, fgate = igate + 30 * coin[0] - 15 + 25 * (die > 0.9), fgate + 60 * coin[1] - 30
    elif regime == "resets":
        fgate = fgate.masked_fill(die < 0.1, -math.inf)
    elif regime == "closed":  # both gates at once, or one
        igate, fgate = igate.masked_fill(die < 0.2, -math.inf), fgate.masked_fill((die - 0.15).abs() < 0.1, -math.inf)
    return igate, fgate


def mlstm_inputs(
    B: int, T: int, H: int = 3, K: int = 24, V: int = 17, *,
    rows: int | None = None, regime: str = "ordinary", aligned: bool = False, seed: int = 0,
) -> Inputs:  # fmt: skip
    """Inputs of an mLSTM with a state of `rows` rows, B unless given.

    Where a normaliser cancels and the stabiliser is large, the division by it magnifies rounding beyond any tolerance.
    `aligned` inputs have normalisers of both signs that do not cancel; extreme gates always come with such inputs.
    """
    generator = _generator(seed)
    rows = B if rows is None else rows
    q, k = _randn(2, B, T, H, K, generator=generator)
    v = _randn(B, T, H, V, generator=generator)
    C, n, m = (_randn(rows, H, *dims, generator=generator) for dims in ((K, V), (K,), ()))
    if aligned or regime != "ordinary":
        q, k, n = q.abs() * q.sum(-1, keepdim=True).sign(), k.abs(), n.abs()
    igate, fgate = _gates((B, T, H), regime, generator)
    return {"q": q, "k": k, "v": v, "igate": igate, "fgate": fgate, "C": C, "n": n, "m": m}


def slstm_inputs(
    B: int, T: int, H: int = 3, D: int = 7, *, rows: int | None = None, regime: str = "ordinary", seed: int = 0
) -> Inputs:
    """Inputs of an sLSTM with a state of `rows` rows, B unless given, as some earlier steps would have left it."""
    generator = _generator(seed)
    rows = B if rows is None else rows
    igate, fgate = _gates((B, T, H, D), regime, generator)
    zgate, ogate = _randn(2, B, T, H, D, generator=generator)
    R = _randn(H, 4, D, D, generator=generator) / D**0.5
    h, c, n, m = _randn(4, rows, H, D, generator=generator)
    h, n = h.tanh(), n.abs() + 0.1
    gates = torch.stack((igate, fgate, zgate, ogate), 3)
    return {"gates": gates, "R": R, "h": h, "c": c.tanh() * n, "n": n, "m": m}


def fresh(inputs: Inputs) -> Inputs:
    """The same with the state of a new sequence."""
    return {name: x if name in TOKENS + WEIGHTS else torch.zeros_like(x) for name, x in inputs.items()}


def rounded(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same in `dtype`, states in at least float32."""
    state = torch.promote_types(dtype, torch.float32)
    return {name: x.to(dtype if name in TOKENS + WEIGHTS else state) for name, x in inputs.items()}


def outputs_and_grads(op: Op, inputs: Inputs) -> dict[str, Tensor]:
    """h, the final state, and the gradient of every input from a loss that weighs every entry of them differently."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    h, state = op(leaves)
    outputs = {"h": h, **{f"final {name}": x for name, x in state._asdict().items()}}
    generator = _generator(1)
    # sixteenths, which every dtype holds exactly
    weights = [(16 * _randn(*x.shape, generator=generator)).round() / 16 for x in outputs.values()]
    loss = sum((weight.to(x.device) * x).sum() for weight, x in zip(weights, outputs.values(), strict=True))
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    gradients = {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in outputs.items()} | gradients


def pick(inputs: Inputs, tokens: slice, rows: slice = slice(None)) -> Inputs:
    """Some time steps, and some rows of the state."""
    index = {name: (slice(None), tokens) if name in TOKENS else rows for name in inputs if name not in WEIGHTS}
    return inputs | {name: inputs[name][index[name]] for name in index}


def separately(op: Op, lengths: Sequence[int] = PACKED) -> Op:
    """Each of the sequences packed in a batch of 1 alone; one without a token returns the state that it starts from."""

    def run(inputs: Inputs):
        h, states, start = [], [], 0
        for row, length in enumerate(lengths):
            piece = pick(inputs, slice(start, start + length), slice(row, row + 1))
            start += length
            if length:
                h_piece, state = op(piece)
                h.append(h_piece)
                states.append(state)
            else:
                states.append([piece[name] for name in inputs if name not in TOKENS + WEIGHTS])
        return torch.cat(h, 1), type(state)(*map(torch.cat, zip(*states, strict=True)))

    return run


def packed(op: Op, lengths: Sequence[int] = PACKED) -> Op:
    """All of them in one call, told apart by `cu_seqlens`."""
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return lambda inputs: op(inputs, cu_seqlens=cu_seqlens.to(next(iter(inputs.values())).device))


def padding_mask(side: str, lengths: Sequence[int] = PACKED, T: int = 70) -> Tensor:
    """`[len(lengths), T]` with as many real positions in each row; `"scattered"` has padding in the middle as well."""
    generator = _generator(2)
    mask = torch.zeros(len(lengths), T, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        order = torch.randperm(T, generator=generator) if side == "scattered" else torch.arange(T)
        row[order[T - length :] if side == "left" else order[:length]] = True
    return mask


def padded(op: Op, mask: Tensor) -> Op:
    """All of them as rows of a padded batch, with large values at padded positions; h at real positions only."""

    def pad(x: Tensor) -> Tensor:
        junk = 100 * _randn(*mask.shape, *x.shape[2:], generator=_generator(3)).to(x)
        return junk.index_put((mask,), x[0])

    def run(inputs: Inputs):
        h, state = op({name: pad(x) if name in TOKENS else x for name, x in inputs.items()}, mask=mask)
        return h[mask][None], state

    return run


def in_two(op: Op, split: int) -> Op:
    """The first `split` steps, then the others from the state that they leave."""

    def run(inputs: Inputs):
        h_first, state = op(pick(inputs, slice(None, split)))
        h_second, state = op(pick(inputs, slice(split, None)) | state._asdict())
        return torch.cat((h_first, h_second), 1), state

    return run


def stepwise(step: Op) -> Op:
    """One step at a time."""

    def run(inputs: Inputs, mask: Tensor | None = None):
        h = []
        for t in range(next(iter(inputs.values())).shape[1]):
            now = {name: x[:, t] if name in TOKENS else x for name, x in inputs.items()}
            h_t, state = step(now) if mask is None else step(now, mask=mask[:, t])
            inputs = inputs | state._asdict()
            h.append(h_t)
        return torch.stack(h, 1), state

    return run


def unstabilised(op: Op) -> Op:
    """An sLSTM with the values that its final state stands for, which do not depend on where its stabiliser is from."""

    def run(inputs: Inputs, **options: Any):
        y, state = op(inputs, **options)
        h, c, n, m = state
        return y, type(state)(h, c * m.exp(), n * m.exp(), torch.zeros_like(m))

    return run


def strided(op: Op, layout: str) -> Op:
    """The same inputs as views that are not contiguous: every second entry of memory, or axes in reversed order."""
    views = {
        "sparse": lambda x: torch.stack((x, torch.full_like(x, math.nan)), -1)[..., 0],
        "reversed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    }
    return lambda inputs: op({name: views[layout](x) for name, x in inputs.items()})


# masks that do not fit a step of 2 rows: argument, error, its message
BAD_STEP_MASKS = {
    "mask of numbers": (torch.ones(2), TypeError, "mask must be one of torch.bool, got torch.float32"),
    "mask of another batch": (torch.ones(3) > 0, ValueError, r"mask must have shape \(2,\), got \(3,\)"),
    "mask with time": (torch.ones(2, 1) > 0, ValueError, r"mask must have shape \(2,\), got \(2, 1\)"),
    "mask elsewhere": (torch.ones(2, device="meta") > 0, ValueError, "mask must be on cpu .* got meta"),
}


# sequence arguments that do not fit inputs of `B` rows of 5 tokens: B, arguments, error, its message
BAD_SEQUENCES = {
    "mask of numbers": (2, {"mask": torch.ones(2, 5)}, TypeError, "mask must be one of torch.bool, got torch.float32"),
    "mask of another length": (2, {"mask": torch.ones(2, 4) > 0}, ValueError, r"shape \(2, 5\), got \(2, 4\)"),
    "mask elsewhere": (2, {"mask": torch.ones(2, 5, device="meta") > 0}, ValueError, "mask must be on cpu .* got meta"),
    "packed and padded": (
        1,
        {"mask": torch.ones(1, 5) > 0, "cu_seqlens": torch.tensor([0, 5])},
        ValueError,
        "mask and cu_seqlens exclude each other",
    ),
    "packed in a batch": (2, {"cu_seqlens": torch.tensor([0, 5])}, ValueError, "batch of 1, got a batch of 2"),
    "boundaries in a list": (1, {"cu_seqlens": [0, 5]}, TypeError, r"must be an int32 tensor \[N \+ 1\], got list"),
    "boundaries in float": (1, {"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "int32 .* got torch.float32"),
    "boundaries in a matrix": (1, {"cu_seqlens": torch.tensor([[0, 5]])}, ValueError, r"\[N \+ 1\] .* got \(1, 2\)"),
    "boundaries of nothing": (1, {"cu_seqlens": torch.tensor([0])}, ValueError, r"\[N \+ 1\] .* got \(1,\)"),
    "boundaries that fall": (1, {"cu_seqlens": torch.tensor([0, 4, 3, 5])}, ValueError, r"must rise .* \[0, 4, 3, 5\]"),
    "boundaries start late": (1, {"cu_seqlens": torch.tensor([1, 5])}, ValueError, "must rise from 0 to .* 5, got"),
    "boundaries end early": (1, {"cu_seqlens": torch.tensor([0, 4])}, ValueError, "must rise from 0 to .* 5, got"),
    "boundaries end late": (1, {"cu_seqlens": torch.tensor([0, 6])}, ValueError, "must rise from 0 to .* 5, got"),
}
