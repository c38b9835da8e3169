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
from huggingface_hub.errors import StrictDataclassError
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
from modeling_xlstm.configuration_formats import fields_to
from modeling_xlstm.modeling_xlstm import weight_shapes

from .destination import Shards
from .errors import ConversionError, one_line
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
    tokenizer: PreTrainedTokenizerBase | None
    generation: GenerationConfig
    notes: list[str]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of the destination, computed from those of the source as they are asked for."""
        native = finite(read_rows(self.source.weights, self.config, self.source.fmt, self.shapes))
        return write_rows(cast(native, self.dtype, self.to, self.config), self.config, self.to, self.shapes)

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
    try:
        config = read_model_config(source, notes)
        shapes = weight_shapes(config)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise ConversionError(f"The configuration must be that of an xLSTM: {one_line(cause)}") from error
    try:
        if to != "native":
            fields_to(config, to)
        native = read_rows(source.meta, config, source.fmt, shapes)
        target = dict(write_rows(cast(native, dtype, to, config), config, to, shapes))
    except WeightNamesError as error:
        details = [f"missing in the source: {name}" for name in sorted(error.missing)]
        details += [f"left over in the source: {name}" for name in sorted(error.unexpected)]
        raise ConversionError(str(error), details) from error
    except ValueError as error:
        raise ConversionError(one_line(error)) from error
    tokenizer = read_tokenizer(source)
    config.dtype = target[embedding_name(to)].dtype
    config.architectures = ["XLSTMForCausalLM"]
    generation = read_generation(source, config, tokenizer, notes)
    try:
        shards = Shards(target, to, max_shard_size)
    except ValueError as error:
        raise ConversionError(f"--max-shard-size must be a size such as 500MB, got {max_shard_size}.") from error
    return Conversion(source, to, config, dtype, shards, shapes, tokenizer, generation, notes)


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
            raise ConversionError(f"All weights must be finite, got NaN or infinity in what becomes {name}.")
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
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConversionError(f"The tokenizer in {source.folder} cannot be read: {one_line(error)}") from error


def read_generation(
    source: Source, config: XLSTMConfig, tokenizer: PreTrainedTokenizerBase | None, notes: list[str]
) -> GenerationConfig:
    """How the source generates, with the special tokens of its tokenizer, which `config` gets too."""
    tokens = {f"{token}_token_id": getattr(config, f"{token}_token_id") for token in TOKENS}
    generation = GenerationConfig(**tokens)
    if path := source.file("generation_config.json"):
        try:
            generation = GenerationConfig(**{**tokens, **read_json(path)})
        except (ValueError, TypeError) as error:
            raise ConversionError(f"{path} cannot be read: {one_line(error)}") from error
    if tokenizer is None:
        notes.append(f"There is no tokenizer: eos_token_id {generation.eos_token_id} is that of the source.")
        return generation
    for token in TOKENS:
        field = f"{token}_token_id"
        new, old = getattr(tokenizer, field), getattr(generation, field)
        if new is None:
            continue
        if not (isinstance(old, list) and new in old):  # chat models may stop at several tokens
            setattr(generation, field, new)
        setattr(config, field, getattr(generation, field))
        if token == "eos":
            had = "" if old in (None, new) or isinstance(old, list) else f", not {old}, {_word(tokenizer, old)}"
            notes.append(f"eos_token_id is {getattr(generation, field)}, the tokenizer's {_word(tokenizer, new)}{had}.")
    if len(tokenizer) > config.vocab_size:
        notes.append(f"The tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size}.")
    return generation


def _word(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens(token))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object to a new file."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
