"""Pictures of what a model does, drawn on axes of matplotlib, which only their maker needs."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .layers_xlstm import GateActivations


LONGEST = 1e6  # tokens: longer half-lives have the same colour


def draw_gates(
    axes: Any,
    gates: Sequence[GateActivations],
    tokens: Sequence[str] | None = None,
    *,
    gate: str = "forget",
    row: int = 0,
) -> Any:
    """Draws a gate of all heads over a text: a line for each head, the first block on top, and a column for each token.

    Forget gates are drawn as half-lives, `log(1/2) / log f`: the number of tokens after which half of what is in memory
    would be left if the gate stayed as it is. Channels are averaged: forget gates by their logarithm.

    Args:
        axes: A `matplotlib.axes.Axes`.
        gates: `gates` of a model's output with `output_gates=True`, or some of them: of T tokens.
        tokens: T texts, written below.
        gate: `"input"`, `"forget"` or `"output"`.
        row: Of the batch.

    Returns:
        The `matplotlib.image.AxesImage`, such as `figure.colorbar` takes.

    Raises:
        ValueError: There is no such gate or row, no block, or another number of tokens; the message says which.

    ```python
    >>> figure, axes = plt.subplots()
    >>> figure.colorbar(draw_gates(axes, model(ids, output_gates=True).gates), label="half-life in tokens")
    ```
    """
    if gate not in GateActivations._fields:
        raise ValueError(f"gate must be one of {', '.join(GateActivations._fields)}, got {gate!r}.")
    if not gates:
        raise ValueError("gates must be those of at least one block, got none.")
    B, T = gates[0].input.shape[:2]
    if not 0 <= row < B:
        raise ValueError(f"row must be from 0 to {B - 1}, got {row}.")
    if tokens is not None and len(tokens) != T:
        raise ValueError(f"tokens must be one for each of {T} columns, got {len(tokens)}.")
    lines, names = [], []
    for i, layer in enumerate(gates):
        x = getattr(layer, gate)[row].detach().double().cpu()  # [T, H], or [T, H, channels]
        x = x.log() if gate == "forget" else x
        x = x if x.dim() == 2 else x.mean(-1)
        lines.append((math.log(0.5) / x.clamp(max=math.log(0.5) / LONGEST) if gate == "forget" else x).mT)
        names += [f"block {i}, head {head}" for head in range(x.shape[1])]
    norm = "linear" if gate == "output" else "log"
    picture = torch.cat(lines).numpy()
    image = axes.imshow(picture, aspect="auto", interpolation="nearest", norm=norm, cmap="cividis")
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_xlabel("token")
    if tokens is not None:
        axes.set_xticks(range(T), [repr(token)[1:-1] for token in tokens], rotation=90, fontsize="small")
    return image
