"""The pictures of the benchmarks show the numbers that their tables have."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.pictures import (
    OUT,
    PAGE,
    PICTURES,
    ROOT,
    STYLES,
    Table,
    bars_of,
    cells_of,
    find,
    main,
    number,
    read_tables,
    short,
)


TEXT = """Measured on an NVIDIA H100 80GB HBM3, beside an AMD EPYC.

| tokens/s, peak GiB | 8 x 2048 | 1 x 32768 |
|---|---|---|
| ours | 150,422, 18.7 | 154755, 35.1 |
| theirs | out of memory | |

| batch x tokens, heads x head dim | pass | ours | theirs |
|---|---|---|---|
| 16 x 1024, 4 x 192 | forward | 1.90 | 13.0 |
| | forward + backward | 4.65 | refuses |
"""


def texts(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))


def test_tables_are_read_with_their_hardware_and_cells_that_are_not_repeated():
    first, second = read_tables(TEXT)
    assert first.header == ["tokens/s, peak GiB", "8 x 2048", "1 x 32768"]
    assert first.hardware == "AMD EPYC"
    assert second.rows[1] == ["16 x 1024, 4 x 192", "forward + backward", "4.65", "refuses"]
    assert read_tables("| a |\n|---|\n") == [Table(["a"], [], "unknown")]


@pytest.mark.parametrize(
    ("cell", "part", "value"),
    [
        ("150,422, 18.7", 0, 150422),
        ("150422, 18.7", 1, 18.7),
        ("100.0, **99.5** (98.7 to 100.0)", 1, 99.5),
        ("3", 1, math.nan),
    ],
)
def test_a_cell_is_the_number_that_it_begins_with(cell, part, value):
    assert number(cell, part) == pytest.approx(value, nan_ok=True)


def test_bars_are_models_or_implementations():
    tables = read_tables(TEXT)
    groups, bars = bars_of(find(tables, PICTURES["memory"]), PICTURES["memory"])
    assert groups == ["8 x 2048", "1 x 32768"]
    assert bars == {"ours": [18.7, 35.1], "theirs": pytest.approx([math.nan] * 2, nan_ok=True)}
    groups, bars = bars_of(find(tables, PICTURES["slstm"]), PICTURES["slstm"])
    assert groups == ["16 x 1024, 4 x 192"]
    assert bars == {"ours": [4.65], "theirs": pytest.approx([math.nan], nan_ok=True)}
    assert cells_of(tables[0], PICTURES["memory"])[1]["theirs"] == ["out of memory", ""]
    assert cells_of(tables[1], PICTURES["slstm"])[1]["theirs"] == ["refuses"]
    assert find(tables, PICTURES["languages"]) is None


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_is_kept_is_that_of_its_table(name, tmp_path):
    main([name, "--out", str(tmp_path)])
    drawn = texts(OUT / f"{name}.svg")
    assert drawn == texts(tmp_path / f"{name}.svg"), "run `python -m benchmarks pictures`"
    table = find(read_tables(PAGE.read_text(encoding="utf-8")), PICTURES[name])
    _, bars = bars_of(table, PICTURES[name])
    assert {short(x) for heights in bars.values() for x in heights if not math.isnan(x)} <= set(drawn)
    assert any("NVIDIA H100" in text for text in drawn)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["speed"], "NAME must be one of training"),
        (["--page", "none.md"], "--page must be a file, got none.md"),
        (["training", "--page", "README.md"], "must have a table that begins with"),
        (["slstm", "--page", "narrow.md"], "must have a table that begins with"),
        (["training", "--page", "numbers"], "--page must be a text with tables, got numbers"),
        (["training", "--out", "README.md"], "--out must be a folder that can be made, got README.md: File exists."),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, sentence, tmp_path):
    (tmp_path / "README.md").write_text("no table")
    (tmp_path / "narrow.md").write_text("| batch x tokens, heads x head dim |\n|---|\n| a |\n")
    (tmp_path / "numbers").write_bytes(b"\xff\xfe")
    command = [sys.executable, "-m", "benchmarks.pictures", *arguments]
    run = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode in (1, 2)
    assert sentence in run.stderr
    assert "Traceback" not in run.stderr


def test_bars_are_told_apart_without_colours():
    tables = read_tables(PAGE.read_text(encoding="utf-8"))
    for picture in PICTURES.values():
        _, bars = bars_of(find(tables, picture), picture)
        styles = [next(style for start, style in STYLES.items() if name.startswith(start)) for name in bars]
        assert len({hatch for _, hatch in styles}) == len(styles), picture


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090", "NVIDIA RTX A6000", "AMD EPYC"])
def test_hardware_is_known_by_its_name(name):
    assert read_tables(f"by {name}, torch 2.11\n| a |\n|---|\n")[0].hardware == name
