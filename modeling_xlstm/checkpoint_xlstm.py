"""Weights of every known xLSTM format, to and from those of this package: one table of names and layouts.

| format | model class of its origin |
|---|---|
| `transformers` | `xLSTMForCausalLM` of Transformers |
| `transformers-fused` | the same with `weight_mode="fused"`, which it can store but not build |
| `xlstm-large`, `xlstm-large-fused` | `xLSTMLarge` of the package `xlstm`, by `weight_mode` |
| `xlstm-paper`, `xlstm-paper-cuda` | `xLSTMLMModel` of the package `xlstm`, by sLSTM backend: one set of names |

A row of the table pairs one native weight with the weights of the origin that hold it, and the operation between them.
Nothing is added, scaled or rounded: a round trip is exact to the bit. Which weights a model has is asked of the model
(`weight_shapes` in `modeling_xlstm`). The configurations of the same formats are in `configuration_formats`.
"""

import dataclasses
import re
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

from .configuration_formats import check_expressible, fields_from, listing
from .configuration_xlstm import CHOICES, XLSTMConfig
from .parallel_plan import parts_of


class Operation(NamedTuple):
    """From the tensors of the origin to the native tensor, and back."""

    read: Callable[[list[Tensor], XLSTMConfig], Tensor]
    write: Callable[[Tensor, XLSTMConfig], Sequence[Tensor]]


def _write_absent(y: Tensor, config: XLSTMConfig) -> Sequence[Tensor]:
    if not y.is_meta and y.any():
        raise ValueError("model.norm.bias must be zero: the origin has no bias in its final norm.")
    return ()


RENAME = Operation(lambda xs, c: xs[0], lambda y, c: [y])
# A bias that the origin lacks: zero, like the weight beside it.
ABSENT = Operation(lambda xs, c: torch.zeros_like(xs[0]), _write_absent)
# Rows one after the other: two halves, or [q | k | v | o].
HALVES = Operation(lambda xs, c: torch.cat(xs), lambda y, c: y.chunk(2))
QKVO = Operation(lambda xs, c: torch.cat(xs), lambda y, c: y.split([c.qk_size, c.qk_size, c.inner_size, c.inner_size]))
# Depthwise convolution: [C, 1, kernel].
CONV = Operation(lambda xs, c: xs[0].squeeze(1), lambda y, c: [y.unsqueeze(1)])
# sLSTM, input weights of each gate: [H, D_out, D_in].
GATES = Operation(lambda xs, c: torch.stack(xs, 1), lambda y, c: y.unbind(1))
# sLSTM, recurrent weights: [H, gate D_out, D_in] or [H, D_in, gate D_out]; biases: [gate H D] or [H gate D].
R_VANILLA = Operation(lambda xs, c: xs[0].unflatten(1, (4, -1)), lambda y, c: [y.flatten(1, 2)])
R_CUDA = Operation(lambda xs, c: xs[0].mT.unflatten(1, (4, -1)), lambda y, c: [y.flatten(1, 2).mT])
BIAS_VANILLA = Operation(
    lambda xs, c: xs[0].unflatten(0, (4, c.slstm_num_heads, -1)).transpose(0, 1),
    lambda y, c: [y.transpose(0, 1).flatten()],
)
BIAS_CUDA = Operation(lambda xs, c: xs[0].unflatten(0, (c.slstm_num_heads, 4, -1)), lambda y, c: [y.flatten()])

# Native name: name in the origin, or operation and names. A module stands for its weight and, if it has one, its bias.
Rows = dict[str, str | tuple]


class Layout(NamedTuple):
    """The weights outside blocks, and those in each kind of block, below the name `blocks` and the index."""

    top: Rows
    blocks: str
    mlstm: Rows
    slstm: Rows


def _large(embedding: str, projections: Rows, norm_bias: str | tuple = "backbone.out_norm.bias") -> Layout:
    return Layout(
        top={
            "model.embed_tokens": embedding,
            "model.norm.weight": "backbone.out_norm.weight",
            "model.norm.bias": norm_bias,
            "lm_head": "lm_head",
        },
        blocks="backbone.blocks",
        mlstm={
            **projections,
            "mixer_norm": "norm_mlstm",
            "mixer.head_norm": "mlstm_layer.multihead_norm",
            "mixer.out_proj": "mlstm_layer.out_proj",
            "ffn_norm": "norm_ffn",
            "ffn.down_proj": "ffn.proj_down",
        },
        slstm={},
    )


def _paper(recurrent: Operation, bias: Operation) -> Layout:
    shared: Rows = {
        "mixer_norm": "xlstm_norm",
        "mixer.conv.weight": (CONV, "xlstm.conv1d.conv.weight"),
        "mixer.conv.bias": "xlstm.conv1d.conv.bias",
    }
    return Layout(
        top={
            "model.embed_tokens": "token_embedding",
            "model.norm": "xlstm_block_stack.post_blocks_norm",
            "lm_head": "lm_head",
        },
        blocks="xlstm_block_stack.blocks",
        mlstm={
            **shared,
            "mixer.up_proj": "xlstm.proj_up",
            "mixer.q_proj": "xlstm.q_proj",
            "mixer.k_proj": "xlstm.k_proj",
            "mixer.v_proj": "xlstm.v_proj",
            "mixer.gate_proj": (HALVES, "xlstm.mlstm_cell.igate", "xlstm.mlstm_cell.fgate"),
            "mixer.head_norm": "xlstm.mlstm_cell.outnorm",
            "mixer.skip": "xlstm.learnable_skip",
            "mixer.down_proj": "xlstm.proj_down",
        },
        slstm={
            **shared,
            # In the origin, the module named fgate feeds the input gate of the cell, and igate the forget gate.
            "mixer.gate_weight": (GATES, *(f"xlstm.{gate}gate.weight" for gate in "fizo")),
            "mixer.gate_bias": (bias, "xlstm.slstm_cell._bias_"),
            "mixer.recurrent_weight": (recurrent, "xlstm.slstm_cell._recurrent_kernel_"),
            "mixer.head_norm": "xlstm.group_norm",
            "ffn_norm": "ffn_norm",
            "ffn.up_proj": "ffn.proj_up",
            "ffn.down_proj": "ffn.proj_down",
        },
    )


SINGLE: Rows = {
    "mixer.qkvo_proj": (QKVO, *(f"mlstm_layer.{name}" for name in ("q", "k", "v", "ogate_preact"))),
    "mixer.gate_proj": (HALVES, "mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"),
    "ffn.up_proj": (HALVES, "ffn.proj_up_gate", "ffn.proj_up"),
}
FUSED: Rows = {
    "mixer.qkvo_proj": "mlstm_layer.qkv_opreact",
    "mixer.gate_proj": "mlstm_layer.ifgate_preact",
    "ffn.up_proj": "ffn.proj_up_gate_z",
}
NO_NORM_BIAS = (ABSENT, "backbone.out_norm.weight")
LAYOUTS = {
    "transformers": _large("backbone.embeddings", SINGLE, NO_NORM_BIAS),
    "transformers-fused": _large("backbone.embeddings", FUSED, NO_NORM_BIAS),
    "xlstm-large": _large("embedding", SINGLE),
    "xlstm-large-fused": _large("embedding", FUSED),
    "xlstm-paper": _paper(R_VANILLA, BIAS_VANILLA),
    "xlstm-paper-cuda": _paper(R_CUDA, BIAS_CUDA),
}


class Row(NamedTuple):
    """One native weight, and the weights of the origin that hold it."""

    native: str
    operation: Operation
    names: list[str]


def rows_of(config: XLSTMConfig, fmt: str, native: Collection[str]) -> list[Row]:
    """Where each of the weights `native` of an `XLSTMForCausalLM(config)` is in the format `fmt`.

    Raises ValueError if the format cannot hold such a model.
    """
    if fmt == "native":
        return [Row(name, RENAME, [name]) for name in native]
    check_expressible(config, fmt)
    table = LAYOUTS[fmt]
    groups = [("", "", table.top)]
    for i, kind in enumerate(config.block_types):
        groups.append((f"model.layers.{i}.", f"{table.blocks}.{i}.", table.mlstm if kind == "mlstm" else table.slstm))
    rows = []
    for native_prefix, prefix, group in groups:
        for module, entry in group.items():
            operation, *names = (RENAME, entry) if isinstance(entry, str) else entry
            for suffix in ("", ".weight", ".bias"):
                if (name := native_prefix + module + suffix) in native:
                    rows.append(Row(name, operation, [prefix + x + suffix for x in names]))
    if homeless := set(native) - {row.native for row in rows}:
        raise ValueError(f"The format {fmt} has no place for {listing(homeless)}.")
    return rows


def embedding_name(fmt: str) -> str:
    """The name of the embedding in a format, by which it is known."""
    return f"{'model.embed_tokens' if fmt == 'native' else LAYOUTS[fmt].top['model.embed_tokens']}.weight"


def detect(shapes: Mapping[str, Sequence[int]]) -> str:
    """The format of a checkpoint by the names and shapes of its weights; `"native"` for that of this package.

    Raises ValueError if it is none of them.
    """
    names = {embedding_name(fmt): fmt for fmt in ("native", "transformers", "xlstm-large", "xlstm-paper")}
    found = [fmt for name, fmt in names.items() if name in shapes]
    if len(found) != 1:
        raise ValueError(
            f"The weights must be those of a language model, with one of {', '.join(names)}, got {listing(shapes)}."
        )
    if found == ["xlstm-paper"]:
        R = next((shape for name, shape in shapes.items() if name.endswith("._recurrent_kernel_")), ())
        return "xlstm-paper-cuda" if len(R) == 3 and R[2] > R[1] else "xlstm-paper"
    fused = found != ["native"] and any(".qkv_opreact." in name for name in shapes)
    return f"{found[0]}-fused" if fused else found[0]


def read_rows(
    given: Mapping[str, Tensor], config: XLSTMConfig, fmt: str, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """The native weights, of the shapes `shapes`, from those of the origin. Each is read when it is its turn.

    The names of a format are checked first: every weight must be there and have a place. Of the two formats of the
    paper, the shape of the recurrent weights tells which it is, whichever of them is named.
    """
    if fmt.startswith("xlstm-paper"):
        R = next((given[name] for name in given if name.endswith("._recurrent_kernel_")), None)
        fmt = fmt if R is None else detect({embedding_name(fmt): (), "._recurrent_kernel_": R.shape})
    rows = rows_of(config, fmt, shapes)
    given = ChainMap({}, given)  # type: ignore[arg-type]  # what is added does not reach the caller's
    if fmt.startswith("xlstm-paper"):
        _add_absent_biases(given, rows, shapes)
    _tie(given, embedding_name(fmt), config)
    _check_names(given, {name for row in rows for name in row.names}, f"A checkpoint of format {fmt}")
    for row in rows:
        parts = [given[name] for name in row.names]
        try:
            y = row.operation.read(parts, config)
            fits = y.shape == shapes[row.native]
            fits = fits and all(map(Tensor.is_same_size, row.operation.write(y, config), parts))
        except (RuntimeError, IndexError):  # the operation does not apply to such shapes
            fits = False
        if not fits:
            got = ", ".join(f"{x} {list(part.shape)}" for x, part in zip(row.names, parts, strict=True))
            raise ValueError(f"{row.native} must have shape {list(shapes[row.native])}, got {got}.")
        yield row.native, y.contiguous()


def write_rows(
    native: Iterable[tuple[str, Tensor]], config: XLSTMConfig, fmt: str, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the format `fmt`, name and tensor, from those of `XLSTMForCausalLM(config)` one by one.

    Files of this package leave out an output projection that is tied; the others hold both weights.
    """
    rows = {row.native: row for row in rows_of(config, fmt, shapes)}
    for name, y in native:
        if config.tie_word_embeddings and name == "lm_head.weight":
            if fmt == "native":
                continue
            y = y.clone()  # safetensors refuses to save one tensor under two names
        parts = rows[name].operation.write(y, config)
        if len(parts) > 1:  # views of one tensor: the same
            parts = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        yield from zip(rows[name].names, (part.contiguous() for part in parts), strict=bool(parts))


def to_native(
    state_dict: Mapping[str, Tensor], config: XLSTMConfig, fmt: str, shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """The weights of an `XLSTMForCausalLM(config)`, of the shapes `shapes`, from those of its origin.

    Dtypes stay; renamed tensors are shared. See `read_rows`.

    Raises ValueError if the format `fmt` cannot hold such a model, or a weight is missing, unexpected or misshapen.
    """
    return dict(read_rows(state_dict, config, fmt, shapes))


def from_native(
    state_dict: Mapping[str, Tensor], config: XLSTMConfig, fmt: str, shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """The weights of the origin from those of `XLSTMForCausalLM(config)`: what `to_native` reads, to the bit.

    In the formats of the paper, `use_bias` stands for both `bias` and `feedforward.bias` of the origin.

    Raises ValueError if the format `fmt` cannot hold such a model, or a weight is missing, unexpected or misshapen.
    """
    check_expressible(config, fmt)
    given = dict(state_dict)
    _tie(given, "model.embed_tokens.weight", config)
    _check_names(given, shapes.keys(), "The state dict of an XLSTMForCausalLM")
    for name, shape in shapes.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(given[name].shape)}.")
    return dict(write_rows(given.items(), config, fmt, shapes))


def _add_absent_biases(given: MutableMapping[str, Tensor], rows: list[Row], shapes: Mapping[str, torch.Size]) -> None:
    """The paper's package has biases in mLSTM blocks, in feed-forwards, or in both: zeros for the kind without."""
    renamed = [row for row in rows if row.operation is RENAME and row.native.endswith("_proj.bias")]
    biases = {row.names[0]: row.native for row in renamed}
    kinds = {x.split(".")[3] for x in biases if x in given}
    for x, name in biases.items():
        weight = given.get(x.removesuffix("bias") + "weight")
        if kinds and x.split(".")[3] not in kinds and weight is not None:
            given[x] = weight.new_zeros(shapes[name])


def _tie(given: MutableMapping[str, Tensor], embedding: str, config: XLSTMConfig) -> None:
    """Where embeddings are tied, the output projection may be left out, but not differ."""
    if not config.tie_word_embeddings or embedding not in given:
        return
    x, y = given.setdefault("lm_head.weight", given[embedding]), given[embedding]
    if not x.is_meta and not torch.equal(x, y):
        raise ValueError(f"lm_head.weight must equal {embedding} with tie_word_embeddings=True, got other values.")


class WeightNamesError(ValueError):
    """Weights of a checkpoint that are `missing` or `unexpected`; the message names the first of them."""

    def __init__(self, what: str, missing: Set[str], unexpected: Set[str]):
        faults = {"no": missing, "an unexpected": unexpected}
        got = " and ".join(f"{fault} {listing(names)}" for fault, names in faults.items() if names)
        super().__init__(f"{what} must hold exactly the weights of the configuration, got {got}.")
        self.missing, self.unexpected = missing, unexpected


def _check_names(given: Iterable[str], expected: Set[str], what: str) -> None:
    missing, unexpected = expected - set(given), set(given) - expected
    if missing or unexpected:
        raise WeightNamesError(what, missing, unexpected)


class _WithZeroBias(ConversionOps):
    """`ABSENT` for `from_pretrained`: the weight of a norm, and a bias of zeros where the model has one."""

    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        (weight,) = input_dict[source_patterns[0]]
        tensors = {target_patterns[0]: weight}
        if config.use_bias:
            tensors[target_patterns[1]] = torch.zeros_like(weight)
        return tensors


def conversions() -> list[WeightConverter | WeightRenaming]:
    """How `from_pretrained` reads the formats `transformers` and `transformers-fused`: the table as its transforms.

    Names of ours pass unchanged, but for the parts of matrices, as distributed checkpoints have them. The checkpoint of
    a bare `xLSTMModel` lacks `backbone.`, which is optional therefore.
    """

    def pattern(name: str) -> str:
        return r"^(?:backbone\.)?" + re.escape(name.removeprefix("backbone."))

    transforms: list[WeightConverter | WeightRenaming] = [
        WeightRenaming(pattern("backbone.blocks."), "layers."),
        WeightRenaming(pattern("backbone.embeddings."), "embed_tokens."),
        WeightConverter(pattern("backbone.out_norm.weight"), ["norm.weight", "norm.bias"], [_WithZeroBias()]),
    ]
    for module, entry in [*LAYOUTS["transformers"].mlstm.items(), *FUSED.items()]:
        if isinstance(entry, str):
            transforms.append(WeightRenaming(re.escape(f".{entry}."), f".{module}."))
        else:  # rows one after the other
            transforms.append(_joining(entry[1:], module, 0))
    configs = (XLSTMConfig(mlstm_block=block) for block in CHOICES["mlstm_block"])
    split = {(module, parts.names): parts.dim for config in configs for module, parts in parts_of(config).items()}
    for (module, names), dim in split.items():
        transforms.append(_joining([f"{module}.{name}" for name in names], module, dim))
    return transforms


def _joining(names: Iterable[str], module: str, dim: int) -> WeightConverter:
    """One weight from several, one after the other."""
    return WeightConverter([re.escape(f".{name}.") for name in names], f".{module}.", [Concatenate(dim)])


def config_from(origin: Any, fmt: str, **overrides: Any) -> XLSTMConfig:
    """The configuration of the model whose origin has the configuration `origin`.

    Args:
        origin: `xLSTMConfig` of Transformers, `xLSTMLargeConfig` or `xLSTMLMModelConfig`, or one of them as a dict.
        fmt: A name in `LAYOUTS`.
        overrides: Fields of `XLSTMConfig`, such as `eos_token_id`, which only the configuration in Transformers has.

    Raises:
        TypeError, ValueError: `origin` is none of these, contradicts itself, or asks for what is not implemented here.
    """
    if isinstance(origin, PreTrainedConfig):
        origin = origin.to_dict()
    elif dataclasses.is_dataclass(origin) and not isinstance(origin, type):
        origin = dataclasses.asdict(origin)
    elif not isinstance(origin, Mapping):
        raise TypeError(f"origin must be a configuration or a dict of one, got {type(origin).__name__}.")
    return XLSTMConfig(**{**fields_from(origin, fmt), **overrides})
