"""Configurations of the other xLSTM implementations, as plain dicts, to the fields of `XLSTMConfig` and back.

| format | configuration of its origin |
|---|---|
| `transformers`, `transformers-fused` | `xLSTMConfig` of Transformers (`config.json`, `model_type: "xlstm"`) |
| `xlstm-large`, `xlstm-large-fused` | `xLSTMLargeConfig` of the package `xlstm` (`config.yaml`) |
| `xlstm-paper`, `xlstm-paper-cuda` | `xLSTMLMModelConfig` of the package `xlstm`, as `dataclasses.asdict` gives it |

The weights of the same formats are in `checkpoint_xlstm`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


# What the first paper's architecture sets differently from xLSTM-7B.
PAPER_ARCHITECTURE = {
    "mlstm_block": "pre_up",
    "norm_type": "layer_norm",
    "norm_eps": 1e-5,
    "gate_soft_cap": None,
    "output_logit_soft_cap": None,
}
# What makes no difference in a stack without mLSTM.
OF_MLSTM = {"mlstm_block", "mlstm_input_gate", "gate_soft_cap", "eps"}
LARGE_ARCHITECTURE = {"mlstm_block": "post_up", "norm_type": "rms_norm"}

Fields = dict[str, Any]


class ConfigurationFormat(NamedTuple):
    """Both directions, and the fields of `XLSTMConfig` that the origin cannot vary."""

    fixed: Fields
    read: Callable[[Mapping[str, Any]], Fields]
    write: Callable[[Any], Fields]


# Fields with the same name and meaning in XLSTMConfig, xLSTMConfig and xLSTMLargeConfig.
SHARED = ("vocab_size", "num_heads", "use_bias", "add_out_norm", "chunk_size", "ffn_round_up_to_multiple_of")
SHARED_FLOATS = (
    "norm_eps", "eps", "qk_dim_factor", "v_dim_factor", "ffn_proj_factor", "gate_soft_cap", "output_logit_soft_cap",
)  # fmt: skip
# Fields of xLSTMConfig told in other words here or choosing among its kernels; and what published files have unread.
UNREAD = {
    "embedding_dim", "num_blocks", "head_dim", "weight_mode", "norm_reduction_force_float32", "cell_norm_eps",
    "chunkwise_kernel", "sequence_kernel", "step_kernel", "mode", "return_last_states", "autocast_kernel_dtype",
    "inference_state_dtype", "max_inference_chunksize",
    "add_embedding_dropout", "add_forward_backend_padding", "add_post_blocks_norm", "add_post_norm", "add_qk_norm",
    "igate_bias_init_range", "mlstm_round_up_to_multiple_of", "force_bos_token_insert", "transformers_version",
    "auto_map",
}  # fmt: skip


def _shared(config: Any) -> Fields:
    floats = {field: getattr(config, field) for field in SHARED_FLOATS}
    return {
        **{field: getattr(config, field) for field in SHARED},
        **{field: None if value is None else float(value) for field, value in floats.items()},
    }


def _input_gate(origin: Mapping[str, Any]) -> str:
    return "sigmoid" if "siging" in str(origin.get("chunkwise_kernel")) else "exp"


def _read_transformers(origin: Mapping[str, Any]) -> Fields:
    widths = [origin[name] for name in ("hidden_size", "embedding_dim") if origin.get(name) is not None]
    if len(widths) > 1 and widths[0] != widths[1]:
        raise ValueError(
            f"hidden_size and embedding_dim must be equal, got {origin['hidden_size']} and {origin['embedding_dim']}; "
            "xLSTMConfig sets hidden_size to 4096 where only embedding_dim is given."
        )
    # Where both are given, the origin builds num_blocks blocks.
    layers = [origin[name] for name in ("num_blocks", "num_hidden_layers") if origin.get(name) is not None]
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return {
        **tokens,
        **{field: value for field, value in origin.items() if field not in UNREAD and field != "model_type"},
        "hidden_size": widths[0] if widths else 4096,
        "num_hidden_layers": layers[0] if layers else 32,
        "mlstm_input_gate": _input_gate(origin),
        **({"architectures": ["XLSTMForCausalLM"]} if "architectures" in origin else {}),  # as it is called here
    }


def _write_transformers(config: Any) -> Fields:
    for cap in ("gate_soft_cap", "output_logit_soft_cap"):
        if getattr(config, cap) is None:
            raise ValueError(f"{cap} must be a number in the format transformers, got None.")
    if config.mlstm_input_gate != "exp":
        raise ValueError(
            "mlstm_input_gate must be 'exp' in the format transformers, whose model computes no other, got "
            f"{config.mlstm_input_gate!r}."
        )
    return {
        "architectures": ["xLSTMForCausalLM"],
        "model_type": "xlstm",
        **_shared(config),
        "hidden_size": config.hidden_size,
        "embedding_dim": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_blocks": config.num_hidden_layers,
        "weight_mode": "single",
        # the only kernels that it accepts wherever it is installed
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
        "mode": "inference",
        "return_last_states": True,
        **{f"{token}_token_id": getattr(config, f"{token}_token_id") for token in ("pad", "bos", "eos")},
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": config.use_cache,
        **({} if config.dtype is None else {"dtype": str(config.dtype).removeprefix("torch.")}),
    }


def _read_large(origin: Mapping[str, Any]) -> Fields:
    if missing := {"vocab_size", "num_heads", "embedding_dim", "num_blocks"} - origin.keys():
        raise ValueError(f"The configuration of an xLSTMLarge must have {listing(missing)}, got no such field.")
    return {
        "ffn_proj_factor": 2.6667,
        **{field: origin[field] for field in SHARED + SHARED_FLOATS if field in origin},
        "hidden_size": origin["embedding_dim"],
        "num_hidden_layers": origin["num_blocks"],
        "mlstm_input_gate": _input_gate(origin),
    }


def _write_large(config: Any) -> Fields:
    siging = "_siging" if config.mlstm_input_gate == "sigmoid" else ""
    return {
        "embedding_dim": config.hidden_size,
        "num_blocks": config.num_hidden_layers,
        **_shared(config),
        "chunkwise_kernel": f"chunkwise--triton_xl_chunk{siging}",
        "sequence_kernel": "native_sequence__triton",
        "step_kernel": "triton",
    }


def _write_large_fused(config: Any) -> Fields:
    return {**_write_large(config), "weight_mode": "fused"}


def _read_paper(origin: Mapping[str, Any]) -> Fields:
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
        ("forward_clipval of an sLSTM", slstm.get("forward_clipval"), None),
        ("initial_val of an sLSTM", slstm.get("initial_val", 0.0), 0.0),
        ("act_fn of a feed-forward", (ffn or {}).get("act_fn", "gelu"), "gelu"),
        ("round_proj_up_dim_up", all(x.get("round_proj_up_dim_up", True) for x in widened), True),
    ):
        if got != legal:
            raise ValueError(f"The {what} must be {legal!r}, got {got!r}, which is not implemented.")
    if len(multiples) > 1:
        raise ValueError(f"round_proj_up_to_multiple_of must be the same in all blocks, got {sorted(multiples)}.")
    context_length = origin.get("context_length", -1)
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
        "context_length": context_length if context_length > 0 else None,
    }


def _paper_writer(backend: str) -> Callable[[Any], Fields]:
    def write(config: Any) -> Fields:
        multiple = config.ffn_round_up_to_multiple_of
        slstm_at = [i for i, kind in enumerate(config.block_types) if kind == "slstm"]
        mlstm = {
            "proj_factor": config.mlstm_proj_factor,
            "round_proj_up_to_multiple_of": multiple,
            "conv1d_kernel_size": config.conv_kernel_size,
            "qkv_proj_blocksize": config.mlstm_qkv_block_size,
            "num_heads": config.num_heads,
        }
        slstm = {
            "num_heads": config.slstm_num_heads,
            "conv1d_kernel_size": config.slstm_conv_kernel_size,
            "backend": backend,
            "bias_init": config.slstm_bias_init,
            "recurrent_weight_init": config.slstm_recurrent_init,
        }
        feedforward = {
            "proj_factor": config.slstm_ffn_proj_factor,
            "round_proj_up_to_multiple_of": multiple,
            "act_fn": "gelu",
            "bias": config.use_bias,
            "dropout": config.dropout,
        }
        return {
            "vocab_size": config.vocab_size,
            "embedding_dim": config.hidden_size,
            "num_blocks": config.num_hidden_layers,
            "context_length": config.context_length or 2048,  # of which it allocates the square
            "slstm_at": slstm_at,
            "mlstm_block": {"mlstm": mlstm} if len(slstm_at) < config.num_hidden_layers else None,
            "slstm_block": {"slstm": slstm, "feedforward": feedforward if config.slstm_ffn_size else None}
            if slstm_at
            else None,
            "add_post_blocks_norm": config.add_out_norm,
            "bias": config.use_bias,
            "dropout": config.dropout,
            "tie_weights": config.tie_word_embeddings,
        }

    return write


PAPER_FIXED = {**PAPER_ARCHITECTURE, "mlstm_input_gate": "exp", "eps": 1e-6}
IN_TRANSFORMERS = ConfigurationFormat(
    {**LARGE_ARCHITECTURE, "add_out_norm": True}, _read_transformers, _write_transformers
)
CONFIGURATION_FORMATS = {
    "transformers": IN_TRANSFORMERS,
    "transformers-fused": IN_TRANSFORMERS,
    "xlstm-large": ConfigurationFormat(LARGE_ARCHITECTURE, _read_large, _write_large),
    "xlstm-large-fused": ConfigurationFormat(LARGE_ARCHITECTURE, _read_large, _write_large_fused),
    "xlstm-paper": ConfigurationFormat(PAPER_FIXED, _read_paper, _paper_writer("vanilla")),
    "xlstm-paper-cuda": ConfigurationFormat(PAPER_FIXED, _read_paper, _paper_writer("cuda")),
}


def configuration_format(fmt: str) -> ConfigurationFormat:
    """The format of this name. Raises ValueError if there is none."""
    if fmt not in CONFIGURATION_FORMATS:
        raise ValueError(f"The format must be one of {', '.join(CONFIGURATION_FORMATS)}, got {fmt!r}.")
    return CONFIGURATION_FORMATS[fmt]


def fields_from(origin: Mapping[str, Any], fmt: str) -> Fields:
    """The fields of `XLSTMConfig` for the configuration `origin` of the format `fmt`.

    Raises ValueError if it contradicts itself or asks for what is not implemented here.
    """
    form = configuration_format(fmt)
    unknown = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return {**unknown, **form.read(origin), **form.fixed}


def check_expressible(config: Any, fmt: str) -> None:
    """Raises ValueError if `config`, an `XLSTMConfig`, has what the format `fmt` cannot vary."""
    fixed = configuration_format(fmt).fixed
    has_mlstm = "mlstm" in config.block_types
    for field, value in fixed.items():
        if getattr(config, field) != value and (has_mlstm or field not in OF_MLSTM):
            raise ValueError(f"{field} must be {value!r} in the format {fmt}, got {getattr(config, field)!r}.")
    if fixed["mlstm_block"] == "post_up" and "slstm" in config.block_types:
        raise ValueError(f"block_types must hold 'mlstm' only in the format {fmt}, got 'slstm'.")
    if fixed["mlstm_block"] == "pre_up":
        if has_mlstm and config.conv_kernel_size < 2:  # with which its code cannot build or run a model
            raise ValueError(f"conv_kernel_size must be at least 2 in the format {fmt}, got {config.conv_kernel_size}.")
        if "slstm" in config.block_types and config.slstm_conv_kernel_size == 1:
            raise ValueError(f"slstm_conv_kernel_size must be 0 or at least 2 in the format {fmt}, got 1.")


def fields_to(config: Any, fmt: str) -> Fields:
    """The configuration of the format `fmt` for an `XLSTMConfig`: what `fields_from` reads.

    What only this package knows (such as `chunk_size` of a paper's stack, or `dropout` of an xLSTM-7B) is left out.

    Raises ValueError if the format cannot express the model.
    """
    check_expressible(config, fmt)
    return configuration_format(fmt).write(config)


def shown(name: str) -> str:
    """A name from a file, for a message: quoted where it holds what does not print, and 200 characters of it."""
    return f"{name if name.isprintable() else repr(name):.200}"


def listing(names: Iterable[str]) -> str:
    """The first of many names, for a message."""
    names = sorted(names)
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(map(shown, names[:6])) + more
