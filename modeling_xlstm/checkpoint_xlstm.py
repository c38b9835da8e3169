"""Weights and configurations of every known xLSTM format, to and from those of this package: one table of names.

| layout | model class of its origin |
|---|---|
| `transformers` | `xLSTMForCausalLM` of Transformers |
| `large`, `large_fused` | `xLSTMLarge` of the package `xlstm`, with `weight_mode` `"single"` and `"fused"` |
| `paper_vanilla`, `paper_cuda` | `xLSTMLMModel` of the package `xlstm`, by sLSTM backend: same names, other layouts |

A row of the table pairs one native weight with the weights of the origin that hold it, and the operation between them.
Nothing is added, scaled or rounded: a round trip is exact to the bit. Which weights a model has is asked of the model.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from .configuration_xlstm import PAPER_ARCHITECTURE, XLSTMConfig
from .modeling_xlstm import XLSTMForCausalLM


class Operation(NamedTuple):
    """From the tensors of the origin to the native tensor, and back."""

    read: Callable[[list[Tensor], XLSTMConfig], Tensor]
    write: Callable[[Tensor, XLSTMConfig], Sequence[Tensor]]


def _write_absent(y: Tensor, config: XLSTMConfig) -> Sequence[Tensor]:
    if y.any():
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

    fixed: dict[str, Any]  # fields of XLSTMConfig that the origin cannot vary
    top: Rows
    blocks: str
    mlstm: Rows
    slstm: Rows


def _large(
    embedding: str, projections: Rows, norm_bias: str | tuple = "backbone.out_norm.bias", **fixed: Any
) -> Layout:
    return Layout(
        fixed={"mlstm_block": "post_up", "norm_type": "rms_norm", **fixed},
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
    architecture = {field: value for field, value in PAPER_ARCHITECTURE.items() if field != "num_heads"}
    return Layout(
        fixed={**architecture, "mlstm_input_gate": "exp", "eps": 1e-6},
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
LAYOUTS = {
    "transformers": _large("backbone.embeddings", SINGLE, (ABSENT, "backbone.out_norm.weight"), add_out_norm=True),
    "large": _large("embedding", SINGLE),
    "large_fused": _large("embedding", FUSED),
    "paper_vanilla": _paper(R_VANILLA, BIAS_VANILLA),
    "paper_cuda": _paper(R_CUDA, BIAS_CUDA),
}


def to_native(state_dict: Mapping[str, Tensor], config: XLSTMConfig, layout: str) -> dict[str, Tensor]:
    """The weights of `XLSTMForCausalLM(config)` from those of its origin. Dtypes stay; renamed tensors are shared.

    Of the two paper layouts, the shape of the recurrent weights tells which it is, whichever of them is named.

    Raises ValueError if `layout` cannot hold such a model, or if a weight is missing, unexpected or of a wrong shape.
    """
    given = dict(state_dict)
    R = next((x for name, x in given.items() if name.endswith("._recurrent_kernel_")), None)
    if R is not None and layout in ("paper_vanilla", "paper_cuda"):
        layout = "paper_cuda" if R.shape[-1] > R.shape[-2] else "paper_vanilla"
    rows, shapes = _rows(config, layout)
    if layout.startswith("paper"):
        _add_absent_biases(given, rows, shapes)
    _tie(given, f"{LAYOUTS[layout].top['model.embed_tokens']}.weight", config)
    _check_names(given, {name for _, _, names in rows for name in names}, f"A checkpoint of layout {layout}")
    native = {}
    for name, operation, names in rows:
        parts = [given[x] for x in names]
        try:
            y = operation.read(parts, config)
            fits = y.shape == shapes[name] and all(map(Tensor.is_same_size, operation.write(y, config), parts))
        except (RuntimeError, IndexError):  # the operation does not apply to such shapes
            fits = False
        if not fits:
            got = ", ".join(f"{x} {list(part.shape)}" for x, part in zip(names, parts, strict=True))
            raise ValueError(f"{name} must have shape {list(shapes[name])}, got {got}.")
        native[name] = y.contiguous()
    return native


def from_native(state_dict: Mapping[str, Tensor], config: XLSTMConfig, layout: str) -> dict[str, Tensor]:
    """The weights of the origin from those of `XLSTMForCausalLM(config)`: what `to_native` reads, to the bit.

    In the paper layouts, `use_bias` stands for both `bias` and `feedforward.bias` of the origin.

    Raises ValueError if `layout` cannot hold such a model, or if a weight is missing, unexpected or of a wrong shape.
    """
    given = dict(state_dict)
    rows, shapes = _rows(config, layout)
    _tie(given, "model.embed_tokens.weight", config)
    _check_names(given, shapes.keys(), "The state dict of an XLSTMForCausalLM")
    origin: dict[str, Tensor] = {}
    for name, operation, names in rows:
        if given[name].shape != shapes[name]:
            raise ValueError(f"{name} must have shape {list(shapes[name])}, got {list(given[name].shape)}.")
        parts = operation.write(given[name], config)
        if len(parts) > 1:  # views of one tensor, which safetensors refuses to save
            parts = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        origin.update(zip(names, (part.contiguous() for part in parts), strict=bool(parts)))
    return origin


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {name!r}.")
    return LAYOUTS[name]


def _rows(config: XLSTMConfig, layout: str) -> tuple[list[tuple[str, Operation, list[str]]], dict[str, torch.Size]]:
    """Every weight of the model with its operation and full names in the origin; and their shapes."""
    table = _layout(layout)
    for field, value in table.fixed.items():
        if getattr(config, field) != value:
            raise ValueError(f"{field} must be {value!r} in the layout {layout}, got {getattr(config, field)!r}.")
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in XLSTMForCausalLM(config).state_dict().items()}
    groups = [("", "", table.top)]
    for i, kind in enumerate(config.block_types):
        groups.append((f"model.layers.{i}.", f"{table.blocks}.{i}.", table.mlstm if kind == "mlstm" else table.slstm))
    rows = []
    for native_prefix, prefix, group in groups:
        for native, entry in group.items():
            operation, *names = (RENAME, entry) if isinstance(entry, str) else entry
            for suffix in ("", ".weight", ".bias"):
                if (name := native_prefix + native + suffix) in shapes:
                    rows.append((name, operation, [prefix + x + suffix for x in names]))
    if homeless := shapes.keys() - {name for name, _, _ in rows}:
        raise ValueError(f"The layout {layout} has no place for {_listing(homeless)}.")
    return rows, shapes


def _add_absent_biases(given: dict[str, Tensor], rows: list, shapes: dict[str, torch.Size]) -> None:
    """The paper's package has biases in mLSTM blocks, in feed-forwards, or in both: zeros for the kind without."""
    biases = {names[0]: name for name, operation, names in rows if name.endswith("_proj.bias") and operation is RENAME}
    kinds = {x.split(".")[3] for x in biases if x in given}
    for x, name in biases.items():
        weight = given.get(x.removesuffix("bias") + "weight")
        if kinds and x.split(".")[3] not in kinds and weight is not None:
            given[x] = weight.new_zeros(shapes[name])


def _tie(given: dict[str, Tensor], embedding: str, config: XLSTMConfig) -> None:
    """Where embeddings are tied, the output projection may be left out, but not differ."""
    if not config.tie_word_embeddings or embedding not in given:
        return
    if not torch.equal(given.setdefault("lm_head.weight", given[embedding]), given[embedding]):
        raise ValueError(f"lm_head.weight must equal {embedding} with tie_word_embeddings=True, got other values.")


def _check_names(given: Mapping[str, Tensor], expected: Set[str], what: str) -> None:
    faults = {"no": expected - given.keys(), "an unexpected": given.keys() - expected}
    got = " and ".join(f"{fault} {_listing(names)}" for fault, names in faults.items() if names)
    if got:
        raise ValueError(f"{what} must hold exactly the weights of the configuration, got {got}.")


def _listing(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def config_from(origin: Any, layout: str, **overrides: Any) -> XLSTMConfig:
    """The configuration of the model whose origin has the configuration `origin`.

    Args:
        origin: `xLSTMConfig` of Transformers, `xLSTMLargeConfig` or `xLSTMLMModelConfig`, or one of them as a dict.
        layout: A name in `LAYOUTS`.
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
    fixed = _layout(layout).fixed
    fields = _paper_fields(origin) if layout.startswith("paper") else _large_fields(origin, layout)
    unknown = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return XLSTMConfig(**{**unknown, **fields, **fixed, **overrides})


def _large_fields(origin: Mapping[str, Any], layout: str) -> dict[str, Any]:
    required = {"vocab_size", "num_heads", "embedding_dim", "num_blocks"} if layout != "transformers" else set()
    if missing := required - origin.keys():
        raise ValueError(f"The configuration of an xLSTMLarge must have {_listing(missing)}, got no such field.")
    widths = {origin.get("hidden_size"), origin.get("embedding_dim")} - {None}
    if len(widths) > 1:
        raise ValueError(
            f"hidden_size and embedding_dim must be equal, got {origin['hidden_size']} and {origin['embedding_dim']}; "
            "xLSTMConfig sets hidden_size to 4096 where only embedding_dim is given."
        )
    # Where both are given, the origin builds num_blocks blocks.
    layers = [origin[name] for name in ("num_blocks", "num_hidden_layers") if origin.get(name) is not None]
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return {
        **(tokens if layout == "transformers" else {"ffn_proj_factor": 2.6667}),
        **{field: origin[field] for field in XLSTMConfig.__annotations__ if field in origin},
        "hidden_size": widths.pop() if widths else 4096,
        "num_hidden_layers": layers[0] if layers else 32,
        "mlstm_input_gate": "sigmoid" if "siging" in origin.get("chunkwise_kernel", "") else "exp",
    }


def _paper_fields(origin: Mapping[str, Any]) -> dict[str, Any]:
    layers, slstm_at = origin.get("num_blocks", 1), origin.get("slstm_at", ())
    if slstm_at == "all" or origin.get("mlstm_block") is None:
        slstm_at = range(layers)
    if any(not -layers <= i < layers for i in slstm_at):
        raise ValueError(f"slstm_at must hold positions among {layers} blocks, got {list(slstm_at)}.")
    kinds = ["slstm" if i in slstm_at or i - layers in slstm_at else "mlstm" for i in range(layers)]
    mlstm_block: Any = origin["mlstm_block"] if "mlstm" in kinds else {}
    slstm_block: Any = origin.get("slstm_block") if "slstm" in kinds else {"feedforward": None}
    if slstm_block is None:
        raise ValueError(f"slstm_block must be given for the sLSTM blocks at {list(slstm_at)}, got None.")
    mlstm, slstm, ffn = mlstm_block.get("mlstm", {}), slstm_block.get("slstm", {}), slstm_block.get("feedforward", {})
    widened = [mlstm] * ("mlstm" in kinds) + [ffn] * (ffn is not None)
    multiples = {x.get("round_proj_up_to_multiple_of", 64) for x in widened} or {64}
    for what, got, legal in (
        ("function of an sLSTM", slstm.get("function", "slstm"), "slstm"),
        ("group_norm_weight of an sLSTM", slstm.get("group_norm_weight", True), True),
        ("act_fn of a feed-forward", (ffn or {}).get("act_fn", "gelu"), "gelu"),
        ("round_proj_up_dim_up", all(x.get("round_proj_up_dim_up", True) for x in widened), True),
        ("round_proj_up_to_multiple_of of all blocks", max(multiples), min(multiples)),
    ):
        if got != legal:
            raise ValueError(f"The {what} must be {legal!r}, got {got!r}, which is not implemented.")
    return {
        "vocab_size": origin.get("vocab_size", -1),
        "hidden_size": origin.get("embedding_dim", 128),
        "num_hidden_layers": layers,
        "block_types": kinds,
        "num_heads": (mlstm if "mlstm" in kinds else slstm).get("num_heads", 4),
        "mlstm_proj_factor": mlstm.get("proj_factor", 2.0),
        "mlstm_qkv_block_size": mlstm.get("qkv_proj_blocksize", 4),
        "conv_kernel_size": mlstm.get("conv1d_kernel_size", 4),
        "ffn_round_up_to_multiple_of": min(multiples),
        "slstm_num_heads": slstm.get("num_heads", 4),
        "slstm_conv_kernel_size": slstm.get("conv1d_kernel_size", 4),
        "slstm_ffn_proj_factor": 0 if ffn is None else ffn.get("proj_factor", 1.3),
        "slstm_bias_init": slstm.get("bias_init", "powerlaw_blockdependent"),
        "slstm_recurrent_init": slstm.get("recurrent_weight_init", "zeros"),
        "use_bias": ("mlstm" in kinds and origin.get("bias", False)) or (ffn or {}).get("bias", False),
        "add_out_norm": origin.get("add_post_blocks_norm", True),
        "dropout": origin.get("dropout", 0.0),
        "tie_word_embeddings": origin.get("tie_weights", False),
    }
