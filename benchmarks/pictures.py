"""Draws the tables of `notebooks/benchmarks.md`: `python -m benchmarks pictures [NAME ...] [--page FILE] [--out DIR]`.

A picture has the name of the GPU that its table was measured on. The notebook `notebooks/speed.ipynb` draws the same,
and tables that a benchmark has just printed.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.command import command_line, run


ROOT = Path(__file__).parents[1]
PAGE, OUT = ROOT / "notebooks" / "benchmarks.md", ROOT / "notebooks" / "pictures"
EXAMPLES = """examples:
  python -m benchmarks pictures training generation --out pictures
"""
HARDWARE = re.compile(r"NVIDIA (?:[A-Z]\w* )*[A-Z]*\d+\w*(?: \d+GB)?(?: HBM\d\w*)?|AMD EPYC|Intel\S* Xeon\S*")
# Bars by what their names begin with: colours of Okabe and Ito, and hatches, which are there in print without colours.
STYLES = {
    "modeling_xlstm, ": ("#56B4E9", "//"),
    "modeling_xlstm": ("#0072B2", ""),
    "its steps alone": ("#56B4E9", "xx"),
    "Llama": ("#E69F00", "\\\\"),
    "Transformers xLSTM, kernels": ("#CC79A7", "--"),
    "Transformers xLSTM": ("#D55E00", "||"),
    "mlstm_kernels": ("#CC79A7", "--"),
    "flashrnn": ("#CC79A7", "//"),
    "simple_gla": ("#999999", "xx"),
    "attention": ("#E69F00", "\\\\"),
    "cuDNN": ("#E69F00", "\\\\"),
    "xLSTM[0:1]": ("#0072B2", ""),
    "xLSTM[1:1]": ("#56B4E9", "//"),
    "xLSTM[1:0]": ("#009E73", "xx"),
    "xLSTM-7B": ("#CC79A7", "--"),
}


class Table(NamedTuple):
    """A table of Markdown, and the hardware that was last named before it."""

    header: list[str]
    rows: list[list[str]]
    hardware: str


class Picture(NamedTuple):
    """Bars of a table, in groups by its columns, one for each row; or by rows with a second cell `only`, one for each
    column from the third on."""

    first: str  # cell of the header
    title: str
    label: str
    part: int = 0  # of a cell, between commas
    only: str | None = None


PICTURES = {
    "training": Picture("tokens/s, peak GiB", "Training, 400 M parameters", "tokens/s"),
    "memory": Picture("tokens/s, peak GiB", "Training, 400 M parameters", "peak GiB", part=1),
    "generation": Picture("tokens/s after the first", "Generation, 7 B parameters, by batch", "tokens/s"),
    "prompts": Picture("tokens/s of a prompt", "Reading a prompt, 7 B parameters", "tokens/s"),
    "mlstm": Picture(
        "batch x tokens, heads, key and value dim", "mLSTM, forward + backward", "ms", only="forward + backward"
    ),
    "slstm": Picture("batch x tokens, heads x head dim", "sLSTM, forward + backward", "ms", only="forward + backward"),
    "languages": Picture("model", "Regular languages, after the 40th symbol", "% right", part=1),
}


def read_tables(text: str) -> list[Table]:
    """The tables of a page or of what a benchmark printed. An empty first cell is that of the row above."""
    tables: list[Table] = []
    hardware, inside = ["unknown"], False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            hardware += HARDWARE.findall(line)
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not inside:
            tables.append(Table(cells, [], hardware[-1]))
        elif not set(line) <= set("|-: "):
            rows = tables[-1].rows
            rows.append([cells[0] or rows[-1][0] if rows else cells[0], *cells[1:]])
        inside = True
    return tables


def number(cell: str, part: int = 0) -> float:
    """What is before the first blank of a part of a cell, NaN if it is not a number."""
    parts = cell.split(", ")
    text = parts[part].split(" ")[0].strip("*").replace(",", "") if part < len(parts) else ""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else math.nan


def cells_of(table: Table, picture: Picture) -> tuple[list[str], dict[str, list[str]]]:
    """Names of groups, and of each bar its cells in them; bars without any are left out."""
    if picture.only is None:
        groups, bars = table.header[1:], {row[0]: row[1:] for row in table.rows}
    else:
        chosen = [row for row in table.rows if row[1:2] == [picture.only]]
        groups = [row[0] for row in chosen]
        bars = {name: [row[i] for row in chosen] for i, name in enumerate(table.header[2:], 2)}
    return groups, {name: cells for name, cells in bars.items() if any(cells)}


def bars_of(table: Table, picture: Picture) -> tuple[list[str], dict[str, list[float]]]:
    """Names of groups, and of each bar its heights in them, NaN where a cell is no number."""
    groups, bars = cells_of(table, picture)
    return groups, {name: [number(cell, picture.part) for cell in cells] for name, cells in bars.items()}


def plain(text: str) -> str:
    """Text of a cell without marks of code."""
    return text.replace("`", "")


def draw(axes: Any, table: Table, picture: Picture) -> None:
    """Draws a table on axes of matplotlib."""
    groups, bars = cells_of(table, picture)
    width = 0.85 / len(bars)
    for i, (name, cells) in enumerate(bars.items()):
        heights = [number(cell, picture.part) for cell in cells]
        at = [group + (i - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        color, hatch = next((style for start, style in STYLES.items() if name.startswith(start)), ("#FFFFFF", "++"))
        style = {"color": color, "hatch": hatch, "edgecolor": "black", "linewidth": 0.5}
        drawn = axes.bar(at, [0 if math.isnan(x) else x for x in heights], width, label=plain(name), **style)
        texts = [plain(cell) if math.isnan(x) else short(x) for x, cell in zip(heights, cells, strict=True)]
        axes.bar_label(drawn, texts, fontsize=7, rotation=90, padding=2)
    axes.set_xticks(range(len(groups)), [plain(group).replace(", ", ",\n") for group in groups], fontsize=8)
    axes.set_ylabel(picture.label)
    axes.set_title(f"{picture.title} ({table.hardware})", fontsize=10)
    axes.margins(y=0.2)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def short(x: float) -> str:
    """A number as it is written on its bar."""
    return f"{x / 1000:.1f}k" if x >= 10000 else f"{x:.4g}"


def find(tables: Sequence[Table], picture: Picture) -> Table | None:
    """The table of a picture, if it is among these."""
    for table in tables:
        if table.header[0] == picture.first:
            _, bars = bars_of(table, picture)
            if not all(math.isnan(x) for heights in bars.values() for x in heights):
                return table
    return None


def build_parser() -> argparse.ArgumentParser:
    parser = command_line("pictures", __doc__, EXAMPLES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)} (default: all)")
    parser.add_argument(
        "--page", type=Path, default=PAGE, metavar="FILE", help="with the tables (notebooks/benchmarks.md)"
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where the files go (notebooks/pictures)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if unknown := set(args.names) - set(PICTURES):
        parser.error(f"NAME must be one of {', '.join(PICTURES)}, got {', '.join(sorted(unknown))}.")
    if not args.page.is_file():
        parser.error(f"--page must be a file, got {args.page}, which is not one.")
    try:
        import matplotlib  # here, as the notebook's tables can be read without it
        from matplotlib.figure import Figure
    except ImportError:
        parser.error("Pictures need matplotlib, which is not installed: pip install matplotlib.")
    try:
        tables = read_tables(args.page.read_text(encoding="utf-8"))
        args.out.mkdir(parents=True, exist_ok=True)
    except UnicodeDecodeError:
        parser.error(f"--page must be a text with tables, got {args.page}, which is none.")
    except OSError as error:
        parser.error(f"--out must be a folder that can be made, got {args.out}: {error.strerror}.")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "modeling_xlstm"})
    for name in args.names or PICTURES:
        table = find(tables, PICTURES[name])
        if table is None:
            sys.exit(f"{args.page} must have a table that begins with {PICTURES[name].first!r}, got none.")
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        draw(figure.subplots(), table, PICTURES[name])
        figure.savefig(args.out / f"{name}.svg", metadata={"Date": None})
        print(args.out / f"{name}.svg")


if __name__ == "__main__":
    run(main)
