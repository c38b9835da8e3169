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
    blocks: Sequence[int] | None = None,
) -> Any:
    """Draws a gate of all heads over a text: a line for each head, the first block on top, and a column for each token.

    Forget gates are drawn as half-lives, `log(1/2) / log f`: the number of tokens after which half of what is in memory
    would be left if the gate stayed as it is. Channels are averaged: forget gates by their logarithm.

    Args:
        axes: A `matplotlib.axes.Axes`.
        gates: `gates` of a model's output with `output_gates=True`, or some of them: of T tokens.
        blocks: Numbers of these blocks, from 0 on when omitted.
        tokens: T texts, written below.
        gate: `"input"`, `"forget"` or `"output"`.
        row: Of the batch.

    Returns:
        The `matplotlib.image.AxesImage`, such as `figure.colorbar` takes.

    Raises:
        TypeError, ValueError: There is no such gate or row, no block, or another number of tokens or blocks; the
            message says which.

    ```python
    >>> figure, axes = plt.subplots()
    >>> figure.colorbar(draw_gates(axes, model(ids, output_gates=True).gates), label="half-life in tokens")
    ```
    """
    if gate not in GateActivations._fields:
        raise ValueError(f"gate must be one of {', '.join(GateActivations._fields)}, got {gate!r}.")
    if isinstance(gates, GateActivations):
        raise TypeError("gates must be those of several blocks, got those of one; [gates] is a list of them.")
    if not gates:
        raise ValueError("gates must be those of at least one block, got none.")
    numbers = range(len(gates)) if blocks is None else blocks
    if len(numbers) != len(gates):
        raise ValueError(f"blocks must be one number for each of {len(gates)} blocks, got {len(numbers)}.")
    B, T = gates[0].input.shape[:2]
    if not 0 <= row < B:
        raise ValueError(f"row must be from 0 to {B - 1}, got {row}.")
    if tokens is not None and len(tokens) != T:
        raise ValueError(f"tokens must be one for each of {T} columns, got {len(tokens)}.")
    lines, heads = [], []
    for i, layer in zip(numbers, gates, strict=True):
        x = getattr(layer, gate)[row].detach().double().cpu()  # [T, H], or [T, H, channels]
        x = x.log() if gate == "forget" else x
        x = x if x.dim() == 2 else x.mean(-1)
        lines.append((math.log(0.5) / x.clamp(max=math.log(0.5) / LONGEST) if gate == "forget" else x).mT)
        heads += [f"block {i}, head {head}" for head in range(x.shape[1])]
    picture, options = torch.cat(lines), {"aspect": "auto", "interpolation": "nearest", "cmap": "cividis"}
    if gate == "output":
        image = axes.imshow(picture.numpy(), **options)
    else:  # a logarithm has colours for what is above 0 and finite
        shown = picture[picture.isfinite() & (picture > 0)]
        low, high = (shown.min().item(), shown.max().item()) if shown.numel() else (0.5, 2.0)
        high = max(high, low * (1 + 1e-6))
        image = axes.imshow(picture.clamp(low, high).numpy(), norm="log", vmin=low, vmax=high, **options)
    axes.set_yticks(range(len(heads)), heads, fontsize="small")
    axes.set_xlabel("token")
    if tokens is not None:
        names = [repr(token)[1:-1] for token in tokens]
        axes.set_xticks(range(T), names, rotation=90, fontsize="small", parse_math=False)
    return image
