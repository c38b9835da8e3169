"""Recurrent cache: one state a layer, of constant size whatever the length of the text.

States are float32 whatever the dtype of the model, and stay at the same addresses from step to step outside training,
so that a compiled decode step can be replayed. Under autograd they are replaced instead, and stay differentiable.
"""

import math
import operator
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .checks import state_dtype
from .configuration_xlstm import XLSTMConfig
from .custom_op import is_compiling
from .fingerprint import find_stack, model_fingerprint, state_fields, tokenizer_fingerprint
from .mlstm_torch import MLSTMState
from .slstm_torch import SLSTMState
from .state_file import read_state, write_state


class LayerState(NamedTuple):
    """State of one mixer: its cell, and the last inputs `[B, kernel - 1, channels]` of its convolution, if any.

    `in_place` says that a layer may overwrite these tensors, as those that a cache gives to it, rather than return
    others.
    """

    cell: MLSTMState | SLSTMState
    conv: Tensor | None = None
    in_place: bool = False

    @classmethod
    def of(cls, kind: str, tensors: dict[str, Tensor]) -> "LayerState":
        """The state of a block of `kind` that has these `tensors()`."""
        conv = tensors.get("conv")
        return cls(CELLS[kind](**{name: x for name, x in tensors.items() if name != "conv"}), conv)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "LayerState":
        """The state with `fn` applied to each tensor."""
        conv = None if self.conv is None else fn(self.conv)
        return LayerState(type(self.cell)(*map(fn, self.cell)), conv)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name: C n m or h c n m, and conv."""
        named = self.cell._asdict()
        return named if self.conv is None else {**named, "conv": self.conv}


LINE = 32  # numbers that memory hands out at once
CELLS = {"mlstm": MLSTMState, "slstm": SLSTMState}


def state_shapes(config: XLSTMConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """By kind of block, the shapes of a layer's states without the axis of rows, of the heads that a process has."""
    ranks = config.ranks
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    if "mlstm" in config.block_types:
        H, inner, kernel = config.num_heads, config.inner_size, config.conv_kernel_size
        K, V, local = config.qk_size // H, inner // H, H // ranks
        shapes["mlstm"] = {"C": (local, K, V), "n": (local, K), "m": (local,)}
        if config.mlstm_block == "pre_up" and kernel:
            shapes["mlstm"]["conv"] = (kernel - 1, inner // ranks)
    if "slstm" in config.block_types:
        H, kernel = config.slstm_num_heads, config.slstm_conv_kernel_size
        shapes["slstm"] = dict.fromkeys(SLSTMState._fields, (H // ranks, config.hidden_size // H))
        if kernel:
            shapes["slstm"]["conv"] = (kernel - 1, config.hidden_size // ranks)
    return shapes


def is_readable(x: Tensor) -> bool:
    """Whether autograd may read x: unlike what is left from an inference mode."""
    return is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference()


def is_writable(x: Tensor) -> bool:
    """Whether outside autograd x may be overwritten: unlike what has a gradient, is left from an inference mode, or may
    have several numbers at one address."""
    return not x.requires_grad and is_readable(x) and x.is_contiguous()


def _keep_address(x: Tensor) -> None:
    """Tells `torch.compile` that x stays where it is, without which it would not replay a step that writes to x."""
    if x.is_cuda and not is_compiling():
        torch._dynamo.mark_static_address(x)


def _in_lines(size: int) -> int:
    """So many numbers, or more, that fill lines of memory."""
    return -(-size // LINE) * LINE


class Record(NamedTuple):
    """A forward pass that can be taken back: its tokens, and `undo(cache, kept)`, which takes back all but `kept`."""

    tokens: int
    undo: Callable[["XLSTMCache", int], None]


class XLSTMCacheLayer:
    """The state of one layer. The attributes are those that `transformers.Cache` reads from its layers."""

    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, kind: str):
        self.kind = kind
        self.state = None
        self.record_past = False

    def __repr__(self) -> str:
        return f"XLSTMCacheLayer({self.kind})"

    @property
    def state(self) -> LayerState | None:
        return self._state

    @state.setter
    def state(self, state: LayerState | None) -> None:
        self._state = self.given = state
        if state is not None:
            self._state = state._replace(in_place=False)
            in_place = all(not x.requires_grad and x.is_contiguous() for x in state.tensors().values())
            self.given = state._replace(in_place=in_place)  # to the layer, by `XLSTMCache.get_state`
        self.fits: tuple | None = None  # what `XLSTMCache.check` has compared this state with
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
        """Stores `state`: in place where nothing can differentiate through it and the shapes agree. What is stored
        otherwise is the cache's from then on, to overwrite."""
        self.is_empty = False
        old = self.state
        if old is not None and not torch.is_grad_enabled():
            if state.cell[0] is old.cell[0] and state.conv is old.conv:  # which the layer has overwritten
                return
            tensors = zip(old.tensors().values(), state.tensors().values(), strict=True)
            pairs = [(x, new) for x, new in tensors if x is not new]
            if all(x.shape == new.shape and is_writable(x) for x, new in pairs):
                torch._foreach_copy_([x for x, _ in pairs], [new for _, new in pairs])
                return
        self.state = state
        for tensor in state.tensors().values():
            _keep_address(tensor)

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Applies `fn` to every tensor of the state."""
        if self.state is not None:
            is_empty = self.is_empty
            self.update(self.state.map(fn))
            self.is_empty = is_empty

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

    def deactivate_past_recording(self) -> None:
        self.record_past = False


class XLSTMCache(Cache):
    """The recurrent state of an xLSTM, passed to models and `generate` as `past_key_values`.

    Args:
        config: Configuration of the model that the cache is for.

    The state of layer i is `cache.layers[i].state`, a `LayerState` of float32 tensors, `None` before the first token.

    What was read can be kept, with `save` and `load`; continued in several ways, with `fork`; taken back, with `crop`.
    From `activate_past_recording()` on, until `deactivate_past_recording()`, each forward pass leaves what it takes to
    undo it; `crop`, `reset` and all that changes rows forget what was recorded until then, and what `fork`, `load` and
    `copy.deepcopy` return has nothing recorded yet.
    """

    layers: list[XLSTMCacheLayer]  # type: ignore[assignment]

    def __init__(self, config: XLSTMConfig):
        super().__init__(layers=[XLSTMCacheLayer(kind) for kind in config.block_types])  # type: ignore[misc]
        self.config, self.shapes = config, state_shapes(config)
        self.is_broken = False  # whether some layers have read more tokens than others
        self.records: list[Record] = []
        # A tensor, so that counting tokens does not recompile a decode step.
        self.seen_tokens = torch.zeros((), dtype=torch.int64)

    def turn(self) -> AbstractContextManager:
        """Inside, nobody else moves the states, where they live in memory that caches share: between two steps."""
        graphs = TURNS.get(self, lambda: None)()
        return nullcontext() if graphs is None else graphs.turn()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: not what was recorded, which knows the model."""
        return {**self.__dict__, "records": []}

    def get_state(self, layer_idx: int, batch_size: int) -> LayerState | None:
        """The state that a layer starts from, and may overwrite. That of an empty text is of any batch size."""
        layer = self.layers[layer_idx]
        state = layer.state
        if state is None or (layer.is_empty and layer.batch_size != batch_size):
            return None
        if not is_readable(state.cell[0]):
            layer.state = state.map(torch.clone)
        return layer.given

    def update(self, state: LayerState, layer_idx: int) -> None:  # type: ignore[override]
        """Stores the state of a layer after a forward pass."""
        self.layers[layer_idx].update(state)

    def numbers(self, batch_size: int) -> int:
        """How many numbers the states of so many rows take, where each tensor starts at a line of memory."""
        return sum(
            _in_lines(batch_size * math.prod(shape))
            for layer in self.layers
            for shape in self.shapes[layer.kind].values()
        )

    def take(self, memory: Tensor, batch_size: int) -> None:
        """Makes views of `memory` `[numbers(batch_size)]` or longer the states of the layers."""
        start = 0
        for layer in self.layers:
            tensors = {}
            for name, shape in self.shapes[layer.kind].items():
                size = batch_size * math.prod(shape)
                tensors[name] = memory[start : start + size].view(batch_size, *shape)
                start += _in_lines(size)
            layer.state = LayerState.of(layer.kind, tensors)

    def advance(self, tokens: int, device: torch.device) -> None:
        """Counts `tokens` more positions, padding included."""
        if self.seen_tokens.device != device or not is_writable(self.seen_tokens):
            self.seen_tokens = self.seen_tokens.to(device, non_blocking=True, copy=True)
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
        self.is_broken = True  # until all layers are empty
        super().reset()
        self.advance(-self.get_seq_length(), self.seen_tokens.device)
        self.records, self.is_broken = [], False

    @contextmanager
    def _changing_rows(self) -> Iterator[None]:
        """Inside, the rows of all states change; stopped half-way, they are not of one text any more."""
        was_broken, self.is_broken = self.is_broken, True
        self.records = []
        with self.turn():
            yield
        self.is_broken = was_broken

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become those of `beam_idx` `[B]`. What was recorded cannot be taken back any more."""
        self._check_rows("beam_idx", beam_idx)
        with self._changing_rows():
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows. What was recorded cannot be taken back any more."""
        _check_number("repeats", repeats)
        with self._changing_rows():
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of `indices` `[N]`, or those where it is True. What was recorded cannot be taken back any
        more."""
        self._check_rows("indices", indices, torch.bool)
        with self._changing_rows():
            super().batch_select_indices(indices)

    def _check_rows(self, name: str, rows: Tensor, *others: torch.dtype) -> None:
        """`rows` `[N]` are some of the rows of the states, in int64, int32 or another dtype."""
        dtypes = (torch.int64, torch.int32, *others)
        if not isinstance(rows, Tensor) or rows.dtype not in dtypes:
            got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"{name} must be a tensor of {' or '.join(map(str, dtypes))}, got {got}.")
        B = next((layer.batch_size for layer in self.layers if layer.state is not None), None)
        if B is None:
            return
        is_mask = rows.dtype == torch.bool
        if rows.dim() != 1 or (is_mask and len(rows) != B):
            shape = f"[{B}] as a mask" if is_mask else "[N]"
            raise ValueError(f"{name} must have shape {shape}, got {tuple(rows.shape)}.")
        if rows.device.type != "cpu":
            return
        if not len(rows) or (is_mask and not rows.any()):
            raise ValueError(f"{name} must choose a row at least, got none.")
        wrong = rows[:0] if is_mask else rows[(rows < 0) | (rows >= B)]
        if len(wrong):
            raise IndexError(f"{name} must be from 0 to {B - 1}, got {wrong[0].item()}.")

    def detach_(self) -> "XLSTMCache":
        """Ends the gradient of the states: what is read from here on does not reach what was read before. Returns the
        cache."""
        for layer in self.layers:
            layer.map(Tensor.detach)
        return self

    def deactivate_past_recording(self) -> None:
        """Ends what `activate_past_recording()` began, and forgets what was recorded."""
        for layer in self.layers:
            layer.deactivate_past_recording()
        self.records = []

    def record(self, tokens: int, undo: Callable[["XLSTMCache", int], None]) -> None:
        """Remembers a forward pass of `tokens` tokens, of which `undo(cache, kept)` takes back all but `kept`."""
        self.records.append(Record(tokens, undo))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens: `crop(-k)` removes k, `crop(0)` only forgets what was recorded.

        Raises ValueError if fewer tokens were recorded; `activate_past_recording()` starts recording.
        """
        self.check_whole()
        try:
            remove = -operator.index(tokens_to_remove)
        except TypeError:
            raise TypeError(
                f"crop takes minus the number of tokens to remove, an integer, got {tokens_to_remove!r}."
            ) from None
        recorded = sum(record.tokens for record in self.records)
        if not 0 <= remove <= recorded:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, of which {recorded} are recorded "
                f"(activate_past_recording() starts recording), got {tokens_to_remove}."
            )
        self.is_broken = True  # until all is taken back
        while remove:
            record = self.records.pop()
            kept = max(0, record.tokens - remove)
            remove -= record.tokens - kept
            with torch.no_grad():
                record.undo(self, kept)
        self.records = []
        self.advance(tokens_to_remove, self.seen_tokens.device)
        self.is_broken = False

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

    def check(
        self,
        config: XLSTMConfig,
        batch_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Raises ValueError unless this is the state of a model of `config`, as far as that shows.

        All states are of `dtype`, and of `batch_size` rows and on `device` where these are given.
        """
        shapes = self.shapes
        if config is not self.config:
            shapes, ours, theirs = state_shapes(config), state_fields(self.config), state_fields(config)
            for name in theirs:
                if ours[name] != theirs[name]:
                    raise ValueError(
                        f"past_key_values must be of a model with {name} {theirs[name]!r}, got {ours[name]!r}."
                    )
        fits = (shapes, batch_size, dtype, device)
        for i, layer in enumerate(self.layers):
            if is_compiling() or layer.fits != fits:
                self._check_layer(i, shapes[layer.kind], batch_size, dtype, device)
                if not (is_compiling() or layer.is_empty):
                    layer.fits = fits
        self.check_whole()

    def _check_layer(
        self,
        i: int,
        shapes: dict[str, tuple[int, ...]],
        batch_size: int | None,
        dtype: torch.dtype,
        device: torch.device | None,
    ) -> None:
        layer = self.layers[i]
        if layer.state is None:
            return
        tensors = layer.state.tensors()
        if tensors.keys() != shapes.keys():
            raise ValueError(
                f"past_key_values must hold {', '.join(shapes)} of layer {i}, got {', '.join(tensors)}: the states are "
                "of another model."
            )
        # the state of an empty text is of any batch size
        rows = layer.batch_size if batch_size is None or layer.is_empty else batch_size
        for name, x in tensors.items():
            shape = (rows, *shapes[name])
            if x.shape != shape or x.dtype != dtype or device not in (None, x.device):
                raise ValueError(
                    f"past_key_values must hold {name} of layer {i} as {dtype} of shape {shape} on "
                    f"{device or x.device}, got {x.dtype} of shape {tuple(x.shape)} on {x.device}."
                )

    def check_whole(self) -> None:
        """Raises ValueError if some layers have read more tokens than others."""
        if self.is_broken:
            raise ValueError(
                "past_key_values must be of a text read to its end, got the states that a forward pass left when it "
                "failed half-way; reset() empties them."
            )

    def fork(self, n: int) -> "XLSTMCache":
        """A new cache to continue the text in n ways: row b is copied to rows b * n to b * n + n - 1.

        This cache stays as it is. The copies do not record; where autograd is on, they are differentiable.

        Raises ValueError if n is not at least 1, or the states are not of one text.

        ```python
        >>> cache = model(prompt[:, :-1]).past_key_values  # which is read once
        >>> model.generate(prompt, past_key_values=cache.fork(4), num_return_sequences=4, do_sample=True)
        ```
        """
        _check_number("n", n)
        self.check_whole()
        fork = XLSTMCache(self.config)
        for layer, copy in zip(self.layers, fork.layers, strict=True):
            if layer.state is not None:
                copy.update(layer.state.map(lambda x: x.repeat_interleave(n, 0)))
                copy.is_empty = layer.is_empty
        fork.advance(self.get_seq_length(), self.seen_tokens.device)
        return fork

    def save(self, path: str | os.PathLike, model: nn.Module, tokenizer: Any = None) -> None:
        """Writes the states to a safetensors file, in full or not at all.

        Args:
            path: The file, replaced if there is one.
            model: The model that has read the text, adapters included: its fingerprint is in the file.
            tokenizer: The tokenizer that made the ids, to have its fingerprint in the file too.

        What is recorded for `crop` is not saved.

        Raises:
            ValueError: A layer has no state, the states are not of one text, not finite, or not of such a model.
            OSError: The file cannot be written.
            TypeError, ValueError: `model` has no fingerprint: see `model_fingerprint`.
        """
        stack = find_stack(model)
        self.check(stack.config, dtype=state_dtype(stack.dtype))
        states = [layer.state for layer in self.layers if layer.state is not None and not layer.is_empty]
        if len(states) < len(self.layers):
            raise ValueError("Only a cache with a state in each layer can be saved, got one that has seen no tokens.")
        tensors = {
            f"layers.{i}.{name}": x.detach().to("cpu", copy=True).contiguous()
            for i, state in enumerate(states)
            for name, x in state.tensors().items()
        }
        metadata = {
            "seen_tokens": str(self.get_seq_length()),
            "dtype": _name(stack.dtype),
            "model": model_fingerprint(model),
        }
        if tokenizer is not None:
            metadata["tokenizer"] = tokenizer_fingerprint(tokenizer)
        write_state(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module, tokenizer: Any = None) -> "XLSTMCache":
        """Reads what `save` wrote, for the same model with the same tokenizer.

        Args:
            path: The file.
            model: The model that is to read on. Its stack has to equal that which was given to `save` in each bit of
                each weight, the heads on it may differ: a state does not depend on them.
            tokenizer: The tokenizer of what is to be read on: needed if, and allowed only if, one was given to `save`.

        Returns:
            A cache with each layer's state where the layer is, in the dtype it was saved in. It does not record.

        Raises:
            ValueError: The file is of another model, of the model in another dtype, or of another tokenizer; it is
                broken or no such file; or it holds other tensors than the states of the model, or NaN or infinity.
            TypeError, ValueError: `model` has no fingerprint: see `model_fingerprint`.
        """
        stack = find_stack(model)
        shapes = state_shapes(stack.config)
        named = {
            f"layers.{i}.{name}": shape
            for i, kind in enumerate(stack.config.block_types)
            for name, shape in shapes[kind].items()
        }
        fits = partial(_check_origin, path, model, _name(stack.dtype), tokenizer)
        metadata, tensors = read_state(path, fits, named, state_dtype(stack.dtype))
        cache = cls(stack.config)
        for i, (layer, block) in enumerate(zip(cache.layers, stack.layers, strict=True)):
            device = next(block.parameters()).device
            states = {name: tensors[f"layers.{i}.{name}"].to(device) for name in shapes[layer.kind]}
            layer.update(LayerState.of(layer.kind, states))
        cache.advance(int(metadata["seen_tokens"]), device)
        return cache


# of a cache the graphs, if there still are any, in the memory of which it lives by turns
TURNS: weakref.WeakKeyDictionary[XLSTMCache, Callable[[], Any]] = weakref.WeakKeyDictionary()


def _check_number(name: str, n: int) -> None:
    if type(n) is not int or n < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {n!r}.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_origin(
    path: str | os.PathLike, model: nn.Module, dtype: str, tokenizer: Any, metadata: dict[str, str]
) -> None:
    """Raises ValueError unless the state with this metadata is of `model`, whose dtype is `dtype`, and `tokenizer`."""
    saved_dtype, saved_tokenizer = metadata.get("dtype", "none"), metadata.get("tokenizer")
    if saved_dtype != dtype:
        raise ValueError(f"{path} must be of this model in {dtype}, got a state of a model in {saved_dtype:.80}.")
    if saved_tokenizer is not None and tokenizer is None:
        raise ValueError(f"{path} must be loaded with its tokenizer, as it was saved with one, got none.")
    if saved_tokenizer is None and tokenizer is not None:
        raise ValueError(f"{path} must be loaded without a tokenizer, as it was saved without one, got one to check.")
    if saved_tokenizer is not None and saved_tokenizer != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"{path} must be of this tokenizer, got a state of a text in the ids of another.")
    if metadata.get("model") != model_fingerprint(model):
        raise ValueError(
            f"{path} must be of this very model, got a state of one with other weights, adapters or configuration."
        )
