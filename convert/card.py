"""The card of a converted checkpoint."""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import modeling_xlstm

from .conversion import HUB_FORMATS, Conversion
from .errors import PARSER_ERRORS, ConversionError, one_line


ORIGINS = {
    "native": "`modeling_xlstm`",
    "transformers": "Transformers' own xLSTM",
    "transformers-fused": "Transformers' own xLSTM, with fused weights",
    "xlstm-large": "`xLSTMLarge` of the package `xlstm`",
    "xlstm-large-fused": "`xLSTMLarge` of the package `xlstm`, with fused weights",
    "xlstm-paper": "`xLSTMLMModel` of the package `xlstm`",
    "xlstm-paper-cuda": "`xLSTMLMModel` of the package `xlstm`, with the weights of its CUDA sLSTM",
}
USE = {
    "native": """With the package `modeling_xlstm` installed:

```python
import modeling_xlstm
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

Without it, `AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)` runs the copy of its code
(Apache-2.0) that is here. `AutoTokenizer` asks for that option too, though a tokenizer has no code here.
""",
    "transformers": """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

After `import modeling_xlstm`, the same line gives the faster and exact model of that package.
""",
    "xlstm-large": """With the files of this repository in a folder:

```python
from xlstm.xlstm_large.from_pretrained import load_from_pretrained

model = load_from_pretrained("path/of/the/folder")
```
""",
    "xlstm-large-fused": "Build `xLSTMLarge` from `config.yaml` and load the weights into it as a state dict.\n",
    "xlstm-paper": "Build `xLSTMLMModel` from `config.yaml` and load the weights into it as a state dict.\n",
}
USE["xlstm-paper-cuda"] = USE["xlstm-paper"]


SOURCE_CARD = "\n## Card of the source\n\n"


def model_card(conversion: Conversion, name: str, repo: str | None) -> str:
    """The text of README.md for the checkpoint `name`, in the repository `repo`: what it is, its source, and its use.

    The licence, languages and the like are those of the card of the source, whose text follows.

    Raises ConversionError if that card cannot be read.
    """
    source, config = conversion.source, conversion.config
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["xlstm"]}
    original = ""
    if path := source.file("README.md"):
        try:
            card = ModelCard(path.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True)
            of_source = card.data.to_dict()
            tags = {str(tag) for tag in of_source.get("tags") or []}
        except PARSER_ERRORS as error:
            raise ConversionError(f"The card {path} cannot be read: {one_line(error)}") from error
        data = {**of_source, **data, "tags": sorted({"xlstm", *tags})}
        original = card.text.split(SOURCE_CARD)[-1].strip()  # of a card made here, the one that it had from its source
    if source.repo and source.repo != repo:
        data["base_model"] = source.repo
    if conversion.to not in HUB_FORMATS:
        del data["library_name"]

    kinds = config.block_types or []
    at = f", sLSTM at {[i for i, kind in enumerate(kinds) if kind == 'slstm']}" if len(set(kinds)) > 1 else ""
    rows = {
        "architecture": f"xLSTM[{config.ratio}]{at}",
        "blocks": f"{len(kinds)}, of width {config.hidden_size}",
        "parameters": f"{conversion.parameters:,}",
        "vocabulary": f"{config.vocab_size:,}",
        "weights": f"{str(config.dtype).removeprefix('torch.')}, {conversion.shards.size:,} bytes",
        "format": ORIGINS[conversion.to],
        "converted from": f"the format of {ORIGINS[source.fmt]}" + (f", `{source.repo}`" if source.repo else ""),
        "by": f"`modeling_xlstm` {modeling_xlstm.__version__}; nothing is added, scaled or rounded"
        + (f" but to {str(conversion.dtype).removeprefix('torch.')}" if conversion.dtype else ""),
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
    notes = "".join(f"- {note}\n" for note in conversion.notes)
    body = f"# {name}\n\n{table}\n\n{notes}\n## Use\n\n{USE[conversion.to].format(name=name)}"
    if original:
        body += f"{SOURCE_CARD}{original}\n"
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{body}"
