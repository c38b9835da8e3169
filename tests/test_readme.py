"""The README: its code runs, its commands exist, its links lead somewhere, and its claims name tests that there are."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from convert.__main__ import build_parser as build_convert_parser
from modeling_xlstm import XLSTMConfig, count_parameters
from modeling_xlstm.__main__ import build_parser


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its first row."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_the_python_blocks_run(tmp_path):
    """One after the other, like a reader would, in a directory where only the checkpoints are."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")), encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("My lord,")


def test_it_begins_with_the_two_commands():
    assert blocks("bash")[0] == "make demo\nmake test\n"


def test_the_commands_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in "".join(blocks("bash")).splitlines():
        program, *argv = shlex.split(line)
        if program == "curl":
            assert isinstance(json.loads(argv[-1]), dict), line  # sent in test_serve.py
        elif program == "make":
            assert set(argv) <= set(targets), line
        elif argv[:2] == ["-m", "modeling_xlstm"]:
            build_parser().parse_args(argv[2:])
        elif argv[:2] == ["-m", "convert"]:
            build_convert_parser().parse_args(argv[2:])
        else:
            assert argv[0] == "-m" and (ROOT / f"{argv[1].replace('.', '/')}.py").is_file(), line


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", README))))
def test_a_link_leads_somewhere(target):
    assert target.startswith("https://arxiv.org/abs/") or (ROOT / target).exists()


def test_every_claim_names_a_test():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").glob("*.py")]
    tests = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    for what, shown_by in table("What is covered"):
        names = re.findall(r"`(test_\w+)`", shown_by)
        assert names, what
        assert set(names) <= tests, what


@pytest.mark.parametrize("row", table("Configurations"), ids=lambda row: row[0])
def test_a_preset_is_as_described(row):
    name, *numbers = row
    config = XLSTMConfig.preset(name.strip("`"))
    slstm = (config.block_types or []).count("slstm")
    described = [config.hidden_size, config.num_hidden_layers, slstm, count_parameters(config)]
    assert [int(number.replace(",", "")) for number in numbers] == described


def test_every_preset_is_listed():
    with pytest.raises(ValueError, match="preset must be one of") as refusal:
        XLSTMConfig.preset("nonsense")
    legal = str(refusal.value).removeprefix("preset must be one of ").partition(", got ")[0]
    assert [row[0].strip("`") for row in table("Configurations")] == legal.split(", ")
