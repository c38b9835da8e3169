"""What must hold of a model that was loaded from files, by a second, plain reader of the same files.

`read` and `fields_of` read with Python's `json`, PyYAML, `load_file` of safetensors, `torch.load`, and for a
configuration of Transformers its `xLSTMConfig`. Of this package they use the names of fields, and no code. Judges raise
an AssertionError that says what is wrong.
"""

import json
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from traceback import walk_tb
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import xLSTMConfig

from modeling_xlstm import XLSTMConfig
from modeling_xlstm.configuration_formats import SHARED, SHARED_FLOATS


ROOT = Path(__file__).parents[1]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# A second reader.

READING_ERRORS = (
    OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ArithmeticError, EOFError,
    SafetensorError, yaml.YAMLError, pickle.UnpicklingError, StrictDataclassError,
)  # fmt: skip


class Reading(NamedTuple):
    """What files say: weights by name, what is written in the configuration, and the fields that it stands for."""

    weights: dict[str, Tensor]
    config: dict[str, Any]
    fields: dict[str, Any]


def read(folder: Path, origin: str = "", confined: bool = False, weights: bool = True) -> Reading:
    """All of it. Raises one of `READING_ERRORS` unless it is clear which model it is."""
    config = read_config(folder)
    return Reading(read_weights(folder, confined) if weights else {}, config, fields_of(config, origin))


def read_config(folder: Path) -> dict[str, Any]:
    path = next(folder / name for name in ("config.json", "config.yaml", "config.yml", "") if (folder / name).is_file())
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json" and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
        raise ValueError("aliases, which may stand for any number of values")
    config = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(config, dict):
        raise ValueError("no mapping of names to values")
    return config


def read_weights(folder: Path, confined: bool) -> dict[str, Tensor]:
    """Of the files that a loader finds first; `confined`, if none of them leads out of the folder."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder, confined):
        if not path.is_file() or (confined and not path.resolve().is_relative_to(folder.resolve())):
            raise ValueError(f"{path.name} is no file of the folder")
        pickled = not path.name.endswith(".safetensors")
        found = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
        if any(not torch.equal(found[name], weights[name]) for name in found.keys() & weights.keys()):
            raise ValueError("two values of a weight")
        weights.update(found)
    return weights


def weight_files(folder: Path, is_converted: bool) -> list[Path]:
    patterns = ["model.safetensors", "model.safetensors.index.json"]
    patterns += ["*.safetensors", "*.index.json"] * is_converted
    patterns += ["pytorch_model.bin", "*.bin", "*.[cp]*t*"]
    files = next(files for name in patterns if (files := [path for path in folder.glob(name) if path.is_file()]))
    if not files[0].name.endswith(".index.json"):
        return files
    return [folder / name for name in sorted(set(json.loads(files[0].read_bytes())["weight_map"].values()))]


SAME = (*SHARED, *SHARED_FLOATS)  # fields that are called the same in `xLSTMConfig` and `xLSTMLargeConfig`
OF_PACKAGE = {"embedding_dim": "hidden_size", "num_blocks": "num_hidden_layers"}
OF_PAPER = {"vocab_size": "vocab_size", "tie_weights": "tie_word_embeddings", "add_post_blocks_norm": "add_out_norm"}
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def fields_of(config: dict[str, Any], origin: str) -> dict[str, Any]:
    """The fields of an `XLSTMConfig`; of a configuration of the package `xlstm` those that it tells at the top."""
    if origin.startswith("xlstm"):
        names = OF_PACKAGE | (OF_PAPER if origin == "xlstm-paper" else {name: name for name in SAME})
        fields = {names[name]: value for name, value in config.items() if name in names}
        is_text = {name for name, value in fields.items() if name in SHARED_FLOATS and isinstance(value, str)}
        return fields | {name: float(fields[name]) for name in is_text}  # 1e-6 is a text in YAML, but not in ours
    if config.get("model_type") == "xlstm":
        theirs = {**xLSTMConfig().to_dict(), **config}

        def first(*names: str) -> Any:  # of those that are given
            return next(
                (config[name] for name in names if config.get(name) is not None), xLSTMConfig().to_dict()[names[0]]
            )

        width, blocks = first("hidden_size", "embedding_dim"), first("num_blocks", "num_hidden_layers")
        fields = {name: theirs[name] for name in (*SAME, *TOKENS, "tie_word_embeddings")}
        fields |= {
            "hidden_size": width,
            "num_hidden_layers": blocks,
            "block_types": config.get("block_types") or ["mlstm"] * blocks,
        }
        fields["mlstm_input_gate"] = "sigmoid" if "siging" in str(config.get("chunkwise_kernel")) else "exp"
        return fields | {"mlstm_block": "post_up", "norm_type": "rms_norm", "add_out_norm": True}
    own: dict[str, Any] = {name: config.get(name, getattr(XLSTMConfig, name)) for name in XLSTMConfig.__annotations__}
    if own["block_types"] is None:
        own["block_types"] = ["mlstm"] * own["num_hidden_layers"]
    if own["slstm_num_heads"] is None:
        own["slstm_num_heads"] = own["num_heads"]
    return own


# Judges.


class Layout(NamedTuple):
    """Which weights of files become which of a model: shapes in the files, and numbers that count them all from 1."""

    shapes: dict[str, torch.Size]
    ids: dict[str, Tensor]


def bare(name: Any) -> str:
    return re.sub(r"^(?:model\.|backbone\.)+", "", str(name))


def bits(x: Tensor) -> Tensor:
    return x.double().contiguous().view(torch.int64)


def judge_weights(model: Any, info: dict[str, Any], weights: dict[str, Tensor], layout: Layout) -> None:
    """Every weight of `model` is made of those in files, or `info` says that it is not.

    As in Transformers, names of a language model may have the prefix of a stack, or lack it.
    """
    weights = {bare(name): x for name, x in weights.items()}
    parts, known = [torch.zeros(1, dtype=torch.float64)], [torch.ones(1, dtype=torch.bool)]
    for name, shape in layout.shapes.items():
        x = weights.get(name, torch.empty(0))
        there = x.shape == shape and x.dtype in DTYPES and bool(x.isfinite().all())
        parts.append((x if there else torch.zeros(shape)).double().flatten())
        known.append(torch.full((shape.numel(),), there))
    values, is_known = torch.cat(parts), torch.cat(known)
    is_used = torch.zeros(len(values), dtype=torch.bool)
    for name, weight in model.state_dict().items():
        if name in info["missing_keys"]:
            continue
        ids = layout.ids.get(name)
        assert ids is not None and ids.shape == weight.shape, f"nothing in the files is {name} {list(weight.shape)}"
        assert is_known[ids].all(), f"{name} is of weights that are not in the files"
        assert torch.equal(bits(weight), bits(values[ids].to(weight.dtype))), f"{name} is not what the files say"
        is_used[ids] = True
    sizes = [shape.numel() for shape in layout.shapes.values()]
    unused = {name for name, part in zip(layout.shapes, is_used[1:].split(sizes), strict=True) if not part.all()}
    aside = (weights.keys() - layout.shapes.keys()) | (unused & weights.keys())
    assert not aside or info["unexpected_keys"], f"{min(aside)} is left aside in silence"


def judge_fields(config: XLSTMConfig, fields: dict[str, Any], free: Collection[str] = ()) -> None:
    for name, expected in fields.items():
        got = getattr(config, name)
        is_same = got == expected and isinstance(got, bool) == isinstance(expected, bool)
        assert is_same or name in free, f"{name} is {got!r:.80}, the file says {expected!r:.80}"


def untied(weights: dict[str, Tensor]) -> set[str]:
    """The field that says that embeddings are tied, where a file holds two that differ: they are two then."""
    heads = [
        weights[name]
        for name in weights
        if name.endswith(("lm_head.weight", "embed_tokens.weight", "embeddings.weight"))
    ]
    return {"tie_word_embeddings"} if len(heads) == 2 and not torch.equal(*heads) else set()


OURS = {str(ROOT / name): name for name in ("modeling_xlstm", "convert")}
THEIRS = {f"/{name}/": name for name in ("transformers", "huggingface_hub", "safetensors", "tokenizers", "peft")}
SENTENCE = r"[^\n]{12,}[.?]"


class RefusedError(Exception):
    """What `convert` returned and printed."""


def judge_error(error: BaseException) -> str:
    """Whose it is and of which type, if it is what a user may see."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    files = [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]
    owners = (name for file in reversed(files) for part, name in (OURS | THEIRS).items() if part in file)
    owner = next(owners, "python")
    said = f"{owner} raised {type(error).__name__}: {error!s:.300}"
    assert isinstance(error, Exception), said
    assert not isinstance(error, MemoryError) and "allocate" not in str(error), said
    if isinstance(error, RefusedError):
        code, line = error.args
        assert code == 1 and re.fullmatch(r"error: [^\n]{12,}", line) and len(line) < 5000, f"{code}, {line:.300}"
    elif owner in OURS.values():
        is_helpful = isinstance(error, ValueError | TypeError | AttributeError) and not isinstance(error, UnicodeError)
        assert isinstance(error, OSError) or (is_helpful and re.fullmatch(SENTENCE, str(error))), said
    return f"{owner} {type(error).__name__}"
