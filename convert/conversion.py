"""From a checkpoint of one format to a checkpoint of another: weights one by one, then all that belongs to them."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from modeling_xlstm import XLSTMConfig
from modeling_xlstm.checkpoint_xlstm import (
    LAYOUTS,
    WeightNamesError,
    config_from,
    embedding_name,
    read_rows,
    write_rows,
)
from modeling_xlstm.checks import is_finite
from modeling_xlstm.configuration_formats import fields_to, shown
from modeling_xlstm.modeling_xlstm import weight_shapes

from .destination import Shards
from .errors import PARSER_ERRORS, ConversionError, one_line
from .remote_code import AUTO_MAP, code_files
from .source import TOKENIZER_FILES, Source, read_json


# What can be written. The model class of transformers-fused cannot be built where it comes from.
FORMATS = ("native", *(fmt for fmt in LAYOUTS if fmt != "transformers-fused"))
HUB_FORMATS = ("native", "transformers")  # those with a config.json for AutoModel
MAX_SHARD_SIZE = "2GB"
TOKENS = ("bos", "eos", "pad")


@dataclass
class Conversion:
    """What is to be written, worked out and checked before a byte of it is.

    `notes` are sentences about decisions that the source alone does not explain.
    """

    source: Source
    to: str
    config: XLSTMConfig
    dtype: torch.dtype | None
    shards: Shards
    shapes: dict[str, torch.Size]
    generation: GenerationConfig
    notes: list[str]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of the destination, computed from those of the source as they are asked for."""
        native = read_rows(self.source.weights, self.config, self.source.fmt, self.shapes)
        native = finite(cast(native, self.dtype, self.to, self.config))
        try:
            yield from write_rows(native, self.config, self.to, self.shapes)
        except ValueError as error:  # about values, of which headers say nothing
            raise ConversionError(one_line(error)) from error

    def write(self, folder: Path, card: str) -> None:
        """Writes all files of the destination, with the text of its card, into an empty folder."""
        self.shards.write(self.weights(), folder)
        if index := self.shards.index:
            write_json(folder / "model.safetensors.index.json", index)
        self.write_config(folder)
        for file in TOKENIZER_FILES:
            if path := self.source.file(file):
                shutil.copyfile(path, folder / file)
        for found in self.source.folder.iterdir():
            if found.name.upper().startswith(("LICENSE", "NOTICE")) and (path := self.source.file(found.name)):
                shutil.copyfile(path, folder / found.name)
        for path in (self.source.folder / "additional_chat_templates").glob("*.jinja"):
            if template := self.source.file(f"additional_chat_templates/{path.name}"):
                (folder / "additional_chat_templates").mkdir(exist_ok=True)
                shutil.copyfile(template, folder / "additional_chat_templates" / path.name)
        if self.to == "native":
            for path in code_files():
                shutil.copyfile(path, folder / path.name)
        readme = folder / "README.md"
        readme.write_text(card, encoding="utf-8")
        for file in self.shards.files:  # which safetensors lets nobody else read
            shutil.copymode(readme, folder / file)

    def write_config(self, folder: Path) -> None:
        """Writes the configuration as the code of the format reads it, and how to generate."""
        if self.to == "native":
            fields = self.config.to_diff_dict()
            write_json(folder / "config.json", {**fields, "auto_map": AUTO_MAP})
        elif self.to == "transformers":
            write_json(folder / "config.json", fields_to(self.config, self.to))
        else:
            text = yaml.safe_dump(fields_to(self.config, self.to), sort_keys=False)
            (folder / "config.yaml").write_text(text, encoding="utf-8")
        if self.to in HUB_FORMATS:
            self.generation.to_json_file(folder / "generation_config.json")  # save_pretrained judges what it saves

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        tied = self.config.tie_word_embeddings
        return sum(shape.numel() for name, shape in self.shapes.items() if not (tied and name == "lm_head.weight"))


def prepare(source: Source, to: str, dtype: torch.dtype | None, max_shard_size: int | str) -> Conversion:
    """Everything about the conversion that can be known from headers and small files.

    Raises ConversionError, in one sentence, if the source is not whole or the format `to` cannot express the model.
    """
    notes: list[str] = []
    check_depth(source)
    try:
        config = read_model_config(source, notes)
        shapes = weight_shapes(config)
    except PARSER_ERRORS as error:
        raise ConversionError(f"The configuration must be that of an xLSTM: {one_line(error)}") from error
    try:
        notes += lost_fields(config, to)
        native = read_rows(source.meta, config, source.fmt, shapes)
        target = dict(write_rows(cast(native, dtype, to, config), config, to, shapes))
    except WeightNamesError as error:
        details = [f"missing in the source: {shown(name)}" for name in sorted(error.missing)]
        details += [f"left over in the source: {shown(name)}" for name in sorted(error.unexpected)]
        raise ConversionError(str(error), details) from error
    except ValueError as error:
        raise ConversionError(one_line(error)) from error
    config.dtype = target[embedding_name(to)].dtype
    config.architectures = ["XLSTMForCausalLM"]
    generation = read_generation(source, config, read_tokenizer(source), notes)
    try:
        shards = Shards(target, to, max_shard_size)
    except (ValueError, OverflowError) as error:
        raise ConversionError(f"--max-shard-size must be a size such as 500MB, got {max_shard_size}.") from error
    return Conversion(source, to, config, dtype, shards, shapes, generation, notes)


def check_depth(source: Source) -> None:
    """Raises ConversionError if the configuration has more blocks than the weights: a stack that is not even built."""
    found = {int(match[1]) for name in source.meta if (match := re.search(r"\.(?:blocks|layers)\.(\d+)\.", name))}
    fields = [source.config.get(field) for field in ("num_blocks", "num_hidden_layers")]
    blocks = next((value for value in fields if isinstance(value, int)), 0)
    if blocks > len(found):
        raise ConversionError(f"The weights must be those of {blocks} blocks, as many as configured, got {len(found)}.")


def lost_fields(config: XLSTMConfig, to: str) -> list[str]:
    """Sentences about the fields that come back as something else when what is written in the format `to` is read.

    Raises ValueError if the format cannot express the model.
    """
    if to == "native":
        return []
    tokens = {f"{token}_token_id" for token in TOKENS}  # which may come from a tokenizer
    again = config_from(fields_to(config, to), to)
    values = {
        name: (getattr(config, name), getattr(again, name)) for name in XLSTMConfig.__annotations__.keys() - tokens
    }
    return [
        f"{name} is {value!r}, of which the format {to} knows nothing: it reads as {read!r}."
        for name, (value, read) in sorted(values.items())
        if value != read
    ]


def cast(
    native: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, to: str, config: XLSTMConfig
) -> Iterator[tuple[str, Tensor]]:
    """The weights in `dtype`. Those of gates that a model of this package keeps in float32 do not lose precision."""
    for name, weight in native:
        kept = to == "native" and config.keep_gates_in_fp32 and re.search(r"\.gate_(proj|weight|bias)\b", name)
        if dtype is None or (kept and torch.finfo(dtype).bits < torch.finfo(weight.dtype).bits):
            yield name, weight
        else:
            yield name, weight.to(dtype)


def finite(native: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights as they are. Raises ConversionError at the first that holds NaN or infinity."""
    for name, weight in native:
        if not is_finite(weight):
            raise ConversionError(
                f"All weights must be finite in {weight.dtype}, got NaN or infinity in what becomes {name}."
            )
        yield name, weight


def read_model_config(source: Source, notes: list[str]) -> XLSTMConfig:
    """The configuration of the model that the source holds, by its configuration and, where it errs, its weights."""
    if source.fmt == "native":
        return XLSTMConfig.from_dict(dict(source.config))
    config = config_from(source.config, source.fmt)
    down = source.meta.get("backbone.blocks.0.ffn.proj_down.weight")
    if down is not None and down.dim() == 2 and down.shape[1] != config.ffn_size:
        notes.append(f"The feed-forwards have the width {down.shape[1]} of the weights, not {config.ffn_size}.")
        config.ffn_proj_factor = down.shape[1] / config.hidden_size
        config.ffn_round_up_to_multiple_of = 1
    embedding = embedding_name(source.fmt)
    if not source.fmt.startswith("xlstm-paper") and {"lm_head.weight", embedding} <= source.meta.keys():
        same = torch.equal(source.weights["lm_head.weight"], source.weights[embedding])
        if config.tie_word_embeddings and not same:  # which the model of Transformers takes no notice of
            notes.append("tie_word_embeddings is False: the weights of embedding and lm_head differ.")
        if same and not config.tie_word_embeddings and source.fmt.startswith("xlstm-large"):  # which has no such field
            notes.append("tie_word_embeddings is True: the weights of embedding and lm_head are the same.")
            config.tie_word_embeddings = True
        config.tie_word_embeddings &= same
    return config


def read_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the source, if it has one. Raises ConversionError if it cannot be read."""
    found = [name for name in TOKENIZER_FILES if source.file(name)]
    if not {"tokenizer.json", "tokenizer_config.json"} & set(found):
        return None
    refusal = f"The tokenizer in {source.folder} cannot be read"
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except PARSER_ERRORS as error:
        raise ConversionError(f"{refusal}: {one_line(error)}") from error
    except Exception as error:
        if type(error) is Exception:  # all that the library behind tokenizer.json raises
            raise ConversionError(f"{refusal}: {one_line(error)}") from error
        raise


def read_generation(
    source: Source, config: XLSTMConfig, tokenizer: PreTrainedTokenizerBase | None, notes: list[str]
) -> GenerationConfig:
    """How the source generates, with the special tokens of its tokenizer, which `config` gets too."""
    tokens = {f"{token}_token_id": getattr(config, f"{token}_token_id") for token in TOKENS}
    path = source.file("generation_config.json")
    settings = read_json(path) if path else {}
    try:
        generation = GenerationConfig(**{**tokens, **settings})
        for token in TOKENS if tokenizer is not None else ():
            take_token(f"{token}_token_id", token, tokenizer, generation, config, notes)
        generation.to_json_string()
    except PARSER_ERRORS as error:
        what = path or "The special tokens of the tokenizer"
        raise ConversionError(f"{what} cannot be used: {one_line(error)}") from error
    if tokenizer is None:
        notes.append(f"There is no tokenizer to ask: eos_token_id stays {generation.eos_token_id}.")
    elif len(tokenizer) > config.vocab_size:
        notes.append(f"The tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size}.")
    return generation


def take_token(
    field: str, token: str, tokenizer: Any, generation: GenerationConfig, config: XLSTMConfig, notes: list[str]
) -> None:
    """Sets a special token to that of the tokenizer, if it has one, and notes what it was."""
    new, old = getattr(tokenizer, field), getattr(generation, field)
    if new is None:
        return
    if not (isinstance(old, list) and new in old):  # chat models may stop at several tokens
        setattr(generation, field, new)
    kept = getattr(generation, field)
    if old not in (None, kept) or token == "eos":
        other = [] if old in (None, kept) else old if isinstance(old, list) else [old]
        had = ", not " * bool(other) + " or ".join(f"{x}, {_word(tokenizer, x)}" for x in other)
        notes.append(f"{field} is {kept}, the tokenizer's {_word(tokenizer, new)}{had}.")
    setattr(config, field, kept)


def _word(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens(token))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object to a new file."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
