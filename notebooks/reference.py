"""Writes `configuration.md`, the reference of `XLSTMConfig`, from its docstring: `python -m notebooks.reference`."""

import argparse
import dataclasses
import inspect
import re
from pathlib import Path

from modeling_xlstm import XLSTMConfig, count_parameters
from modeling_xlstm.configuration_xlstm import PAPER_SIZES


PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """\
# Configuration

This page is written by `python -m notebooks.reference`, from the docstring of
[`XLSTMConfig`](../modeling_xlstm/configuration_xlstm.py).

```python
from modeling_xlstm import XLSTMConfig

XLSTMConfig()  # xLSTM-7B
XLSTMConfig.from_ratio("7:1", hidden_size=512, num_hidden_layers=16)  # the 2024 paper's xLSTM[7:1], at any size
XLSTMConfig.preset("xlstm-125m-7:1", vocab_size=32000)  # a published size, with another vocabulary
XLSTMConfig(hidden_size=512, num_hidden_layers=3, block_types=["mlstm", "slstm", "mlstm"])  # any order
```

What cannot be built is refused with field, value and legal values ([`troubleshooting.md`](troubleshooting.md)).
Fields that every configuration of Transformers has, such as `dtype`, are not listed.
"""


def meanings() -> dict[str, str]:
    """What the docstring of `XLSTMConfig` says of each field, of those that it explains together the same."""
    text = (inspect.getdoc(XLSTMConfig) or "").partition("Args:\n")[2].partition("\nRaises:")[0]
    entries = re.findall(r"^    (\w[\w, ]*) \(.*?\):\s(.*?)(?=^    \w|\Z)", text, re.MULTILINE | re.DOTALL)
    return {name: " ".join(meaning.split()) for names, meaning in entries for name in names.split(", ")}


def type_of(field: dataclasses.Field) -> str:
    """The type of a field as a reader writes it: a float may be given as an integer."""
    name = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
    return name.replace("float | int", "float")


def default_of(field: dataclasses.Field) -> str:
    return f'"{field.default}"' if isinstance(field.default, str) else repr(field.default)


def table(*rows: tuple[str, ...]) -> str:
    """Rows of a Markdown table, the first of them its head."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def fields() -> str:
    """The table of the fields. Raises KeyError for one that the docstring does not explain."""
    explained = meanings()
    own = [field for field in dataclasses.fields(XLSTMConfig) if field.name in inspect.get_annotations(XLSTMConfig)]
    rows = [
        (f"`{field.name}`", f"`{type_of(field)}`", f"`{default_of(field)}`", explained[field.name])
        for field in own
        if field.name != "model_type"
    ]
    return table(("field", "type", "default", "meaning"), *rows)


def derived() -> str:
    """The table of what follows from the fields."""
    properties = {name: inspect.getdoc(x) or "" for name, x in vars(XLSTMConfig).items() if isinstance(x, property)}
    return table(("property", "meaning"), *((f"`{name}`", " ".join(text.split())) for name, text in properties.items()))


def presets() -> str:
    """The table of the published sizes."""
    rows = []
    for name in ["xlstm-7b", *(f"xlstm-{size}-{ratio}" for size in PAPER_SIZES for ratio in ("1:0", "7:1"))]:
        config = XLSTMConfig.preset(name)
        slstm = config.block_types.count("slstm")  # type: ignore[union-attr]
        sizes = (config.hidden_size, config.num_hidden_layers, slstm, f"{count_parameters(config):,}")
        rows.append((f"`{name}`", *map(str, sizes)))
    return table(("preset", "width", "blocks", "of them sLSTM", "parameters"), *rows)


def page() -> str:
    """The text of `configuration.md`."""
    sections = {"Fields": fields(), "Properties": derived(), "Presets": presets()}
    return "\n".join([INTRODUCTION, *(f"## {title}\n\n{text}\n" for title, text in sections.items())])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
