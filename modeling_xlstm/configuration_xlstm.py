"""Configuration of the xLSTM family: every field, the sizes derived from them, and what is refused.

The defaults describe xLSTM-7B (https://arxiv.org/abs/2503.13427). `XLSTMConfig.from_ratio` describes the xLSTM[a:b]
stacks of the first paper (https://arxiv.org/abs/2405.04517), and `XLSTMConfig.preset` the published sizes of both.
"""

import math
import re
import sys
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .configuration_formats import PAPER_ARCHITECTURE, fields_from
from .parallel_plan import FSDP_PLAN, PP_PLAN, tp_plan


PAPER_DEFAULTS = {**PAPER_ARCHITECTURE, "num_heads": 4}

# size: (hidden size, blocks, positions of the sLSTM blocks in xLSTM[7:1]); https://arxiv.org/abs/2405.04517, appendix.
PAPER_SIZES = {
    "125m": (768, 24, (3, 20)),
    "350m": (1024, 48, (3, 5, 7, 40, 42, 44)),
    "760m": (1536, 48, (3, 5, 7, 40, 42, 44)),
    "1.3b": (2048, 48, (3, 5, 7, 40, 42, 44)),
}

# field: legal values
CHOICES = {
    "mlstm_block": ("post_up", "pre_up"),
    "mlstm_input_gate": ("exp", "sigmoid"),
    "norm_type": ("rms_norm", "layer_norm"),
    "slstm_bias_init": ("powerlaw_blockdependent", "small_init", "zeros", "standard"),
    "slstm_recurrent_init": ("zeros", "standard"),
    "backend": ("auto", "torch", "triton"),
}
POSITIVE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "slstm_num_heads", "qk_dim_factor", "v_dim_factor",
    "mlstm_proj_factor", "mlstm_qkv_block_size", "ffn_proj_factor", "ffn_round_up_to_multiple_of", "norm_eps",
    "gate_soft_cap", "output_logit_soft_cap", "chunk_size", "context_length",
)  # fmt: skip
NOT_NEGATIVE = ("conv_kernel_size", "slstm_conv_kernel_size", "slstm_ffn_proj_factor", "eps")
MOST_BLOCKS = 10_000  # where only their number is told: of a billion, the list of kinds would fill memory
LARGEST = 2**63 - 1  # products of what is no larger are finite
WIDEST = 2**28  # of a matrix, whose bytes can be counted then

OF_FETCHED_KERNELS = re.compile("_?(attn|experts)_implementation(_internal)?")
SMALLEST = 2.0**-126  # of numbers that float32 divides by

# What LoRA adapts where nothing else is asked for: all linear layers but the scalar gates, of every kind of block.
LORA_TARGETS = ["qkvo_proj", "out_proj", "up_proj", "down_proj"]


@strict
class XLSTMConfig(PreTrainedConfig):
    r"""
    Configuration of [`XLSTMModel`] and its heads. The defaults give xLSTM-7B.

    Args:
        vocab_size (`int`, *optional*, defaults to 50304): Number of token embeddings.
        hidden_size (`int`, *optional*, defaults to 4096): Width of the residual stream.
        num_hidden_layers (`int`, *optional*, defaults to 32): Number of blocks.
        num_heads (`int`, *optional*, defaults to 8): Heads of every mLSTM cell.
        block_types (`list[str]`, *optional*): `"mlstm"` or `"slstm"` for each block. All mLSTM when omitted.
        mlstm_block (`str`, *optional*, defaults to `"post_up"`):
            Residual block around the mLSTM cell. `"post_up"`: dense q, k, v and sigmoid output gate at model width,
            then a SwiGLU feed-forward (xLSTM-7B). `"pre_up"`: up-projection, causal convolution, block-diagonal q, k
            and v, learnable skip, SiLU gate, no feed-forward (first paper).
        mlstm_input_gate (`str`, *optional*, defaults to `"exp"`):
            `"exp"` or `"sigmoid"` (mLSTMsig, https://arxiv.org/abs/2503.14376).
        qk_dim_factor (`float`, *optional*, defaults to 0.5):
            Width of all queries, and of all keys, over `hidden_size`; `"post_up"` only.
        v_dim_factor (`float`, *optional*, defaults to 1.0): Width of all values over `hidden_size`; `"post_up"` only.
        mlstm_proj_factor (`float`, *optional*, defaults to 2.0): Inner width over `hidden_size`; `"pre_up"` only.
        mlstm_qkv_block_size (`int`, *optional*, defaults to 4): Block of the block-diagonal q, k, v; `"pre_up"` only.
        conv_kernel_size (`int`, *optional*, defaults to 4): Causal convolution of `"pre_up"` blocks, 0 for none.
        ffn_proj_factor (`float`, *optional*, defaults to 2.667): Feed-forward width of `"post_up"` blocks.
        ffn_round_up_to_multiple_of (`int`, *optional*, defaults to 64): Rounding of the widths given by factors.
        slstm_num_heads (`int`, *optional*): Heads of every sLSTM cell, `num_heads` when omitted.
        slstm_conv_kernel_size (`int`, *optional*, defaults to 4): Convolution before the i and f gates, 0 for none.
        slstm_ffn_proj_factor (`float`, *optional*, defaults to 1.3): GeGLU of sLSTM blocks, 0 for no feed-forward.
        slstm_bias_init (`str`, *optional*, defaults to `"powerlaw_blockdependent"`):
            Forget-gate bias at initialisation; also `"small_init"`, `"zeros"`, `"standard"`.
        slstm_recurrent_init (`str`, *optional*, defaults to `"zeros"`): Recurrent weights, also `"standard"`.
        norm_type (`str`, *optional*, defaults to `"rms_norm"`):
            `"rms_norm"`, or `"layer_norm"` (no bias, weight stored as the offset from one, as in the first paper).
        norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of every normalisation layer.
        eps (`float`, *optional*, defaults to 1e-6): Epsilon added to the mLSTM cell's denominator.
        gate_soft_cap (`float`, *optional*, defaults to 15.0): `cap * tanh(gate / cap)` on mLSTM gates; `None` for none.
        output_logit_soft_cap (`float`, *optional*, defaults to 30.0): The same on the logits; `None` for none.
        use_bias (`bool`, *optional*, defaults to `False`): Biases on projections (and on the norms, with `"rms_norm"`).
        add_out_norm (`bool`, *optional*, defaults to `True`): Normalise after the last block.
        dropout (`float`, *optional*, defaults to 0.0): Dropout on what each mixer and feed-forward adds to the stream.
        chunk_size (`int`, *optional*, defaults to 64): Chunk length of the mLSTM cell; changes speed, not results.
        backend (`str`, *optional*, defaults to `"auto"`): Kernels: `"torch"`, `"triton"` (on a GPU) or
            `"auto"`, which is Triton where it can run.
        context_length (`int`, *optional*): Length of the texts that the model was trained on. Not a limit.
        keep_gates_in_fp32 (`bool`, *optional*, defaults to `True`):
            Input projections of the gates stay in float32 when the model is loaded in bfloat16 or float16.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): Share the input embedding with `lm_head`.
        use_cache (`bool`, *optional*, defaults to `True`): Return the recurrent state when not training.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*, defaults to 1, 0, 0):
            As in the GPT-NeoX tokenizer of xLSTM-7B, whose end of text is token 0.

    Raises:
        StrictDataclassError: A field is impossible; the message names the field, its value and the legal values. It is
            that of `huggingface_hub.errors`, and its cause a ValueError or a TypeError.
        ValueError: There are too many blocks to list their kinds, or a name is that of a method or a property.

    ```python
    >>> from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM

    >>> config = XLSTMConfig.from_ratio("7:1", hidden_size=128, num_hidden_layers=8, vocab_size=256)
    >>> model = XLSTMForCausalLM(config)
    ```"""

    model_type = "xlstm_lm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"final_logit_softcapping": "output_logit_soft_cap"}  # where others, such as TRL, look for it

    base_model_pp_plan = PP_PLAN  # type: ignore[assignment]  # of Transformers' form, not of its annotation

    vocab_size: int = 50304
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_heads: int = 8
    block_types: list[str] | None = None
    mlstm_block: str = "post_up"
    mlstm_input_gate: str = "exp"
    qk_dim_factor: float | int = 0.5
    v_dim_factor: float | int = 1.0
    mlstm_proj_factor: float | int = 2.0
    mlstm_qkv_block_size: int = 4
    conv_kernel_size: int = 4
    ffn_proj_factor: float | int = 2.667
    ffn_round_up_to_multiple_of: int = 64
    slstm_num_heads: int | None = None
    slstm_conv_kernel_size: int = 4
    slstm_ffn_proj_factor: float | int = 1.3
    slstm_bias_init: str = "powerlaw_blockdependent"
    slstm_recurrent_init: str = "zeros"
    norm_type: str = "rms_norm"
    norm_eps: float | int = 1e-6
    eps: float | int = 1e-6
    gate_soft_cap: float | int | None = 15.0
    output_logit_soft_cap: float | int | None = 30.0
    use_bias: bool = False
    add_out_norm: bool = True
    dropout: float | int = 0.0
    chunk_size: int = 64
    backend: str = "auto"
    context_length: int | None = None
    keep_gates_in_fp32: bool = True
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0

    def __post_init__(self, **kwargs: Any):
        for theirs, ours in (("embedding_dim", "hidden_size"), ("num_blocks", "num_hidden_layers")):
            if theirs in kwargs:
                raise ValueError(
                    f"{theirs} must be given as {ours}, as it is called here, got {theirs}={kwargs[theirs]}."
                )
        for name in kwargs:
            taken = getattr(type(self), name, None)
            if name.startswith("__") or callable(taken) or (isinstance(taken, property) and taken.fset is None):
                raise ValueError(f"A configuration must have no field {name!r:.80}, which is the name of a part of it.")
        if self.block_types is None:
            if self.num_hidden_layers > MOST_BLOCKS:
                got = self.num_hidden_layers
                raise ValueError(f"num_hidden_layers must be at most {MOST_BLOCKS} without block_types, got {got}.")
            self.block_types = ["mlstm"] * self.num_hidden_layers
        if self.slstm_num_heads is None:
            self.slstm_num_heads = self.num_heads
        super().__post_init__(**kwargs)
        if not hasattr(self, "auto_map"):  # which TRL reads of every model that is not part of Transformers
            self.auto_map: dict[str, str] = {}

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in Transformers; the configuration of its own xLSTM is translated, and there has to be one."""
        fields, unused = super().get_config_dict(*args, **kwargs)
        if not isinstance(fields, dict) or not fields:
            got = "none" if not fields else type(fields).__name__
            where = args[0] if args else kwargs["pretrained_model_name_or_path"]
            raise OSError(f"The config.json in {where} must hold names and values, got {got}.")
        return _translated(fields), unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """As in Transformers; the configuration of its own xLSTM is translated."""
        fields = _translated(config_dict)
        if cls._auto_class is None:  # not the code that came with the checkpoint, which is not saved with it either
            fields = {key: value for key, value in fields.items() if key != "auto_map"}
        return super().from_dict(fields, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers. PEFT calls it before it looks up what it adapts by default in models of this type."""
        if (peft := sys.modules.get("peft.utils.constants")) is not None:
            targets = peft.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            targets.setdefault(type(self).model_type, list(LORA_TARGETS))
        fields = super().to_dict()
        return {name: value for name, value in fields.items() if name != "auto_map" or value}

    @classmethod
    def from_ratio(cls, ratio: str, **kwargs: Any) -> "XLSTMConfig":
        """The first paper's xLSTM[a:b]: of every `a + b` blocks the last `b` are sLSTM. `kwargs` are fields.

        Raises ValueError if `ratio` is not of the form `"7:1"` or `num_hidden_layers` is not a multiple of `a + b`.
        """
        match = re.fullmatch(r"(\d+):(\d+)", ratio) if isinstance(ratio, str) else None
        if match is None or int(match[1]) + int(match[2]) == 0:
            raise ValueError(f"ratio must be of the form 'mLSTM:sLSTM' such as '7:1' or '1:0', got {ratio!r}.")
        mlstm, slstm = int(match[1]), int(match[2])
        layers = kwargs.get("num_hidden_layers", cls.num_hidden_layers)
        if not isinstance(layers, int) or layers % (mlstm + slstm):
            raise ValueError(
                f"num_hidden_layers must be a multiple of {mlstm + slstm} for the ratio {ratio}, got {layers!r}; "
                "give block_types for any other order."
            )
        pattern = ["mlstm"] * mlstm + ["slstm"] * slstm
        block_types = pattern * (layers // len(pattern))
        return cls(**{**PAPER_DEFAULTS, "block_types": block_types, **kwargs})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "XLSTMConfig":
        """A published size: `"xlstm-7b"`, or `"xlstm-{125m,350m,760m,1.3b}-{1:0,7:1}"`. `overrides` are fields."""
        if name == "xlstm-7b":
            return cls(**overrides)
        match = re.fullmatch(r"xlstm-(.+)-(1:0|7:1)", name) if isinstance(name, str) else None
        if match is None or match[1] not in PAPER_SIZES:
            legal = ["xlstm-7b"] + [f"xlstm-{size}-{ratio}" for size in PAPER_SIZES for ratio in ("1:0", "7:1")]
            raise ValueError(f"preset must be one of {', '.join(legal)}, got {name!r}.")
        hidden_size, layers, slstm_at = PAPER_SIZES[match[1]]
        block_types = ["slstm" if match[2] == "7:1" and i in slstm_at else "mlstm" for i in range(layers)]
        shape = {"hidden_size": hidden_size, "num_hidden_layers": layers, "block_types": block_types}
        return cls(**{**PAPER_DEFAULTS, **shape, **overrides})

    @property
    def layer_types(self) -> list[str]:
        """What Transformers calls these layers; the kinds of block are in `block_types`."""
        return ["linear_attention"] * len(self.block_types)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism splits an `XLSTMModel`."""
        return tp_plan(self)

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        if plan != tp_plan(self):  # Transformers 5.16 sets it again
            raise AttributeError(
                "base_model_tp_plan must be that of the configuration, got another; DistributedConfig(tp_plan=...) "
                "changes rules of it."
            )

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """What of an `XLSTMModel` FSDP2 gathers at a time."""
        return {name: style for name, style in FSDP_PLAN.items() if name != "norm" or self.add_out_norm}

    @property
    def ranks(self) -> int:
        """How many processes share the heads of a model, which was loaded with a `DistributedConfig` if they do."""
        distributed = getattr(self, "distributed_config", None)
        return 1 if distributed is None else distributed.tp_size

    @property
    def processes(self) -> int:
        """How many processes share a model, which was loaded with a `DistributedConfig` if they do."""
        distributed = getattr(self, "distributed_config", None)
        sizes = ("tp_size", "fsdp_size", "pp_size", "dp_replicate_size")
        return math.prod(getattr(distributed, size, 1) for size in sizes)

    @property
    def ratio(self) -> str:
        """How many mLSTM blocks there are to how many sLSTM blocks, such as `"7:1"`: the paper's xLSTM[7:1]."""
        mlstm, slstm = self.block_types.count("mlstm"), self.block_types.count("slstm")
        divisor = math.gcd(mlstm, slstm)
        return f"{mlstm // divisor}:{slstm // divisor}"

    @property
    def inner_size(self) -> int:
        """Width inside an mLSTM block, which `num_heads` share as value dimensions."""
        if self.mlstm_block == "post_up":
            return int(self.hidden_size * self.v_dim_factor)
        return self._round_up(self.mlstm_proj_factor * self.hidden_size)

    @property
    def qk_size(self) -> int:
        """Width of all queries of an mLSTM block (and of all keys)."""
        return int(self.hidden_size * self.qk_dim_factor) if self.mlstm_block == "post_up" else self.inner_size

    @property
    def ffn_size(self) -> int:
        """Width of the SwiGLU of a post-up mLSTM block. The sum is rounded as a float, as xLSTM-7B does."""
        multiple = self.ffn_round_up_to_multiple_of
        return int((self.hidden_size * self.ffn_proj_factor + multiple - 1) // multiple * multiple)

    @property
    def slstm_ffn_size(self) -> int:
        """Width of the GeGLU of an sLSTM block; 0 means none."""
        return self._round_up(self.slstm_ffn_proj_factor * self.hidden_size)

    def _round_up(self, size: float) -> int:
        return math.ceil(size / self.ffn_round_up_to_multiple_of) * self.ffn_round_up_to_multiple_of

    def validate_architecture(self):
        """Refuse what cannot be built. Runs on construction."""
        for field, legal in CHOICES.items():
            if getattr(self, field) not in legal:
                raise ValueError(f"{field} must be one of {', '.join(legal)}, got {getattr(self, field)!r}.")
        for field in POSITIVE:
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field} must be positive and finite, got {value}.")
        for field in NOT_NEGATIVE:
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be zero or positive and finite, got {getattr(self, field)}.")
        for field in POSITIVE + NOT_NEGATIVE:
            if (value := getattr(self, field)) is not None and value > LARGEST:
                raise ValueError(f"{field} must be less than 2 ** 63, got {value}.")
        for field in ("gate_soft_cap", "output_logit_soft_cap"):
            if (value := getattr(self, field)) is not None and value < SMALLEST:
                raise ValueError(f"{field} must be at least 2 ** -126, got {value}.")
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            tokens = getattr(self, field)
            for token in tokens if isinstance(tokens, list) else [tokens]:
                if token is not None and abs(token) > LARGEST:
                    raise ValueError(f"{field} must be less than 2 ** 63, got {token}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout}.")
        if len(self.block_types) != self.num_hidden_layers:
            raise ValueError(
                f"block_types must have num_hidden_layers = {self.num_hidden_layers} entries, "
                f"got {len(self.block_types)}."
            )
        for i, kind in enumerate(self.block_types):
            if kind not in ("mlstm", "slstm"):
                raise ValueError(f"block_types must hold 'mlstm' or 'slstm', got {kind!r} at position {i}.")
        self._require_countable("vocab_size", self.vocab_size)
        self._require_countable("hidden_size", self.hidden_size)
        if "mlstm" in self.block_types:
            self.check_mlstm()
        if "slstm" in self.block_types:
            self.check_slstm()

    def check_slstm(self):
        """Refuse sizes of which no sLSTM can be built. Runs on construction if there is one."""
        self._require_multiple("hidden_size", self.hidden_size, "slstm_num_heads", self.slstm_num_heads)
        self._require_countable("slstm_conv_kernel_size", self.slstm_conv_kernel_size)
        self._require_countable("hidden_size * slstm_ffn_proj_factor, rounded up,", self.slstm_ffn_size)

    def check_mlstm(self):
        """Refuse sizes of which no mLSTM can be built. Runs on construction if there is one."""
        if self.mlstm_block == "post_up":
            self._require_multiple("hidden_size * qk_dim_factor", self.qk_size, "num_heads", self.num_heads)
            self._require_multiple("hidden_size * v_dim_factor", self.inner_size, "num_heads", self.num_heads)
            if not self.ffn_size:
                width = self.hidden_size * self.ffn_proj_factor
                raise ValueError(f"hidden_size * ffn_proj_factor must be at least 1, got {width}.")
            self._require_countable("hidden_size * qk_dim_factor", self.qk_size)
            self._require_countable("hidden_size * v_dim_factor", self.inner_size)
            self._require_countable("hidden_size * ffn_proj_factor, rounded up,", self.ffn_size)
            return
        inner = "the inner width (hidden_size * mlstm_proj_factor, rounded up)"
        self._require_multiple(inner, self.inner_size, "num_heads", self.num_heads)
        self._require_multiple(inner, self.inner_size, "mlstm_qkv_block_size", self.mlstm_qkv_block_size)
        self._require_countable(inner, self.inner_size)
        self._require_countable("conv_kernel_size", self.conv_kernel_size)

    @staticmethod
    def _require_multiple(what: str, size: int, of: str, divisor: int):
        if size < divisor or size % divisor:
            raise ValueError(f"{what} must be a multiple of {of} = {divisor}, got {size}.")

    @staticmethod
    def _require_countable(what: str, size: int):
        if size > WIDEST:
            raise ValueError(f"{what} must be at most 2 ** 28, got {size}.")


def _translated(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of an `XLSTMConfig`, from a `config.json` of ours or of Transformers' own xLSTM. Left out are those by
    which Transformers would fetch kernels of attention from the Hub and run them.
    """
    fields = {name: value for name, value in fields.items() if not OF_FETCHED_KERNELS.fullmatch(name)}
    if fields.get("model_type") != "xlstm":
        return fields
    if "quantization_config" in fields:
        raise ValueError(
            "A checkpoint of Transformers' own xLSTM must not be quantised, got one with quantization_config: load the "
            "original with quantization_config instead."
        )
    return {**fields_from(fields, "transformers"), "model_type": XLSTMConfig.model_type}
