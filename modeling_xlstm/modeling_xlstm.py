"""The xLSTM family in PyTorch: block, pretrained model, stack and heads.

Dims: `B` batch `T` time `D` hidden size. A block is called like `nn.LSTM`: `y, state = block(x, state)`, x and y
`[B, T, D]`. What a block is made of is in `layers_xlstm.py`.

Papers: https://arxiv.org/abs/2405.04517 (xLSTM[a:b]) and https://arxiv.org/abs/2503.13427 (xLSTM-7B).
"""

import copy
import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import ModelOutput, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .backends import CACHE, HAS_TRITON, OTHER_NAMES, resolve
from .cache_xlstm import LayerState, XLSTMCache
from .checkpoint_xlstm import from_native
from .checks import is_finite
from .configuration_formats import fields_to
from .configuration_xlstm import XLSTMConfig
from .custom_op import is_compiling
from .distribution_xlstm import SEED, DistributionMixin, check_alike, first_of_all, random_state
from .fused import causal_lm_loss, causal_lm_loss_in_parts, soft_cap
from .generation_xlstm import XLSTMGenerationMixin
from .graphs_xlstm import ACTIVE
from .inputs_xlstm import (
    BOUNDARIES,
    check_cache,
    check_checkpointing,
    check_embeds,
    check_ids,
    check_kept,
    check_some_token,
    only_cache,
    packed_bounds,
    padding_mask,
)
from .layers_xlstm import (
    BlockDiagonalLinear,
    CausalConv1d,
    GateActivations,
    GatedFeedForward,
    GateLinear,
    HeadNorm,
    MLSTMLayer,
    MLSTMPreUpLayer,
    OnGates,
    SLSTMLayer,
    XLSTMNorm,
    init_linear_,
    last,
    small_std,
)
from .linear import is_alone, linear
from .saving import replaced
from .tensor_parallel import block_weights, pack_projections
from .tensor_parallel_rows import rows_of


if HAS_TRITON:
    from .block_triton import block_steps, step_weights


logger = logging.get_logger(__name__)


class XLSTMBlock(GradientCheckpointingLayer):
    """Pre-norm residual block: `x + mixer(norm(x))`, then `x + ffn(norm(x))` where the block has a feed-forward.

    `y, state = block(x, state)` with x, y `[B, T, hidden_size]`; `state` is a `LayerState`, `None` to start. With
    `keep`, y is of the last `keep` positions only; `on_gates` is called with the `GateActivations` of all.
    """

    def __init__(self, config: XLSTMConfig, layer_idx: int = 0):
        super().__init__()
        if not 0 <= layer_idx < config.num_hidden_layers:
            raise ValueError(f"layer_idx must be from 0 to {config.num_hidden_layers - 1}, got {layer_idx}.")
        self.mixer_norm = XLSTMNorm(config)
        self.mixer: nn.Module
        if config.block_types[layer_idx] == "slstm":
            self.mixer = SLSTMLayer(config, layer_idx)
            ffn_size, activation = config.slstm_ffn_size, "gelu"
        elif config.mlstm_block == "post_up":
            self.mixer = MLSTMLayer(config)
            ffn_size, activation = config.ffn_size, "silu"
        else:
            self.mixer = MLSTMPreUpLayer(config)
            ffn_size, activation = 0, "silu"
        self.ffn_norm = XLSTMNorm(config) if ffn_size else None
        self.ffn = GatedFeedForward(config, ffn_size, activation) if ffn_size else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        keep: int | None = None,
        on_gates: OnGates | None = None,
    ) -> tuple[Tensor, LayerState]:
        if HAS_TRITON and on_gates is None and (weights := step_weights(self, x, state, cu_seqlens)) is not None:
            return last(block_steps(self, weights, x, state, mask), keep), state
        options: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens, "keep": keep, "on_gates": on_gates}
        y, state = self.mixer(self.mixer_norm(x), state, **options)
        x = last(x, keep) + (self.dropout(y) if self.training else y)
        if self.ffn is not None:
            y = self.ffn(self.ffn_norm(x))
            x = x + (self.dropout(y) if self.training else y)
        return x, state


INITIALISE_THEMSELVES = (
    XLSTMNorm, HeadNorm, GateLinear, BlockDiagonalLinear, CausalConv1d, MLSTMPreUpLayer, SLSTMLayer,
)  # fmt: skip


@dataclass
class WithGates(ModelOutput):
    """What every model returns last."""

    gates: tuple[GateActivations, ...] | None = None  # of each block, with output_gates=True


@dataclass
class XLSTMModelOutput(WithGates, BaseModelOutputWithPast):
    """What [`XLSTMModel`] returns."""


@dataclass
class XLSTMCausalLMOutput(WithGates, CausalLMOutputWithPast):
    """What [`XLSTMForCausalLM`] returns."""


@dataclass
class XLSTMSequenceClassifierOutput(WithGates, SequenceClassifierOutputWithPast):
    """What [`XLSTMForSequenceClassification`] returns."""


@dataclass
class XLSTMTokenClassifierOutput(WithGates, TokenClassifierOutput):
    """What [`XLSTMForTokenClassification`] returns."""


for output in (XLSTMModelOutput, XLSTMCausalLMOutput, XLSTMSequenceClassifierOutput):
    for name in OTHER_NAMES:
        setattr(output, name, property(lambda self: getattr(self, CACHE)))


def named(cache: XLSTMCache | None) -> dict[str, Any]:
    """The argument of an output that is a cache."""
    return {CACHE: cache}


class XLSTMPreTrainedModel(DistributionMixin, PreTrainedModel):
    """Initialisation, loading and the generation hooks of all xLSTM models."""

    config: XLSTMConfig
    config_class = XLSTMConfig
    base_model_prefix = "model"
    _no_split_modules = ["XLSTMBlock"]
    _skip_keys_device_placement = [CACHE, *OTHER_NAMES]
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": XLSTMBlock}

    def __init__(self, config: XLSTMConfig, *args: Any, **kwargs: Any):
        if getattr(config, "model_type", None) != XLSTMConfig.model_type:
            raise TypeError(
                f"config must be an XLSTMConfig, got {type(config).__name__}; XLSTMConfig.from_dict(config.to_dict()) "
                "makes one of that of Transformers' own xLSTM."
            )
        if config.processes > 1 and torch.get_default_device().type != "meta":
            raise ValueError(
                f"config must not be that of a model which {config.processes} processes share, as it has its own "
                "distributed_config; XLSTMConfig.from_dict(config.to_dict()) makes another."
            )
        config.validate_architecture()  # of which fields may have been changed
        super().__init__(config, *args, **kwargs)
        # A pattern from the start of a name, which is all that some quantisers look at.
        gates = {".*gate_proj", ".*gate_weight", ".*gate_bias"}
        # The first is what quantisers leave alone, both are what `_get_dtype_plan` keeps in float32.
        self._keep_in_fp32_modules, self._keep_in_fp32_modules_strict = gates, set(gates)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return super()._get_dtype_plan(dtype) if self.config.keep_gates_in_fp32 else {}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # Every module that has parameters of its own: Transformers passes over the others.
        if isinstance(module, INITIALISE_THEMSELVES):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding | nn.Linear):
            std = getattr(module, "init_std", small_std(self.config))
            init_linear_(module.weight, getattr(module, "bias", None), std)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any):
        """As in Transformers; raises ValueError if the checkpoint holds a weight that is not finite, or if quantised
        weights do not take the `dtype` or the `group_size` asked for.

        Embeddings that a checkpoint says are tied, but stores as two different weights, are not tied: Transformers' own
        xLSTM writes such checkpoints.
        """
        if (config := kwargs.get("config")) is not None and getattr(config, "distributed_config", None) is not None:
            kwargs["config"] = copy.copy(config)
            kwargs["config"].distributed_config = None  # of the model that it was given to
        result = super().from_pretrained(*args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        if getattr(model, "is_quantized", False):
            _check_quantized(model)
        names = (name for name, weight in model.named_parameters() if not _is_finite(weight))
        if name := first_of_all(next(names, None), model):
            raise ValueError(f"All weights of a checkpoint must be finite, got NaN or infinity in {name}.")
        model.settle_loaded()
        if model.config.ranks > 1:
            pack_projections(model)
        ends = [getattr(x, "weight", None) for x in (model.get_output_embeddings(), model.get_input_embeddings())]
        if all(x is not None for x in ends) and ends[0] is not ends[1]:
            model.config.tie_word_embeddings = False
        return result

    def train(self, mode: bool = True):
        """As in PyTorch. From now on bitsandbytes' 4-bit weights keep their order, as gradients through that for a CPU
        are wrong; raises RuntimeError if they have that one already.
        """
        if mode and getattr(self, "is_loaded_in_4bit", False):
            _keep_order(self)
        return super().train(mode)

    def save_pretrained(  # type: ignore[override]  # the rest of its parameters are in kwargs
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        save_original_format: bool = False,
        **kwargs: Any,
    ):
        """As in Transformers, except that `save_original_format` is off: weights are saved as they are in memory. A
        model that the directory holds already is replaced once the new one is there: what loads is one of them, even if
        saving is stopped half-way.

        With `save_original_format=True` a language model is saved in the format of Transformers' own xLSTM, for those
        who load it without this package. It takes the memory of the weights once more.

        Raises ValueError if that format cannot express the model.
        """
        if getattr(self, "_pp_stage", None) is not None:
            raise ValueError("A model must not be a pipeline to be saved, got one, with blocks in several processes.")
        common = {"is_main_process": is_main_process, "save_original_format": False, **kwargs}
        writes = is_main_process and not (torch.distributed.is_initialized() and torch.distributed.get_rank())
        in_parts = common.get("distributed_checkpoint") or getattr(self, "_hf_peft_config_loaded", False)
        place: AbstractContextManager[str] = nullcontext(os.fspath(save_directory))
        if writes and not in_parts:
            place = replaced(save_directory, common.get("variant"))
        if not save_original_format:
            if push_to_hub:
                common.setdefault("repo_id", Path(save_directory).name)
            with place as folder:
                super().save_pretrained(folder, state_dict=state_dict, push_to_hub=push_to_hub, **common)
            return
        if not isinstance(self, XLSTMForCausalLM):
            raise ValueError(f"Transformers' format is that of a language model, got {type(self).__name__}.")
        if self.config.processes > 1:
            raise ValueError(
                f"save_original_format=True needs a model in one process, got one spread over {self.config.processes}: "
                "save it as it is, load that in one process and save it again."
            )
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError("save_original_format=True needs a model without adapters: merge or unload them first.")
        if getattr(self, "is_quantized", False):
            raise ValueError("save_original_format=True needs a model that is not quantised, got one that is.")
        if push_to_hub:
            raise ValueError("save_original_format=True saves to a directory only, got push_to_hub=True.")
        fields = fields_to(self.config, "transformers")
        native = self.state_dict() if state_dict is None else state_dict
        origin = from_native(native, self.config, "transformers", weight_shapes(self.config))
        with place as folder:
            super().save_pretrained(folder, state_dict=origin, **common)
            if is_main_process:
                fields["dtype"] = str(self.dtype).removeprefix("torch.")
                Path(folder, "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    def set_backend(self, backend: str) -> None:
        """Selects the kernels of every layer: `"auto"`, `"torch"` or `"triton"`; raises if they cannot run here."""
        kinds = MLSTMLayer | MLSTMPreUpLayer | SLSTMLayer | GatedFeedForward | GateLinear | CausalConv1d | XLSTMNorm
        layers = [x for x in self.modules() if isinstance(x, kinds)]
        for layer in layers:
            if isinstance(layer, SLSTMLayer):
                resolve(backend, layer.recurrent_weight, "sLSTM")
            else:
                resolve(backend, next(layer.parameters()))
        self.config.backend = backend
        for layer in layers:
            layer.backend = backend


class XLSTMModel(XLSTMPreTrainedModel):
    """Embedding, blocks and final norm: the stack that all heads share."""

    def __init__(self, config: XLSTMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(XLSTMBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = XLSTMNorm(config) if config.add_out_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.reads_alike = False
        self.post_init()

    def _check_alike(self, given: Tensor, mask: Tensor | None) -> None:
        """Of the first pass in training mode. Raises ValueError if processes that share heads are given other rows, or
        would drop other channels."""
        if is_compiling():
            return
        check_alike(self.text_group, "rows", given, mask)
        if self.config.dropout:
            check_alike(self.text_group, SEED, random_state(given.device))
        self.reads_alike = True

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: XLSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: XLSTMCache | None = None,
        cache_params: XLSTMCache | None = None,
        logits_to_keep: int = 0,
        output_gates: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> XLSTMModelOutput:
        r"""
        Args:
            input_ids: Token ids `[B, T]`; or `inputs_embeds` `[B, T, D]`.
            attention_mask: `[B, T]`, or `[B, past + T]` of which the last T columns are used. Zero marks padding, on
                any side: it leaves the recurrent state as it was.
            past_key_values: State of the text so far, updated by the call. Created when omitted, if `use_cache` and the
                model is not in training mode. `cache` and `cache_params` are other names of it. Of a long text that is
                read in pieces, no more than the last can be taken back.
            cu_seq_lens_q, seq_idx, position_ids: Boundaries `[N + 1]` of sequences packed into a batch of 1, or numbers
                `[1, T]` of the sequences that tokens are of, or positions, which start again with each; the state
                starts anew there.
            logits_to_keep: Positions at the end that the last block has to give an output for, 0 for all. If only some
                are kept, a long text is read in pieces, so that memory does not grow with it (not under autograd).
            output_gates: Whether to return `gates`. Not with gradient checkpointing in training mode.

        Returns:
            `last_hidden_state` `[B, T or logits_to_keep, D]`, `past_key_values`, and on request `hidden_states`: the
            embedding and the output of every block, the last of them normalised; and `gates`: of every block the
            [`GateActivations`] of all T tokens.

        Raises:
            TypeError, ValueError, IndexError: An input does not fit; the message says what, got and expected.
        """
        past_key_values = only_cache(past_key_values=past_key_values, cache=cache, cache_params=cache_params)
        # of a pipeline's later stages, which embed nothing, that of a norm
        weight = self.embed_tokens.weight if hasattr(self.embed_tokens, "weight") else next(self.parameters())
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"Exactly one of input_ids and inputs_embeds must be given, got {got}.")
        if input_ids is not None:
            check_ids(input_ids, self.config.vocab_size)
        else:
            check_embeds(inputs_embeds, weight)
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be an integer of at least 0 for a stack, got {logits_to_keep!r}.")
        given = inputs_embeds if input_ids is None else input_ids
        B, T = given.shape[:2]
        cache = past_key_values
        if cache is None and use_cache and not self.training:
            cache = XLSTMCache(self.config)
        if cache is not None:
            check_cache(cache, self, B, weight.dtype, given.device)
            check_checkpointing(self)
        mask = padding_mask(attention_mask, B, T, cache)
        if self.training and self.text_group is not None and not self.reads_alike:
            self._check_alike(given, mask)
        cu_seqlens = packed_bounds(kwargs, B, T, given.device, mask)
        mask = mask if cu_seqlens is None else None
        if cu_seqlens is not None and cache is not None:
            if past_key_values is not None:
                raise ValueError(
                    "Packed sequences start from empty states, got past_key_values; unpack them to continue."
                )
            cache = None

        collecting = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        gates: list[GateActivations] = []
        if output_gates and self.training and self.gradient_checkpointing:
            raise ValueError("output_gates must be off with gradient checkpointing, which recomputes them, got True.")
        whole = cache is None or not logits_to_keep or collecting or output_gates or torch.is_grad_enabled()
        whole = whole or is_compiling()
        for start, end in [(0, T)] if whole else _pieces(B, T, logits_to_keep):
            piece = given[:, start:end]
            part = None if mask is None else mask[:, start:end]
            if input_ids is not None:
                x = self.embed_tokens(piece)
            else:  # which may hold anything where there is padding, even NaN
                x = piece if part is None else piece.masked_fill(~part[..., None], 0.0)
            keep = (logits_to_keep or None) if end == T else 1
            show = gates.append if output_gates else None
            x = self.read(x, cache, part, cu_seqlens, keep, on_gates=show, scatter=not whole)
            if end < T:
                cache.is_broken = True  # until all is read
                cache.records = []  # what it takes to undo it would grow with the text
        return XLSTMModelOutput(
            last_hidden_state=self.norm(x), gates=tuple(gates) if output_gates else None, **named(cache)
        )

    def read(
        self,
        x: Tensor,
        cache: XLSTMCache | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        keep: int | None = None,
        inputs: list[Tensor] | None = None,
        on_gates: OnGates | None = None,
        scatter: bool = False,
    ) -> Tensor:
        """x `[B, T, D]` through all blocks, y of the last `keep` positions; the cache reads on.

        Args:
            x, mask, cu_seqlens, keep: As in [`XLSTMBlock`].
            inputs: A list for what is given to each block.
            on_gates: Called with the gates of each.
            scatter: Whether GPUs that share the heads may each have some rows between blocks, which nobody sees then.
        """
        B, T, _ = x.shape
        if cache is not None:
            cache.is_broken = True  # until all layers have read, whatever stops them
        recording = cache is not None and cache.is_recording
        passes: list[tuple] = []  # of each layer what it takes to redo it
        shares = scatter and not recording and self.config.ranks > 1
        rows = rows_of(x, self.text_group, self.config.backend) if shares else None
        for i, block in enumerate(self.layers):
            if isinstance(block, nn.Identity):  # it is another process's
                continue
            state = None if cache is None else cache.get_state(i, B)
            if recording:
                before = None if state is None or cache.layers[i].is_empty else state.map(Tensor.clone)
                passes.append((block, x, before))
            if inputs is not None:
                inputs.append(x)
            kept = keep if i + 1 == len(self.layers) else None
            if rows is not None and kept is None and (weights := block_weights(block)) is not None:
                state = rows.block(block, weights, state, mask)
            else:
                x, rows = (x if rows is None else rows.whole()), None
                x, state = block(x, state, mask=mask, cu_seqlens=cu_seqlens, keep=kept, on_gates=on_gates)
            if cache is not None:
                cache.update(state, i)
        if cache is not None:
            cache.advance(T, x.device)
            if recording:
                cache.record(T, partial(_undo, passes, mask))
            cache.is_broken = False
        return x


# Tokens of all rows that are read at once, so that the memory for a prompt does not grow with it.
PIECE = 16384


def _pieces(B: int, T: int, keep: int) -> list[tuple[int, int]]:
    """Bounds of pieces of T tokens of B rows, about as long as each other, the last of at least `keep`."""
    count = -(-B * T // PIECE)
    starts = list(range(0, max(1, T - keep + 1), -(-T // count)))
    return list(pairwise([*starts, T]))


def _is_finite(weight: Tensor) -> bool:
    """Whether what this process has of a weight is. Quantised ones are of classes which may not know isfinite."""
    if (part := getattr(weight, "ds_tensor", None)) is not None:  # of DeepSpeed, whose last part may end with anything
        before = part.numel() * torch.distributed.get_rank(weight.ds_process_group)  # type: ignore[attr-defined]
        weight = part[: max(weight.ds_numel - before, 0)]  # type: ignore[attr-defined]
    weight = weight.to_local() if isinstance(weight, DTensor) else weight
    known = type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and not weight.is_meta
    return not known or not weight.numel() or is_finite(weight)


def _check_quantized(model: XLSTMPreTrainedModel) -> None:
    dtype = model.get_input_embeddings().weight.dtype
    if dtype != model.config.dtype:
        expected = f"the dtype that it was saved in, {dtype}"
        raise ValueError(f"A quantised checkpoint must load in {expected}, got dtype={model.config.dtype}.")
    # torchao leaves a weight that its groups do not divide as it is, without a word
    quantizer: Any = model.hf_quantizer
    group_size = getattr(getattr(quantizer.quantization_config, "quant_type", None), "group_size", None)
    if not group_size:
        return
    for name, weight in model.named_parameters():
        if weight.shape[-1] % group_size and quantizer.param_needs_quantization(model, name):
            shape = tuple(weight.shape)
            raise ValueError(f"group_size must divide the columns of {name}, of shape {shape}, got {group_size}.")


def _keep_order(model: nn.Module) -> None:
    """bitsandbytes changes that of 4-bit weights where a CPU with AVX512-BF16 first reads a text in eval mode."""
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise RuntimeError(
                f"4-bit weights must be trained before a CPU reads a text with them in eval mode, got {name} in the "
                "order that bitsandbytes gives them then, through which gradients are wrong; load the model again."
            )


def _undo(passes: list[tuple], mask: Tensor | None, cache: XLSTMCache, kept: int) -> None:
    """Takes back a forward pass but for its first tokens, which the mixers read again."""
    mask = None if mask is None else mask[:, :kept]
    for layer, (block, x, before) in zip(cache.layers, passes, strict=True):
        if kept:
            layer.update(block.mixer(block.mixer_norm(x[:, :kept]), before, mask=mask)[1])
        elif before is not None:
            layer.update(before)
        else:
            layer.reset()


class XLSTMForCausalLM(XLSTMPreTrainedModel, XLSTMGenerationMixin):
    """Language model: the stack and a projection to (optionally soft-capped) logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "xlstm_head"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # its form, not its annotation

    def __init__(self, config: XLSTMConfig):
        super().__init__(config)
        self.model = XLSTMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: XLSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: XLSTMCache | None = None,
        cache_params: XLSTMCache | None = None,
        skip_logits: bool = False,
        output_gates: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> XLSTMCausalLMOutput:
        r"""
        Args:
            labels: Token ids `[B, T]` to predict, shifted inside; -100 is ignored. Of the kept positions only.
            skip_logits: With labels, gives no logits. The kernels then have only a part of them in memory at a time, if
                `lm_head` is a linear layer with nothing around it.
            logits_to_keep: Logits of the last n positions only, or of the positions in a tensor; 0 for all.
            Others: As in [`XLSTMModel`].

        Returns:
            `loss`, `logits` `[B, T, vocab_size]` in the dtype of the model, `past_key_values`, `hidden_states` and
            `gates`.

        Raises:
            As [`XLSTMModel`]; and FloatingPointError if logits outside training are not finite (on a CPU).
        """
        cache = only_cache(past_key_values=past_key_values, cache=cache, cache_params=cache_params)
        check_kept(logits_to_keep, inputs_embeds if input_ids is None else input_ids)
        graphs = None if is_compiling() else ACTIVE.get()
        if graphs is not None and graphs.model() is self:
            others = (labels, inputs_embeds, *(kwargs.get(name) for name in BOUNDARIES))
            wanted = all(x is None for x in others) and not (kwargs.get("output_hidden_states") or output_gates)
            if wanted and graphs.fits(input_ids, cache, logits_to_keep):
                check_ids(input_ids, self.config.vocab_size)
                mask = padding_mask(attention_mask, len(input_ids), input_ids.shape[1], cache)
                logits = graphs(input_ids, mask, cache)[:, -logits_to_keep:]
                return XLSTMCausalLMOutput(logits=logits, **named(cache))
            graphs.vacate()
        # what is kept of the logits is all that the last block needs to give, unless its output is wanted as well
        cut = isinstance(logits_to_keep, int) and logits_to_keep > 0
        whole = kwargs.get("output_hidden_states") or self.config.output_hidden_states
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep if cut and not whole else 0,
            output_gates=output_gates,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = outputs.last_hidden_state[:, kept]
        if labels is None:
            logits, loss = self.logits(x), None
        else:
            if attention_mask is not None:
                check_some_token(attention_mask)
            logits, loss = self._logits_and_loss(x, labels, skip_logits, **kwargs)
        if not self.training and logits is not None:
            _check_finite(logits)
        if skip_logits and labels is not None:
            logits = None
        return XLSTMCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            gates=outputs.gates,
            **named(outputs.past_key_values),
        )

    def logits(self, x: Tensor) -> Tensor:
        """Logits `[..., vocab_size]` of what the stack gives `[..., D]`."""
        return linear(self.lm_head, x, cap=self.config.output_logit_soft_cap, backend=self.config.backend)

    def _logits_and_loss(
        self, x: Tensor, labels: Tensor, skip_logits: bool, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor]:
        for name, given in (("labels", labels), ("shift_labels", kwargs.get("shift_labels"))):
            if given is not None:
                _check_label_shape(name, given, x)
        config, head, backend = self.config, self.lm_head, self.config.backend
        options: dict[str, Any] = {"labels": labels, "vocab_size": config.vocab_size, **kwargs}
        in_triton = self.loss_function is causal_lm_loss and HAS_TRITON and resolve(backend, x) == "triton"
        capped = options | {"cap": config.output_logit_soft_cap}
        if in_triton and skip_logits and is_alone(head) and head.bias is None:
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
            return None, causal_lm_loss_in_parts(x.to(dtype), head.weight.to(dtype), **capped)
        before = linear(head, x, backend=backend)
        logits = soft_cap(before, config.output_logit_soft_cap, backend)
        if in_triton:  # a kernel caps them as it reads them, and their gradient goes through one tensor less
            return logits, causal_lm_loss(before, backend=backend, **capped)
        return logits, self.loss_function(logits=logits, **options)


def _check_label_shape(name: str, labels: Tensor, x: Tensor) -> None:
    """x has an entry for each logit."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor [B, T], got {type(labels).__name__}.")
    if labels.shape != x.shape[:2]:
        raise ValueError(f"{name} must have shape {tuple(x.shape[:2])} like the logits, got {tuple(labels.shape)}.")


def _check_finite(logits: Tensor) -> None:
    """Outside training a NaN can only mean broken weights or inputs, and argmax would turn it into a wrong token."""
    if is_compiling() or logits.device.type != "cpu":
        return
    # the last position has seen all others through the states
    if not torch.isfinite(logits[:, -1:]).all():
        raise FloatingPointError(
            "The logits must be finite, got NaN or infinity: a weight or an input is not finite, or overflows "
            f"{logits.dtype}."
        )


class XLSTMForSequenceClassification(XLSTMPreTrainedModel):
    """A label for each sequence, read at its last token that is not padding."""

    accepts_loss_kwargs = False  # its loss is a mean, which `Trainer` divides where a batch is accumulated

    def __init__(self, config: XLSTMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = XLSTMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: XLSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> XLSTMSequenceClassifierOutput:
        r"""
        Args:
            attention_mask: As in [`XLSTMModel`]. Without it, a sequence ends where only `config.pad_token_id` follows.
            labels: A class `[B]`, numbers `[B, num_labels]`, or several classes, by `config.problem_type`.
            Others: As in [`XLSTMModel`]. Of packed sequences, each has its logits and label.

        Returns:
            `loss`, `logits` `[B, num_labels]`, `past_key_values`, `hidden_states` and `gates`.

        Raises:
            As [`XLSTMModel`]; and ValueError if nothing tells where the sequences of a batch end.
        """
        kwargs["position_ids"], kwargs["logits_to_keep"] = position_ids, 0
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        x = outputs.last_hidden_state
        mask = None if attention_mask is None else attention_mask[:, -x.shape[1] :] != 0
        bounds = packed_bounds(kwargs, x.shape[0], x.shape[1], x.device, mask)
        if bounds is not None:
            x = x[0, bounds[1:] - 1]
        else:
            x = x[torch.arange(x.shape[0], device=x.device), self._last_tokens(x.shape[0], input_ids, mask)]
        logits = self.score(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return XLSTMSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            gates=outputs.gates,
            **named(outputs.past_key_values),
        )

    def _last_tokens(self, B: int, input_ids: Tensor | None, real: Tensor | None) -> Tensor | int:
        """Positions `[B]` of the last token of each sequence, of which `real` `[B, T]` says where tokens are."""
        if real is None and input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        if real is None:
            if B == 1:
                return -1
            missing = "inputs_embeds" if input_ids is None else "input_ids, and no pad_token_id in the configuration"
            raise ValueError(f"A batch of sequences must come with an attention_mask, got only {missing}.")
        if real.device.type == "cpu" and not is_compiling() and not real.any(1).all():
            raise ValueError(
                f"Each sequence must have a token to be classified at, got none in {(~real.any(1)).sum()}."
            )
        return (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1)


class XLSTMForTokenClassification(XLSTMPreTrainedModel):
    """A label for each token."""

    accepts_loss_kwargs = False  # its loss is a mean, which `Trainer` divides where a batch is accumulated

    def __init__(self, config: XLSTMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = XLSTMModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: XLSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> XLSTMTokenClassifierOutput:
        r"""
        Args:
            labels: A class `[B, T]` for each token; -100 is ignored.
            Others: As in [`XLSTMModel`].

        Returns:
            `loss`, `logits` `[B, T, num_labels]`, `hidden_states` and `gates`.

        Raises:
            As [`XLSTMModel`].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            _check_label_shape("labels", labels, logits)
            if labels.device.type == "cpu" and not is_compiling() and (labels == -100).all():  # a GPU is not waited for
                raise ValueError("labels must hold a label to learn, got only -100.")
            loss = self.loss_function(logits, labels, self.config)
        hidden_states, gates = outputs.hidden_states, outputs.gates
        return XLSTMTokenClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states, gates=gates)


def weight_shapes(config: XLSTMConfig) -> dict[str, torch.Size]:
    """Names and shapes of the weights of `XLSTMForCausalLM(config)`, without allocating any."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in XLSTMForCausalLM(config).state_dict().items()}


def count_parameters(config: XLSTMConfig) -> int:
    """Parameters of `XLSTMForCausalLM(config)`, tied ones once, without allocating any."""
    with torch.device("meta"):
        return XLSTMForCausalLM(config).num_parameters()
