"""Recurrent cache: one state a layer, of constant size whatever the length of the text.

States are float32 whatever the dtype of the model, and stay at the same addresses from step to step outside training,
so that a compiled decode step can be replayed. Under autograd they are replaced instead, and stay differentiable.
"""

import json
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache

from .configuration_xlstm import XLSTMConfig
from .mlstm_torch import MLSTMState
from .slstm_torch import SLSTMState


class LayerState(NamedTuple):
    """State of one mixer: its cell, and the last inputs `[B, kernel - 1, channels]` of its convolution, if any."""

    cell: MLSTMState | SLSTMState
    conv: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "LayerState":
        """The state with `fn` applied to each tensor."""
        conv = None if self.conv is None else fn(self.conv)
        return LayerState(type(self.cell)(*map(fn, self.cell)), conv)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name: C n m or h c n m, and conv."""
        named = self.cell._asdict()
        return named if self.conv is None else {**named, "conv": self.conv}


def is_readable(x: Tensor) -> bool:
    """Whether autograd may read x: unlike what is left from an inference mode."""
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference()


def is_writable(x: Tensor) -> bool:
    """Whether outside autograd x may be overwritten: unlike what has a gradient, or is left from an inference mode."""
    return not x.requires_grad and is_readable(x)


def _keep_address(x: Tensor) -> None:
    """Tells `torch.compile` that x stays where it is, without which it would not replay a step that writes to x."""
    if x.is_cuda and not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)


class Record(NamedTuple):
    """What is needed to undo a forward pass: the state before it, its length, and how to redo a part of it."""

    before: LayerState | None
    tokens: int
    replay: Callable[[int], LayerState]


class XLSTMCacheLayer:
    """The state of one layer. The attributes are those that `transformers.Cache` reads from its layers."""

    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, kind: str):
        self.kind = kind
        self.state = None
        self.records: list[Record] = []
        self.record_past = False

    def __repr__(self) -> str:
        return f"XLSTMCacheLayer({self.kind})"

    @property
    def state(self) -> LayerState | None:
        return self._state

    @state.setter
    def state(self, state: LayerState | None) -> None:
        self._state = state
        self.is_empty = state is None  # of tokens: after a reset a state of zeros is kept for its address

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def batch_size(self) -> int:
        if self.state is None:
            raise AttributeError("An empty cache layer has no batch size.")
        return self.state.cell[0].shape[0]

    def get_max_length(self) -> int:
        return -1

    def update(self, state: LayerState) -> None:
        """Stores `state`: in place where nothing can differentiate through it and the shapes agree."""
        self.is_empty = False
        if self.state is not None and not torch.is_grad_enabled():
            old, new = self.state.tensors(), state.tensors()
            if all(old[name].shape == new[name].shape and is_writable(old[name]) for name in old):
                for name, tensor in old.items():
                    tensor.copy_(new[name])
                return
        self.state = state
        for tensor in state.tensors().values():
            _keep_address(tensor)

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Applies `fn` to every tensor of the state; what was recorded before cannot be undone any more."""
        if self.state is not None:
            is_empty = self.is_empty
            self.update(self.state.map(fn))
            self.is_empty = is_empty
        self.records = []

    def reset(self) -> None:
        with torch.no_grad():
            self.map(torch.zeros_like)
        self.is_empty = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda x: x[indices.to(x.device)])

    def activate_past_recording(self) -> None:
        self.record_past = True

    def record(
        self, state: LayerState | None, tokens: int, replay: Callable[[LayerState | None, int], LayerState]
    ) -> None:
        """Remembers the state before a forward pass over `tokens` tokens; `replay(before, k)` redoes its first k."""
        before = None if state is None or self.is_empty else state.map(Tensor.clone)
        self.records.append(Record(before, tokens, lambda k: replay(before, k)))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens by replay from recorded states, and forgets the records."""
        remove = -tokens_to_remove
        recorded = sum(record.tokens for record in self.records)
        if not 0 <= remove <= recorded:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, of which {recorded} are recorded "
                f"(activate_past_recording() starts recording), got {tokens_to_remove}."
            )
        while remove:
            record = self.records.pop()
            kept = max(0, record.tokens - remove)
            remove -= record.tokens - kept
            if kept:
                with torch.no_grad():
                    self.update(record.replay(kept))
            elif record.before is not None:
                self.update(record.before)
            else:
                self.reset()
        self.records = []


class XLSTMCache(Cache):
    """The recurrent state of an xLSTM, passed to models and `generate` as `past_key_values`.

    Args:
        config: Configuration of the model that the cache is for.

    The state of layer i is `cache.layers[i].state`, a `LayerState` of float32 tensors, `None` before the first token.
    """

    layers: list[XLSTMCacheLayer]  # type: ignore[assignment]

    def __init__(self, config: XLSTMConfig):
        super().__init__(layers=[XLSTMCacheLayer(kind) for kind in config.block_types])  # type: ignore[misc]
        self.input_gate = config.mlstm_input_gate
        self.is_broken = False  # whether some layers have read more tokens than others
        # A tensor, so that counting tokens does not recompile a decode step.
        self.seen_tokens = torch.zeros((), dtype=torch.int64)

    def get_state(self, layer_idx: int, batch_size: int) -> LayerState | None:
        """The state that a layer starts from. That of an empty text is of any batch size."""
        layer = self.layers[layer_idx]
        if layer.state is None or (layer.is_empty and layer.batch_size != batch_size):
            return None
        if not is_readable(layer.state.cell[0]):
            layer.state = layer.state.map(torch.clone)
        return layer.state

    def update(self, state: LayerState, layer_idx: int) -> None:  # type: ignore[override]
        """Stores the state of a layer after a forward pass, which updates all layers in turn."""
        self.layers[layer_idx].update(state)
        self.is_broken = layer_idx + 1 < len(self.layers)

    def advance(self, tokens: int, device: torch.device) -> None:
        """Counts `tokens` more positions, padding included."""
        if self.seen_tokens.device != device or not is_writable(self.seen_tokens):
            self.seen_tokens = self.seen_tokens.to(device, copy=True)
            _keep_address(self.seen_tokens)
        self.seen_tokens += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen so far, padding included."""
        return int(self.seen_tokens)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a mask over all positions."""
        return self.get_seq_length() + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether a layer (the last, by default) has a state."""
        return self.layers[-1 if layer_idx is None else layer_idx].is_initialized

    def reset(self) -> None:
        """Back to an empty text, at the same addresses."""
        super().reset()
        self.is_broken = False
        self.advance(-self.get_seq_length(), self.seen_tokens.device)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens: `crop(-k)` removes k, `crop(0)` only forgets what was recorded.

        Raises ValueError if fewer tokens were recorded; `activate_past_recording()` starts recording.
        """
        super().crop(tokens_to_remove)
        self.advance(tokens_to_remove, self.seen_tokens.device)

    @property
    def is_recording(self) -> bool:
        return self.layers[0].record_past

    def to(self, device: torch.device | str) -> "XLSTMCache":
        """Moves the states to `device`; returns the cache."""
        for layer in self.layers:
            if layer.state is not None:
                is_empty = layer.is_empty
                layer.state = layer.state.map(lambda x: x.to(device))
                layer.is_empty = is_empty
        self.seen_tokens = self.seen_tokens.to(device)
        return self

    def check(self, config: XLSTMConfig) -> None:
        """Raises ValueError unless this is the state of a model of `config`, as far as that shows."""
        kinds = [layer.kind for layer in self.layers]
        if kinds != config.block_types:
            raise ValueError(
                f"past_key_values must be of a model with blocks {config.block_types}, got blocks {kinds}."
            )
        if "mlstm" in kinds and self.input_gate != config.mlstm_input_gate:
            raise ValueError(
                f"past_key_values must be of a model with mlstm_input_gate {config.mlstm_input_gate!r}, "
                f"got {self.input_gate!r}."
            )
        self.check_whole()

    def check_whole(self) -> None:
        """Raises ValueError if some layers have read more tokens than others."""
        if self.is_broken:
            raise ValueError(
                "past_key_values must be of a text read to its end, got the states that a forward pass left when it "
                "failed half-way; reset() empties them."
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes the states as safetensors. Raises ValueError if there are none, or none of one text."""
        self.check_whole()
        tensors = {
            f"layers.{i}.{name}": tensor.detach().contiguous()
            for i, layer in enumerate(self.layers)
            if layer.state is not None and not layer.is_empty
            for name, tensor in layer.state.tensors().items()
        }
        if not tensors:
            raise ValueError("Only a cache with states can be saved, got one that has seen no tokens.")
        metadata = {
            "seen_tokens": str(self.get_seq_length()),
            "block_types": json.dumps([layer.kind for layer in self.layers]),
            "mlstm_input_gate": self.input_gate,
        }
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, config: XLSTMConfig, device: torch.device | str = "cpu") -> "XLSTMCache":
        """Reads what `save` wrote, for a model of `config`. Raises ValueError if the file is not such a cache."""
        cache = cls(config)
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} must be a safetensors file written by XLSTMCache.save: {error}.") from error
        kinds = json.loads(metadata.get("block_types", "null"))
        if kinds != config.block_types:
            raise ValueError(f"{path} must hold the state of blocks {config.block_types}, got {kinds}.")
        gate = metadata.get("mlstm_input_gate")
        if "mlstm" in kinds and gate != config.mlstm_input_gate:
            raise ValueError(f"{path} must hold the state of an {config.mlstm_input_gate!r} input gate, got {gate!r}.")
        for i, layer in enumerate(cache.layers):
            cell = MLSTMState if layer.kind == "mlstm" else SLSTMState
            missing = [f"layers.{i}.{name}" for name in cell._fields if f"layers.{i}.{name}" not in tensors]
            if missing:
                raise ValueError(f"{path} must hold every state of layer {i}, got none for {', '.join(missing)}.")
            states = cell(*(tensors[f"layers.{i}.{name}"] for name in cell._fields))
            layer.update(LayerState(states, tensors.get(f"layers.{i}.conv")))
        cache.seen_tokens = torch.tensor(int(metadata["seen_tokens"]), device=device)
        return cache
