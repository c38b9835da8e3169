"""The examples in the help of the command lines: they run in a checkout, without a network and without a GPU."""

import argparse
import contextlib
import io
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import generation, ops, quality, training
from benchmarks.__main__ import BENCHMARKS
from benchmarks.command import new_file


pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
HELP = ["modeling_xlstm", *(f"modeling_xlstm {command}" for command in ("generate", "info", "serve"))]
HELP += ["convert", "benchmarks", *(f"benchmarks {name}" for name in BENCHMARKS)]
NEEDS_NOTHING = "examples"  # the heading of what runs everywhere, and soon


def call(module: str, *argv: str) -> str:
    """Runs `python -m` in this process and returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = import_module(f"{module}.__main__").main([*argv])
        except SystemExit as stop:
            code = stop.code
    assert not code, (module, argv, code)
    return out.getvalue()


def examples(command: str) -> list[tuple[str, str]]:
    """Headings and command lines in the help of a command."""
    heading, found = "", []
    for line in call(*command.split(), "--help").splitlines():
        if match := re.fullmatch(r" *(echo .*\| )?python -m .*", line):
            found.append((heading, match[0].strip()))
        elif line.endswith(":"):
            heading = line.strip().removesuffix(":")
    return found


PRINTED = {command: examples(command) for command in HELP}
LINES = list(dict.fromkeys(pair for printed in PRINTED.values() for pair in printed))


def parts(line: str) -> tuple[str, str, list[str]]:
    """What is piped into a command, its module and its arguments."""
    *echo, command = line.split(" | ")
    _, _, module, *argv = shlex.split(command, comments=True)
    return "".join(shlex.split(text)[1] + "\n" for text in echo), module, argv


@pytest.mark.parametrize("command", HELP)
def test_every_help_has_examples_of_its_command(command):
    assert any(f"python -m {command} " in line for _, line in PRINTED[command])


@pytest.mark.parametrize("line", [line for _, line in LINES])
def test_an_example_is_a_command_line_that_is_understood(line):
    _, module, argv = parts(line)
    import_module(f"{module}.__main__").build_parser().parse_args(argv)
    if module == "benchmarks":
        import_module(f"benchmarks.{argv[0]}").build_parser().parse_args(argv[1:])


@pytest.fixture
def in_this_process(monkeypatch):
    """Benchmarks measure in the process of the test, without a GPU."""
    monkeypatch.setattr(ops.Worker, "attempt", lambda self, function, *args: (function(*args), ""))
    monkeypatch.setattr(quality, "ProcessPoolExecutor", lambda jobs, *context: ThreadPoolExecutor(jobs))
    for module in (generation, training, quality):
        monkeypatch.setattr(module, "DEVICE", "cpu")


@pytest.mark.filterwarnings("ignore")  # those of peers
@pytest.mark.parametrize("line", [line for heading, line in LINES if heading == NEEDS_NOTHING])
def test_an_example_runs_in_a_checkout(line, in_this_process, tmp_path, monkeypatch):
    text, module, argv = parts(line)
    if "serve" in argv:
        page = ROOT / "notebooks" / "generation.md"  # whose command test_serve.py runs
        assert line in page.read_text(encoding="utf-8")
        return
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    if "resources" in argv:  # which sets a driver of Triton for good
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        printed = subprocess.run(
            [sys.executable, "-m", module, *argv], capture_output=True, text=True, check=True
        ).stdout
    else:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        printed = call(module, *argv)
    assert printed


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_stops_early_is_no_error(lines):
    """With lines that are still buffered when it has gone, and with more."""
    program = f"from benchmarks.command import run, show\nrun(lambda: [show('line') for _ in range({lines})])"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_one_sentence():
    program = "from benchmarks.command import run, show\nrun(lambda: show('line'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: Reading or writing failed: No space left on device\n")


def test_a_benchmark_writes_to_no_file_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    assert new_file(str(tmp_path / "new")) == tmp_path / "new"
    with pytest.raises(argparse.ArgumentTypeError, match="in a directory that exists, got "):
        new_file(str(tmp_path / "file" / "new"))
