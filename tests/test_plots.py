"""Pictures hold the numbers that they claim to, and need no matplotlib but that of their axes."""

import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from modeling_xlstm import GateActivations
from modeling_xlstm.plots_xlstm import draw_gates


def gates():
    """Of two rows and three tokens: an mLSTM of two heads, and an sLSTM of two heads of two channels."""
    mlstm = torch.tensor([[0.5, 0.25], [0.5, 1.0], [1.0, 0.0]]).expand(2, 3, 2)
    slstm = mlstm[..., None] * torch.tensor([1.0, 0.25])
    return GateActivations(mlstm, mlstm, slstm), GateActivations(slstm, slstm, slstm)


def drawn(gate, **options):
    axes = Figure().subplots()
    return axes, np.asarray(draw_gates(axes, gates(), gate=gate, **options).get_array())


def test_forget_gates_are_half_lives():
    _, picture = drawn("forget")
    never, at_once = 1e6, 1 / 3  # has no logarithm, and the colour of the shortest
    np.testing.assert_allclose(picture[:2], [[1.0, 1.0, never], [0.5, never, at_once]])
    np.testing.assert_allclose(picture[2:], [[0.5, 0.5, 1.0], [1 / 3, 1.0, at_once]])


@pytest.mark.parametrize("gate", ["input", "output"])
def test_channels_are_averaged(gate):
    _, picture = drawn(gate, row=1)
    assert picture.shape == (4, 3)
    mean = np.array([[0.5, 0.5, 1.0], [0.25, 1.0, 0.0]])
    least = 0.0 if gate == "output" else 0.625 * 0.25
    np.testing.assert_allclose(picture[2:], np.maximum(mean * 0.625, least))
    np.testing.assert_allclose(picture[:2], np.maximum(mean * (0.625 if gate == "output" else 1.0), least))


def test_lines_are_heads_and_columns_are_tokens():
    axes, _ = drawn("forget", tokens=["a", " b", "\n"])
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "block 0, head 0", "block 0, head 1", "block 1, head 0", "block 1, head 1",
    ]  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", " b", "\\n"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gate": "reset"}, "gate must be one of input, forget, output, got 'reset'."),
        ({"gate": "input", "row": 2}, "row must be from 0 to 1, got 2."),
        ({"gate": "input", "tokens": ["a"]}, "tokens must be one for each of 3 columns, got 1."),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        drawn(**options)
    with pytest.raises(ValueError, match="^gates must be those of at least one block, got none.$"):
        draw_gates(Figure().subplots(), ())


@pytest.mark.parametrize("value", [0.0, 1.0, math.inf])
@pytest.mark.parametrize("gate", GateActivations._fields)
def test_gates_that_are_all_the_same_or_infinite_are_drawn_with_a_scale(gate, value):
    figure = Figure()
    same = GateActivations(*torch.full((3, 1, 4, 2), value if gate != "forget" else min(value, 1.0)))
    figure.colorbar(draw_gates(figure.subplots(), [same], ["$", "$$", "\\frac", "$x$"], gate=gate))
    figure.savefig(io.BytesIO())


def test_some_of_the_blocks_have_their_own_numbers():
    axes = Figure().subplots()
    draw_gates(axes, gates()[1:], blocks=[7])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["block 7, head 0", "block 7, head 1"]
    with pytest.raises(ValueError, match="^blocks must be one number for each of 1 blocks, got 2.$"):
        draw_gates(axes, gates()[1:], blocks=[7, 8])
    with pytest.raises(TypeError, match="^gates must be those of several blocks, got those of one; "):
        draw_gates(axes, gates()[0])


def test_it_is_there_without_matplotlib():
    blocked = "import sys; sys.modules['matplotlib'] = None; import modeling_xlstm.plots_xlstm"
    subprocess.run([sys.executable, "-c", blocked], check=True)
