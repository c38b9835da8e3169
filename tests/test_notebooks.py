"""Every notebook runs from top to bottom, offline, prints what it claims, and is kept with what came out of a run."""

from pathlib import Path

import nbformat
import pytest

from notebooks import execute as command
from notebooks.execute import FOLDER, digest, execute


NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

# notebook: what it must print, because it claims so
PRINTED = {
    "convert_and_publish.ipynb": [
        "weights that went there and back are equal to the bit: True",
        "transformers.models.xlstm.modeling_xlstm.xLSTMForCausalLM",
        "the same text from the Hub, without this package: True",
    ],
    "finetune.ipynb": [
        "all weights saves more than a quarter of the bits: True",
        "LoRA saves more than a quarter of the bits: True",
        "merged logits equal those with the adapter, to rounding: True",
    ],
    "memory.ipynb": [
        "read at once or token by token, the memory is the same: True",
        "the state has the same size after 1 and after 4096 tokens: True",
    ],
    "quickstart.ipynb": [
        "padded batch equals single prompts: True",
        "continuing from the file equals reading everything again: True",
    ],
    "speed.ipynb": ["both stacks took their steps: True"],
    "state_tracking.ipynb": [
        "sLSTM right after the last training position: 100 %",
        "mLSTM beyond chance after it: False",
    ],
}


def outputs_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed_by(notebook: nbformat.NotebookNode) -> list[str]:
    streams = [output for output in outputs_of(notebook) if output.output_type == "stream" and output.name == "stdout"]
    return "".join(stream.text for stream in streams).splitlines()


def kinds_of_outputs(notebook: nbformat.NotebookNode) -> list[list[list[str]]]:
    """Of every cell: what its outputs are."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[[output.output_type, *sorted(output.get("data", []))] for output in cell.outputs] for cell in code]


def assert_as_claimed(name: str, notebook: nbformat.NotebookNode) -> None:
    printed = printed_by(notebook)
    for line in PRINTED[name]:
        assert line in printed, printed
    assert any("image/png" in output.get("data", {}) for output in outputs_of(notebook))


def test_every_notebook_is_listed():
    assert {path.name for path in NOTEBOOKS} == PRINTED.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_with_the_outputs_of_one_run(path: Path):
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run `python notebooks/execute.py`"
    assert notebook.metadata["executed"] == digest(notebook), "run `python notebooks/execute.py`"
    assert str(Path.home()) not in path.read_text(encoding="utf-8")
    assert_as_claimed(path.name, notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_prints_what_it_claims(path: Path):
    notebook = execute(path)
    assert_as_claimed(path.name, notebook)
    assert kinds_of_outputs(notebook) == kinds_of_outputs(nbformat.read(path, as_version=4))


def a_notebook(code: str) -> str:
    return nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (a_notebook("1 / 0"), "x.ipynb is left as it was, as a cell fails:"),
        (a_notebook("import time\ntime.sleep(60)"), "x.ipynb is left as it was, as a cell takes more than 1 s."),
        (a_notebook("import os\nos._exit(1)"), "x.ipynb is left as it was, as its process ended in a cell:"),
        ("{", "x.ipynb must be a notebook: Notebook does not appear to be JSON: '{'"),
    ],
    ids=["fails", "too_long", "dies", "no_notebook"],
)
def test_a_notebook_that_does_not_run_is_left_as_it_was(content, message, tmp_path, monkeypatch):
    path = tmp_path / "x.ipynb"
    path.write_text(content, encoding="utf-8")
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    monkeypatch.setattr(command, "SECONDS", 1)
    monkeypatch.setattr("sys.argv", ["execute.py", "x.ipynb"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert str(end.value).startswith(message)
    assert path.read_text(encoding="utf-8") == content
