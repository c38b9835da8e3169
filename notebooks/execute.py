"""Runs notebooks from top to bottom, offline, and keeps what comes out: `python notebooks/execute.py [NAME ...]`.

Each runs in this folder, with the interpreter that runs this. A notebook in which a cell fails stays as it was.
"""

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tqdm import tqdm


FOLDER = Path(__file__).parent
SECONDS = 600  # for a cell


class ThisInterpreter(AsyncKernelManager):
    """Without directories to look in, the kernel named python3 is the interpreter that asks."""

    def __init__(self, **kwargs: Any):
        super().__init__(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), transport_encryption="auto", **kwargs)


@contextmanager
def _settings() -> Iterator[None]:
    """Nothing of the user's is read or written, and no network is used."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {name: str(Path(folder) / name) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR")}
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, (str(FOLDER.parent), os.environ.get("PYTHONPATH"))))
        settings |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
        settings["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # models this small gain nothing from more
        with mock.patch.dict(os.environ, settings):
            yield


def digest(notebook: nbformat.NotebookNode) -> str:
    """Of the code, by which outputs can be told from those of other code."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook at `path` with the outputs of a run. Raises CellExecutionError where a cell fails, CellTimeoutError
    where one takes too long, DeadKernelError where it ends the process, ValueError or ValidationError where the file is
    no notebook.
    """
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    with _settings():
        NotebookClient(
            notebook,
            timeout=SECONDS,
            startup_timeout=60,
            record_timing=False,
            coalesce_streams=True,
            kernel_manager_class=ThisInterpreter,
            resources={"metadata": {"path": str(FOLDER)}},
        ).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # not of which version
    notebook.metadata["executed"] = digest(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # warnings are of whatever else is installed
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    names = sorted(path.name for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)} (default: all)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"NAME must be one of {', '.join(names)}, got {', '.join(sorted(unknown))}.")
    for name in tqdm(args.names or names, unit="notebook"):
        try:
            notebook = execute(FOLDER / name)
        except CellExecutionError as error:
            sys.exit(f"{name} is left as it was, as a cell fails:\n{error}")
        except CellTimeoutError:
            sys.exit(f"{name} is left as it was, as a cell takes more than {SECONDS} s.")
        except DeadKernelError:
            sys.exit(f"{name} is left as it was, as its process ended in a cell: did its memory suffice?")
        except (ValueError, nbformat.ValidationError) as error:
            sys.exit(f"{name} must be a notebook: {str(error).splitlines()[0][:200]}")
        except KeyboardInterrupt:
            sys.exit(130)
        nbformat.write(notebook, FOLDER / name)


if __name__ == "__main__":
    main()
