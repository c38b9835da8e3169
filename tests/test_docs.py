"""README, pages and CONTRIBUTING: their code runs, their commands exist, their links lead somewhere, and their claims
name tests that there are.

A page is run as one script in a process of its own, in a folder where only the checkpoints are. A block of text that
follows a block of code is the error which that code raises, or the sentence with which that command ends.
"""

import ast
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hub import Hub
from models import tiny_model
from transformers import xLSTMConfig

from benchmarks.pictures import HARDWARE, read_tables
from convert.__main__ import build_parser as build_convert_parser
from convert.__main__ import main as convert_main
from modeling_xlstm import XLSTMConfig, count_parameters
from modeling_xlstm.__main__ import build_parser
from modeling_xlstm.__main__ import main as xlstm_main
from notebooks.reference import PAGE, page


ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *sorted((ROOT / "notebooks").glob("*.md")),
    )
}
CARD = "checkpoints/xlstm-demo/README.md"
KNOWN_SITES = tuple(
    f"https://{site}/" for site in ("arxiv.org/abs", "github.com/NX-AI", "keepachangelog.com", "semver.org")
)
README, TROUBLES = PAGES["README.md"], PAGES["notebooks/troubleshooting.md"]
MEASURED = PAGES["notebooks/benchmarks.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$(?:\n\n```text\n(.*?)\n```$)?", re.MULTILINE | re.DOTALL)
HAS_PEERS = all(importlib.util.find_spec(name) for name in ("xlstm", "mlstm_kernels"))
OF_PEERS = re.compile(r"\btheirs\b|\bmlstm_kernels\b")
REFUSED = """
class refused:
    def __init__(self, sentence):
        self.sentence = sentence
    def __enter__(self):
        pass
    def __exit__(self, kind, error, traceback):
        got = "nothing" if kind is None else f"{kind.__name__}: {error}"
        assert got.endswith(self.sentence), f"got {got}, expected {self.sentence}"
        return True
"""


def blocks(text: str, language: str) -> list[tuple[str, str]]:
    """Each block of a language on a page, and the text of the error that it ends with, if any."""
    return [(code, error) for found, code, error in BLOCK.findall(text) if found == language]


def section(text: str, heading: str) -> str:
    """What a page has below a heading."""
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of all tables below a heading, without their first rows."""
    tables = re.findall(r"^\|.*\n\|[-|]+\|\n((?:\|.*(?:\n|\Z))*)", section(text, heading), re.MULTILINE)
    lines = "".join(tables).splitlines()
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def names_of_tests() -> set[str]:
    """Of all tests that there are."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").glob("*.py")]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


def script(text: str) -> str:
    """The code of a page, without that of packages which are not installed."""
    parts = [REFUSED]
    for code, error in blocks(text, "python"):
        if HAS_PEERS or not OF_PEERS.search(code):
            parts.append(f"with refused({error!r}):\n{textwrap.indent(code, '    ')}" if error else code)
    return "\n".join(parts)


WITH_CODE = [name for name, text in PAGES.items() if blocks(text, "python")]


def run(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The code of a page, as a reader would run it."""
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    (folder / "page.py").write_text(script(PAGES[name]), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "page.py"], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of all pages, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, name, tmp_path_factory.mktemp("page")) for name in WITH_CODE}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_python_blocks_of_a_page_run(name, runs):
    result = runs[name].result()
    assert result.returncode == 0, result.stderr
    if name == "README.md":
        assert result.stdout.startswith("My lord,")


def test_the_readme_is_short_and_begins_with_the_two_commands():
    assert len(README.splitlines()) <= 150
    assert blocks(README, "bash")[0] == ("make demo\nmake test\n", "")


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_exist(name):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    commands = [code for code, error in blocks(PAGES[name], "bash") if not error]
    for line in "".join(commands).splitlines():
        program, *argv = shlex.split(line)
        if program == "curl":
            assert isinstance(json.loads(argv[-1]), dict), line  # sent in test_serve.py
        elif program == "make":
            assert set(argv) <= set(targets), line
        elif scripts := [word for word in argv if word.endswith(".py")]:
            assert (ROOT / scripts[0]).is_file(), line  # run in test_ddp.py, test_fsdp.py and test_engines_*.py
        elif argv[:2] == ["-m", "modeling_xlstm"]:
            build_parser().parse_args(argv[2:])
        elif argv[:2] == ["-m", "convert"]:
            build_convert_parser().parse_args(argv[2:])
        else:
            pytest.fail(f"no parser for {line}")


COMMANDS = sorted(
    {
        line
        for text in PAGES.values()
        for code, error in blocks(text, "bash")
        for line in code.splitlines()
        if line.startswith("python -m") and not error and " serve " not in line  # which test_serve.py runs
    }
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_a_page_runs(line, hub, tmp_path):
    """SOURCE is a small model, and what is pushed goes to a Hub on this machine."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    tiny_model("post_up", vocab_size=4096).save_pretrained(tmp_path / "SOURCE")
    environment = {**os.environ, **hub.environment(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *shlex.split(line)[1:]]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize("name", PAGES)
def test_the_modules_that_a_page_runs_exist(name):
    for module in re.findall(r"python\s+-m\s+(?!pytest)([\w.]+)", PAGES[name]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("name", PAGES)
def test_the_options_of_commands_in_a_sentence_exist(name):
    for module, options in re.findall(r"`python\s+-m\s+(?!pytest)([\w.]+)\s+([^`]+)`", PAGES[name]):
        found = importlib.import_module(module if "." in module else f"{module}.__main__")
        found.build_parser().parse_args(shlex.split(options))


@pytest.mark.parametrize(
    ("command", "sentence"),
    [(code, error) for code, error in blocks(TROUBLES, "bash") if error],
)
def test_a_command_ends_with_the_sentence_that_is_quoted(command, sentence, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    _, _, module, *argv = shlex.split(command)
    try:
        code = {"modeling_xlstm": xlstm_main, "convert": convert_main}[module](argv)
    except SystemExit as end:  # of the parser
        code = end.code
    assert code in (1, 2)
    assert capsys.readouterr().err.strip() == sentence


def sentences() -> list[str]:
    """All texts in the code of the package and of the converter, with … where values are put in."""
    found = []
    for path in (*(ROOT / "modeling_xlstm").glob("*.py"), *(ROOT / "convert").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(x.value) if isinstance(x, ast.Constant) else "…" for x in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_a_message_in_a_table_is_one_of_the_package():
    tables = re.findall(r"^\| ((?:message|reason).*) \|\n\|[-|]+\|\n((?:\|.*\n)*)", TROUBLES, re.MULTILINE)
    quoted = [row.split("`")[1] for _, body in tables for row in body.splitlines()]
    assert len(quoted) > 20
    known = sentences()
    assert [message for message in quoted if not any(message in sentence for sentence in known)] == []


def links() -> list[tuple[str, str]]:
    texts = {**PAGES, CARD: (ROOT / CARD).read_text(encoding="utf-8")}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        words = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        texts[f"notebooks/{path.name}"] = "\n".join(words)
    without_code = {
        name: re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL) for name, text in texts.items()
    }
    return sorted(
        {(name, target) for name, text in without_code.items() for target in re.findall(r"\]\(([^)]+)\)", text)}
    )


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("name", "target"), links())
def test_a_link_leads_somewhere(name, target):
    if target.startswith("https://"):
        assert target.startswith(KNOWN_SITES)
        return
    path, _, anchor = target.partition("#")
    file = (ROOT / name).parent / path if path else ROOT / name
    assert file.exists()
    assert not anchor or anchor in anchors(file)


def test_every_page_is_linked_from_the_readme():
    linked = {target.partition("#")[0] for name, target in links() if name == "README.md"}
    notebooks = {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert (PAGES.keys() - {"README.md"}) | notebooks <= linked


def test_every_claim_names_a_test():
    covered = rows("\n## Table\n" + PAGES["notebooks/coverage.md"], "Table")
    known = names_of_tests()
    assert len(covered) > 50
    for what, shown_by in covered:
        names = re.findall(r"`(test_\w+)`", shown_by)
        assert names, what
        assert set(names) <= known, what


def test_every_row_of_the_comparison_names_a_test_or_a_page():
    known = names_of_tests()
    for what, *_, shown_by in rows(README, "What works"):
        names, pages = re.findall(r"`(test_\w+)`", shown_by), re.findall(r"\]\(([^)]+)\)", shown_by)
        assert names or pages, what
        assert set(names) <= known, what


GENERATION = "Generation and long prompts"
MLSTM = "4 x 8192, 8, 256 and 512 (xLSTM-7B)"
OF_OPS = {"`mlstm_kernels`": "mlstm_kernels", "flash-linear-attention": "simple_gla: no normaliser, no input gate"}
OF_TRAINING = {"Transformers' xLSTM": "Transformers xLSTM, native, autocast"}
OF_PROMPTS = {"Transformers' xLSTM": "Transformers xLSTM, kernels of mlstm_kernels"}
OF_TEXTS = OF_PROMPTS | {"Llama": "Llama, static cache and `torch.compile`"}
OF_CPU = {"Transformers' xLSTM": "Transformers xLSTM", "`xlstm`": "xlstm package"}
# Rows of the README, the section of benchmarks.md that each is from, what that calls its columns, where otherwise, and
# the cells there: what their rows begin with, and their columns. * is the name of the README's column.
PLACES: dict[str, tuple] = {
    "mLSTM, 4 x 8192 tokens, heads of xLSTM-7B, on an H100: ms forward, and with backward": (
        ("Kernels on a GPU", OF_OPS, f"{MLSTM} | forward | *", f"{MLSTM} | forward + backward | *")
    ),
    "training, 400 M parameters, 8 x 2048": ("Steps of training", OF_TRAINING, "* | 8 x 2048"),
    "training, 400 M parameters, 8 x 2048, `torch.compile`": (
        ("Steps of training", OF_TRAINING, "* | 8 x 2048, `torch.compile`")
    ),
    "greedy text, shape of xLSTM-7B, batch of 1": (GENERATION, OF_TEXTS, "* | batch of 1"),
    "greedy text, shape of xLSTM-7B, batch of 64": (GENERATION, OF_TEXTS, "* | 64"),
    "prompt of 1 x 16384, `generate`": (GENERATION, OF_PROMPTS, "* | 1 x 16384, `generate`"),
    "prompt of 512 tokens, ms (Transformers' xLSTM computes the logits of all)": (
        ("On a CPU", OF_CPU, "7B style | prefill | * | value")
    ),
    "`generate` in bfloat16, ms a token": ("On a CPU", OF_CPU, "7B style | generate bf16 | * | value"),
    "training, tokens/s": ("On a CPU", OF_CPU, "7B style | train | * | value"),
    "training of 4 mLSTM and 2 sLSTM blocks, tokens/s": ("On a CPU", OF_CPU, "4 mLSTM, 2 sLSTM | train | * | value"),
    "xLSTM[1:0], 16 blocks": ("Bits per byte", {}, "xLSTM[1:0], 16 blocks | *"),
    "xLSTM[7:1], 16 blocks": ("Bits per byte", {}, "xLSTM[7:1], 16 blocks | *"),
    "xLSTM-7B's, 8 blocks": ("Bits per byte", {}, "xLSTM-7B's, 8 blocks | *"),
    "Llama, 8 blocks": ("Bits per byte", {}, "Llama, 8 blocks | *"),
    "xLSTM[0:1], only sLSTM": ("Regular languages", {}, "xLSTM[0:1], only sLSTM | *"),
    "xLSTM[1:1]": ("Regular languages", {}, "xLSTM[1:1] | *"),
    "xLSTM[1:0], only mLSTM": ("Regular languages", {}, "xLSTM[1:0], only mLSTM | *"),
    "Llama": ("Regular languages", {}, "Llama | *"),
}
NUMBERS = [
    pytest.param(row, column, cell, id=f"{row} | {column}")
    for table in read_tables(README)
    for row, *cells in table.rows
    for column, cell in zip(table.header[1:], cells, strict=True)
    if re.search(r"\b(?!2024 )\d", cell)  # but for the paper's year
]


def measured(heading: str, place: str) -> str:
    """The only cell in a section of benchmarks.md that has a place."""
    *start, column = place.split(" | ")
    (cell,) = [
        row[table.header.index(column)]
        for table in read_tables(section(MEASURED, heading))
        for row in table.rows
        if column in table.header and row[: len(start)] == start
    ]
    return cell


@pytest.mark.parametrize(("row", "column", "cell"), NUMBERS)
def test_numbers_of_the_readme_are_what_was_measured(row, column, cell):
    """The README may leave out the end of a cell, from a comma on."""
    assert row in PLACES, "has no place in benchmarks.md"
    heading, names, *places = PLACES[row]
    there = ", ".join(measured(heading, place.replace("*", names.get(column, column))) for place in places)
    assert f"{there}, ".startswith(f"{cell}, ")


def test_every_place_is_that_of_a_row_of_the_readme():
    assert PLACES.keys() == {number.values[0] for number in NUMBERS}


def conditions(text: str) -> set[str]:
    """Devices, versions and commands that a text names."""
    named = rf"{HARDWARE.pattern}|[\w-]+ \d+\.\d+\.\d+[\w+]*|`python -m [^`]+`"
    return set(re.findall(named, " ".join(text.split())))


@pytest.mark.parametrize("heading", ["Speed", "Accuracy"])
def test_a_table_of_the_readme_has_the_conditions_of_its_measurements(heading):
    tables = [pair for pair in pairwise(section(README, heading).split("\n\n")) if pair[1].startswith("|")]
    assert len(tables) == 2
    for above, table in tables:
        sections = {PLACES[row][0] for row, *_ in read_tables(table)[0].rows}
        assert conditions(above) == set.union(*(conditions(section(MEASURED, name)) for name in sections))


@pytest.mark.parametrize(
    ("words", "heading", "page", "there"),
    [
        ("mlstm_kernels 2.0.6", "What works", "benchmarks", "Kernels on a GPU"),
        ("flash-linear-attention 0.6.0", "What works", "benchmarks", "Kernels on a GPU"),
        ("400 M parameters", "Speed", "benchmarks", "Steps of training"),
        ("two cores of an AMD EPYC with AVX512-BF16", "Speed", "benchmarks", "On a CPU"),
        ("28 M parameters", "Accuracy", "benchmarks", "Bits per byte"),
        ("1000 steps of 64 x 512 tokens", "Accuracy", "benchmarks", "Bits per byte"),
        ("means of three seeds, least and most", "Accuracy", "benchmarks", "Bits per byte"),
        ("same GPU and versions; chance is 50, 20", "Accuracy", "benchmarks", "Regular languages"),
        ("13.7 GB in bfloat16", "xLSTM-7B", "checkpoints", "Load, save and convert"),
        ("117,894", "Speed", "benchmarks", "Steps of training"),
    ],
)
def test_sentences_of_the_readme_have_the_figures_of_the_pages(words, heading, page, there):
    for text in (section(README, heading), section(PAGES[f"notebooks/{page}.md"], there)):
        assert words in " ".join(text.split())


def test_the_page_of_the_configuration_is_what_is_generated():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m notebooks.reference`"


@pytest.mark.parametrize("row", rows(PAGES["notebooks/configuration.md"], "Presets"), ids=lambda row: row[0])
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
    listed = [row[0].strip("`") for row in rows(PAGES["notebooks/configuration.md"], "Presets")]
    assert listed == legal.split(", ")


def test_every_field_of_the_configuration_is_listed_with_its_default():
    listed = {row[0].strip("`"): row[2].strip("`") for row in rows(PAGES["notebooks/configuration.md"], "Fields")}
    config = XLSTMConfig()
    own = {field.name for field in dataclasses.fields(XLSTMConfig)} & {*XLSTMConfig.__annotations__} - {"model_type"}
    assert listed.keys() == own
    filled = {"block_types", "slstm_num_heads"}  # from other fields where they are None
    for name, default in listed.items():
        assert ast.literal_eval(default) == (None if name in filled else getattr(config, name)), name


def renamed(heading: str) -> set[str]:
    """The old names in the tables of a section of the page on migration."""
    return {name for old, *_ in rows(PAGES["notebooks/migration.md"], heading) for name in re.findall(r"`(\w+)`", old)}


def test_every_field_of_transformers_is_here_or_in_the_table_of_migration():
    theirs, ours = (set(config.__dataclass_fields__) for config in (xLSTMConfig, XLSTMConfig))
    assert theirs - ours <= renamed("From Transformers' own xLSTM")


@pytest.mark.skipif(not HAS_PEERS, reason="needs xlstm and mlstm_kernels")
def test_every_field_of_xlstm_large_is_here_or_in_the_table_of_migration():
    from xlstm.xlstm_large.model import xLSTMLargeConfig

    theirs, ours = (set(config.__dataclass_fields__) for config in (xLSTMLargeConfig, XLSTMConfig))
    assert theirs - ours <= renamed("From `xLSTMLarge` of `xlstm`")
