"""Every notebook runs from top to bottom with the interpreter of the tests, offline, and is kept without output."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient


ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# notebook: what it must print, because it claims so
PRINTED = {
    "quickstart.ipynb": [
        "padded batch equals single prompts: True",
        "continuing from the file equals reading everything again: True",
    ]
}


class ThisInterpreter(AsyncKernelManager):
    """Without directories to look in, the kernel named python3 is the interpreter that asks."""

    def __init__(self, **kwargs: Any):
        super().__init__(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **kwargs)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def test_every_notebook_is_listed():
    assert {path.name for path in NOTEBOOKS} == PRINTED.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_without_output(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_prints_what_it_claims(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = read(path)
    options = {"kernel_manager_class": ThisInterpreter, "resources": {"metadata": {"path": str(path.parent)}}}
    NotebookClient(notebook, timeout=600, startup_timeout=600, **options).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    for line in PRINTED[path.name]:
        assert line in printed.splitlines(), printed
    assert any("image/png" in output.get("data", {}) for output in outputs)
