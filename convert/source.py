"""The checkpoint to convert: its files, weights, configuration and format. Nothing in it is executed or trusted.

Weights are read one by one when they are asked for: `Source.weights` is a mapping that loads on access, and
`Source.meta` comes from the headers alone.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modeling_xlstm.checkpoint_xlstm import detect
from modeling_xlstm.configuration_formats import shown

from .errors import HUB_ERRORS, PARSER_ERRORS, ConversionError, one_line


STATE_DICTS = (".bin", ".pt", ".pth", ".ckpt")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
SMALL_FILES = ("*.json", "*.yaml", "*.yml", "*.md", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")


class Weights(Mapping[str, Tensor]):
    """The weights of safetensors files, each loaded when it is asked for and held by nobody but the caller."""

    def __init__(self, files: Mapping[str, Path]):
        self.files = files

    def __getitem__(self, name: str) -> Tensor:
        path = self.files[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ConversionError(f"The weight {name} in {path} cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


@dataclass
class Source:
    """A checkpoint as found.

    `weights` by name; `meta`, the same on the device `meta`, with shape and dtype but no values; `config` as in its
    file; `fmt`, a format of `checkpoint_xlstm` or `"native"`; `repo`, the repository on the Hub that it comes from.
    """

    folder: Path
    weights: Mapping[str, Tensor]
    meta: dict[str, Tensor]
    config: dict[str, Any]
    fmt: str
    repo: str | None

    def file(self, name: str) -> Path | None:
        """The file of this name if the source has one. Raises ConversionError if it leads out of the folder."""
        path = self.folder / name
        return inside(self.folder, path) if path.is_file() else None


def open_source(source: str, config: str | None = None) -> Source:
    """The checkpoint in the folder, or the repository on the Hub, `source`; `config` is the file of its configuration.

    Raises ConversionError, in one sentence, if there is none or it cannot be read.
    """
    folder, repo = Path(source), None
    if folder.is_file():
        raise ConversionError(f"The source must be a folder, got the file {source}; give the folder that holds it.")
    if not folder.is_dir():
        folder, repo = download(source), source
    fields = read_config(find_config(folder, config))
    if "quantization_config" in fields:
        raise ConversionError("The weights must not be quantised, got a configuration with quantization_config.")
    if "transformers_weights" in fields:
        raise ConversionError("The weights must have the usual names, got a configuration with transformers_weights.")
    weights, meta = read_weights(folder)
    try:
        fmt = detect({name: weight.shape for name, weight in meta.items()})
    except ValueError as error:
        raise ConversionError(str(error)) from error
    check_config(fields, fmt)
    return Source(folder, weights, meta, fields, fmt, repo)


def download(repo: str) -> Path:
    """The folder of a repository on the Hub, downloaded into the cache of `huggingface_hub` as far as it is of use."""
    try:
        options: Any = {"ignore_patterns": ["*/*", "optimizer*", "scheduler*", "rng_state*"]}
        folder = Path(snapshot_download(repo, allow_patterns=[*SMALL_FILES, "*.safetensors"], **options))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(repo, allow_patterns=[f"*{suffix}" for suffix in STATE_DICTS], **options)
        return folder
    except HUB_ERRORS as error:
        raise ConversionError(
            f"The source must be a folder or a repository on the Hub, got {repo}, no folder here: {one_line(error)}"
        ) from error


def inside(folder: Path, path: Path) -> Path:
    """`path`, which may be a link within the folder. Raises ConversionError if it leads out of it.

    Snapshots in the cache of the Hub are links into the folder `blobs` beside all snapshots of a repository.
    """
    root = folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in roots):
        raise ConversionError(f"All files of the source must be in {folder}, got {path.name}, which leads to {target}.")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConversionError if there is none."""
    return _read_object(path, json.loads)


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a JSON or YAML file, in YAML of plain values only. Raises ConversionError if it is none."""
    if path.suffix == ".json":
        return read_json(path)
    return _read_object(path, lambda text: yaml.load(text, _PlainLoader))


class _PlainLoader(yaml.SafeLoader):
    """YAML of plain values, in which 1e-6 is a number as in JSON, and each is written out: a few lines of aliases of
    aliases can stand for more values than memory holds.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"it must hold no aliases, got *{self.peek_event().anchor}.")
        return super().compose_node(parent, index)


_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_object(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except PARSER_ERRORS as error:
        raise ConversionError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} must hold a mapping of names to values, got {type(value).__name__}.")
    return value


def find_config(folder: Path, config: str | None) -> Path:
    """The file of the configuration: the one named, or the one beside the weights."""
    if config is not None:
        if not Path(config).is_file():
            raise ConversionError(f"--config must name a file, got {config}, which is none.")
        return Path(config)
    for name in ("config.json", "config.yaml", "config.yml"):
        if (folder / name).is_file():
            return inside(folder, folder / name)
    raise ConversionError(f"{folder} must hold a config.json or config.yaml, got neither; --config names another.")


def check_config(config: Mapping[str, Any], fmt: str) -> None:
    """Raises ConversionError if the configuration is not one of the format that the weights have."""
    expected = {"native": "xlstm_lm", "transformers": "xlstm", "transformers-fused": "xlstm"}.get(fmt)
    if config.get("model_type") != expected:
        wanted = f"model_type {expected!r}" if expected else "no model_type, like its origin's own"
        raise ConversionError(
            f"The configuration of weights of format {fmt} must have {wanted}, got {config.get('model_type')!r}."
        )


def read_weights(folder: Path) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """All weights of a folder, and the same on the device `meta`. As Transformers, safetensors go first."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    safe = [name for name in names if name.endswith(".safetensors")]
    indexes = [name for name in names if name.endswith(".index.json")]
    dicts = [name for name in names if name.endswith(STATE_DICTS) and name != "training_args.bin"]
    if "model.safetensors" in safe:
        return read_safetensors(folder, ["model.safetensors"])
    if "model.safetensors.index.json" in indexes:
        return read_indexed(folder, "model.safetensors.index.json")
    if safe:
        return read_safetensors(folder, safe)
    if len(indexes) == 1:
        return read_indexed(folder, indexes[0])
    if "pytorch_model.bin" in dicts:
        return read_state_dicts(folder, ["pytorch_model.bin"])
    if len(dicts) == 1:
        return read_state_dicts(folder, dicts)
    got = f"several state dicts: {', '.join(dicts)}" if dicts else "no file of weights"
    raise ConversionError(
        f"{folder} must hold weights as *.safetensors or one state dict ({', '.join(STATE_DICTS)}), got {got}."
    )


def read_indexed(folder: Path, index: str) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """The weights of shards, which must hold exactly what their index says."""
    weight_map = read_json(inside(folder, folder / index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} must hold a weight_map of weights to files, got {type(weight_map).__name__}.")
    for file in set(map(str, weight_map.values())):
        if Path(file).name != file or not file.endswith((".safetensors", *STATE_DICTS)):
            raise ConversionError(f"The files in {index} must be names of files beside it, got {file!r:.200}.")
        if not (folder / file).is_file():
            raise ConversionError(f"{index} names the file {file}, which is not in {folder}.")
    files = sorted(set(weight_map.values()))
    read = read_safetensors if files[0].endswith(".safetensors") else read_state_dicts
    weights, meta = read(folder, files)
    if differing := sorted(weight_map.keys() ^ meta.keys()):
        where = "files" if differing[0] in meta else "index"
        raise ConversionError(
            f"{index} and its files must hold the same weights, got {differing[0]} in the {where} only."
        )
    return weights, meta


def read_safetensors(folder: Path, files: list[str]) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """The weights of safetensors files, of which only the headers are read here."""
    paths: dict[str, Path] = {}
    meta: dict[str, Tensor] = {}
    for file in files:
        path = inside(folder, folder / file)
        try:
            with safe_open(path, framework="pt") as opened:
                found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                found = {name: (x.get_shape(), x.get_dtype()) for name, x in found.items()}
        except (OSError, SafetensorError) as error:
            raise ConversionError(f"The weights in {file} cannot be read: {error}") from error
        if twice := found.keys() & paths.keys():
            raise ConversionError(f"Each weight must be in one file, got {min(twice)} in {file} and in another.")
        for name, (shape, dtype) in found.items():
            if dtype not in DTYPES:
                raise ConversionError(f"{shown(name)} must be of dtype {', '.join(DTYPES)}, got {dtype}.")
            paths[name] = path
            try:
                meta[name] = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
            except (RuntimeError, TypeError) as error:
                raise ConversionError(f"{shown(name)} in {file} has an impossible shape: {shape}.") from error
    return Weights(paths), meta


def read_state_dicts(folder: Path, files: list[str]) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """The weights of pickled state dicts, loaded with `weights_only`, which runs nothing; mapped, where they can be."""
    weights: dict[str, Tensor] = {}
    for file in files:
        path = inside(folder, folder / file)
        try:
            with warnings.catch_warnings():  # about old pickles, which load or are refused all the same
                warnings.simplefilter("ignore", UserWarning)
                state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise ConversionError(
                f"{file} must hold nothing but tensors, which is all that is loaded of a pickle, got others."
            ) from error
        except PARSER_ERRORS as error:
            raise ConversionError(f"The weights in {file} cannot be read: {one_line(error)}") from error
        if not isinstance(state_dict, dict):
            raise ConversionError(
                f"{file} must hold a state dict of names to tensors, got {type(state_dict).__name__}."
            )
        if numbers := [name for name in state_dict if not isinstance(name, str)]:
            raise ConversionError(f"{file} must hold a state dict of names to tensors, got the key {numbers[0]!r}.")
        if others := [name for name, x in state_dict.items() if not isinstance(x, Tensor)]:
            raise ConversionError(
                f"{file} must hold a state dict of names to tensors, got {type(state_dict[others[0]]).__name__} under "
                f"{others[0]!r}; save the state dict of the model by itself."
            )
        if twice := state_dict.keys() & weights.keys():
            raise ConversionError(f"Each weight must be in one file, got {min(twice)} in {file} and in another.")
        weights.update(state_dict)
    for name, weight in weights.items():
        if weight.dtype not in DTYPES.values() or weight.layout != torch.strided or weight.is_meta:
            got = f"{weight.dtype}, {weight.layout}" + (", without values" if weight.is_meta else "")
            raise ConversionError(f"{shown(name)} must be a dense tensor of a floating dtype, got {got}.")
    return weights, {name: torch.empty_like(weight, device="meta") for name, weight in weights.items()}
