"""What a model may be given: checks, whose messages say what, got and expected, and what padding and packing mean.

Dims: `B` batch `T` time `D` hidden size `N` packed sequences.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .cache_xlstm import XLSTMCache
from .checks import as_int32, autocasts, check_float, check_sequence, state_dtype
from .custom_op import is_compiling


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor [B, T], got {type(input_ids).__name__}.")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must have shape [B, T] with at least one token, got {tuple(input_ids.shape)}.")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}.")
    # On an accelerator the embedding itself stops at a wrong id; a check here would wait for it at every step.
    if input_ids.device.type == "cpu" and not is_compiling():
        low, high = input_ids.min().item(), input_ids.max().item()
        if low < 0 or high >= vocab_size:
            raise IndexError(f"input_ids must be from 0 to {vocab_size - 1}, got values from {low} to {high}.")


def check_embeds(inputs_embeds: Tensor, weight: Tensor) -> None:
    check_float("inputs_embeds", inputs_embeds, "B T D")
    if inputs_embeds.shape[-1] != weight.shape[-1]:
        raise ValueError(f"inputs_embeds must have shape [B, T, {weight.shape[-1]}], got {tuple(inputs_embeds.shape)}.")
    if inputs_embeds.dtype != weight.dtype and not autocasts(inputs_embeds.device):
        raise TypeError(f"inputs_embeds must be {weight.dtype} like the weights, got {inputs_embeds.dtype}.")


def check_kept(logits_to_keep: int | Tensor, given: Any) -> None:
    """A number of positions at the end of what a model is given, or these positions."""
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be at least 0, got {logits_to_keep}.")
        return
    if not isinstance(logits_to_keep, Tensor) or logits_to_keep.dtype not in (torch.int64, torch.int32):
        got = logits_to_keep.dtype if isinstance(logits_to_keep, Tensor) else type(logits_to_keep).__name__
        raise TypeError(f"logits_to_keep must be an integer or an int64 tensor of positions [N], got {got}.")
    if logits_to_keep.dim() != 1:
        raise ValueError(f"logits_to_keep must be an integer or have shape [N], got {tuple(logits_to_keep.shape)}.")
    if logits_to_keep.device.type != "cpu" or is_compiling():
        return
    T = given.shape[1] if isinstance(given, Tensor) and given.dim() > 1 else 0
    wrong = logits_to_keep[(logits_to_keep < -T) | (logits_to_keep >= T)]
    if T and len(wrong):
        raise IndexError(f"logits_to_keep must hold positions of {T} tokens, got {wrong[0].item()}.")


def only_cache(**caches: Any) -> Any:
    """The one that is given under one of its names, or None."""
    given = {name: caches[name] for name in sorted(caches) if caches[name] is not None}
    if len(given) > 1:
        raise ValueError(
            "Only one of past_key_values and its other names, cache and cache_params, may be given, got "
            f"{' and '.join(given)}."
        )
    return next(iter(given.values()), None)


def check_cache(
    cache: Cache, model: Any, batch_size: int | None, dtype: torch.dtype, device: torch.device
) -> None:  # fmt: skip
    if not isinstance(cache, XLSTMCache):
        raise TypeError(f"past_key_values must be an XLSTMCache, got {type(cache).__name__}.")
    # the layers of a model that is spread over devices have their states where they are
    where = None if hasattr(model.layers[0], "_hf_hook") else device
    cache.check(model.config, batch_size, state_dtype(dtype), where)


def check_checkpointing(model: Any) -> None:
    if not (model.training and model.gradient_checkpointing):
        return
    if getattr(model._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
        raise ValueError(
            "Gradient checkpointing must have use_reentrant=False to train through past_key_values, got "
            "use_reentrant=True, which drops the gradient of the states."
        )


def padding_mask(attention_mask: Tensor | None, B: int, T: int, cache: XLSTMCache | None) -> Tensor | None:
    """The last T columns as bool, or None without padding."""
    if attention_mask is None:
        return None
    compiling = is_compiling()
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.shape[0] != B:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask must have shape [{B}, {T}] or [{B}, past + {T}], got {got}.")
    length = attention_mask.shape[1]
    if length != T and not compiling:
        past = 0 if cache is None else cache.get_seq_length()
        if length != past + T:
            fits = f"{T} or {past} + {T} long (past and new tokens)" if past else f"{T} long"
            raise ValueError(f"attention_mask must be {fits}, got {length}.")
    mask = attention_mask[:, -T:] != 0
    if attention_mask.dtype != torch.bool and mask.device.type == "cpu" and not compiling:
        values = attention_mask[:, -T:][mask]
        if (values != 1).any():
            raise ValueError(f"attention_mask must hold 0 (padding) and 1, got {values[values != 1][0].item()}.")
    if not compiling and mask.device.type == "cpu" and mask.all():
        return None
    return mask


def check_some_token(attention_mask: Tensor) -> None:
    """A batch to train on has more than padding; an accelerator is not waited for."""
    if attention_mask.device.type == "cpu" and not is_compiling() and not attention_mask.any():
        raise ValueError(
            "attention_mask must have a 1 where there are labels to predict, got only 0, which is padding."
        )


BOUNDARIES = ("cu_seq_lens_q", "seq_idx", "position_ids")  # what tells where packed sequences begin, the first given


def packed_bounds(
    kwargs: Mapping[str, Any], B: int, T: int, device: torch.device, mask: Tensor | None
) -> Tensor | None:  # fmt: skip
    """Boundaries of packed sequences, as collators give them; the mask hides nothing then."""
    for name in ("cu_seqlens", "cu_seq_lens"):
        if kwargs.get(name) is not None:
            raise TypeError(f"Boundaries of packed sequences must be given to a model as cu_seq_lens_q, got {name}.")
    name = next((name for name in BOUNDARIES if kwargs.get(name) is not None), None)
    bounds = None if name is None else kwargs[name]
    if name in ("seq_idx", "position_ids"):
        bounds = _first_tokens(name, bounds, B, T, mask) if T > 1 else None
    if bounds is not None and mask is not None:
        if is_compiling() or not mask.all():
            raise ValueError(
                f"attention_mask must be left out, as packed sequences have no padding, got one with {name} of "
                "several sequences."
            )
        mask = None
    check_sequence(B, T, device, mask, bounds)
    return None if bounds is None else as_int32(bounds, T)


def _first_tokens(name: str, values: Tensor, B: int, T: int, mask: Tensor | None) -> Tensor | None:
    """Boundaries of sequences, which begin where `position_ids` do not rise from one token to the next, or where
    `seq_idx` changes; None if there is only one."""
    if is_compiling():
        raise NotImplementedError(
            f"torch.compile cannot look for packed sequences in {name}; give their boundaries as cu_seq_lens_q."
        )
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor [B, T], got {type(values).__name__}.")
    if values.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {values.dtype}.")
    if values.dim() != 2 or values.shape[0] not in (1, B) or values.shape[1] != T:
        shapes = " or ".join(f"[{rows}, {T}]" for rows in sorted({1, B}))
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(values.shape)}.")
    before, after = values[:, :-1], values[:, 1:]
    if mask is not None:  # the token before is the last one that is not padding
        places = torch.where(mask, torch.arange(T, device=mask.device), -1).cummax(1).values[:, :-1]
        before = values.expand(B, T).gather(1, places.clamp(min=0))
    begins = after <= before if name == "position_ids" else after != before
    if mask is not None:
        begins = begins & mask[:, 1:] & (places >= 0)
    first = begins.nonzero()[:, 1] + 1
    if not len(first):
        return None
    if B > 1:
        raise ValueError(f"Packed sequences need a batch of 1, got {name} of several sequences in a batch of {B}.")
    return torch.cat((first.new_tensor([0]), first, first.new_tensor([T])))
