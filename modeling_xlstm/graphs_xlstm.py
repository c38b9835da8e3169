"""CUDA graphs of short forward passes, which `generate` replays: a GPU is not kept waiting for launches.

A graph is captured once for a batch size and a number of tokens, and reads and writes memory at the addresses that it
was captured with. So the states of one cache at a time live in memory that the graphs of a model share: a cache moves
in when it is used, and the one that lived there moves out, as all do when something else than a graph is to use them.
Graphs are kept from one `generate` to the next as long as the model is the same, its weights at the same addresses.
Threads, and the streams they work on, take turns.

Dims: `B` batch `T` time `L` layers `D` hidden size.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
import transformers.generation.utils
from torch import Tensor, nn

from .cache_xlstm import TURNS, XLSTMCache
from .checks import state_dtype
from .fingerprint import state_fields
from .layers_xlstm import FEW_STEPS
from .linear import is_hooked, own_part


# Tokens of a pass that is worth a graph, those of all its rows together: more keep a GPU busy by themselves.
MOST = 2048
# Of one that can be taken back in part, or has logits of each token.
LONGEST = FEW_STEPS
# Of a model. Beyond that the one not used for the longest time is dropped.
KEPT = 128


class Step(NamedTuple):
    """A captured pass: what it reads, what it writes, and of a short one the inputs `[B, T, D]` of each layer."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor  # [B, T]
    mask: Tensor | None  # [B, T] bool
    last: Tensor  # [1], the last token, the logits of which alone are wanted of a long pass
    logits: Tensor  # [B, T or 1, vocab_size]
    inputs: list[Tensor] | None


class StepGraphs:
    """The graphs of one model. A call is a forward pass of few tokens without gradients."""

    def __init__(self, model: Any):
        self.model: Any = weakref.ref(model)
        self.lock = threading.RLock()
        self.device: Any = None
        self.stream: Any = None  # that of the last turn, and
        self.tenants_stream: Any = None  # of the tenant
        self.key: Any = None
        self.is_known = False
        self.tenant: Any = lambda: None  # the cache whose states the memory holds
        self.clear()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, no other thread uses graphs or memory; what other streams did to them is done."""
        with self.lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self.stream is not None and stream != self.stream:
                stream.wait_stream(self.stream)
            self.stream = stream
            yield

    def clear(self) -> None:
        """Forgets graphs and memory; the cache that lives there moves out."""
        with self.lock:
            self._move_out()
            self.steps: dict[tuple, Step] = {}
            self.redos: dict[tuple, torch.cuda.CUDAGraph] = {}
            self.memory: Any = None  # a tensor
            self.pool: Any = None  # and the stream on which graphs are captured that share it
            self.side: Any = None
            self.homes: dict[int, XLSTMCache] = {}  # by batch size: their states are views of the memory
            self.home: Any = None  # the one in use, and
            self.cells: list = []  # the states of its layers

    # who may use them

    @staticmethod
    def obstacle(model: Any) -> str | None:
        """Why no pass of this model can be captured, if none can."""
        if model.device.type != "cuda":
            return f"it is on {model.device}"
        if model.training:
            return "it is in training mode"
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            return "it is spread over devices"
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None and not quantizer.is_compileable:
            return "the kernels for its quantised weights wait for the GPU"
        device = model.device
        for name, module in model.named_modules():
            if is_hooked(module):
                return f"{name or 'it'} is hooked"
            if any(weight is not None and weight.device != device for weight in module._parameters.values()):
                return "its weights are on several devices"
        if torch.is_autocast_enabled("cuda"):
            return "autocast is on"
        return None

    def prepare(self, batch_size: int) -> None:
        """Captures a step of one token each, unless there is one. Graphs of what was another model are dropped."""
        model = self.model()
        key, is_known = _survey(model)
        with self.lock:
            self.device = model.device
        with self.turn():
            self.is_known = is_known
            if key != self.key or not self.is_known:
                self.clear()
                self.key = key
            if (batch_size, 1, False) not in self.steps:
                self._move_out()
                self._settle(batch_size)
                self._step(batch_size, 1, False)

    def vacate(self) -> None:
        """Lets the cache that lives here move out, so that others than the graphs may use it."""
        with self.turn():
            self._move_out()

    def fits(self, ids: Tensor | None, cache: XLSTMCache | None, logits_to_keep: Any) -> bool:
        """Whether a pass is short enough, and begins or continues a text.

        Prompts of a model that may change from call to call, whose graphs are not kept, are not worth one.
        """
        if ids is None or cache is None or ids.dim() != 2 or not isinstance(logits_to_keep, int):
            return False
        (B, T), long = ids.shape, ids.shape[1] > LONGEST
        return (
            T > 0
            and (T == 1 or B * _bucket(T) <= MOST)
            and not (long and (logits_to_keep != 1 or cache.is_recording))
            and len({layer.is_empty for layer in cache.layers}) == 1
            and (cache.layers[0].is_empty or cache.layers[0].batch_size == B)
            and (self.is_known or not (long or cache.layers[0].is_empty))
        )

    # passes

    def __call__(self, ids: Tensor, mask: Tensor | None, cache: XLSTMCache) -> Tensor:
        """Logits `[B, T, vocab_size]` of ids `[B, T]`, whose padding `mask` `[B, T]` tells; the cache reads on.

        Of more than `LONGEST` tokens, the logits are those of the last.
        """
        B, T = ids.shape
        with self.turn(), torch.inference_mode(False), torch.no_grad():
            self._move_in(cache, B)
            step = self._step(B, _bucket(T), mask is not None or _bucket(T) > T or 1 < T <= LONGEST)
            before = self._states(B).clone() if cache.is_recording else None
            was_empty = cache.layers[0].is_empty
            (step.ids if T == 1 else step.ids[:, :T]).copy_(ids)
            if T > LONGEST:
                step.last.fill_(T - 1)
            if step.mask is not None:
                step.mask[:, T:] = False
                step.mask[:, :T] = True if mask is None else mask
            cache.is_broken = True  # until it has counted what it reads
            step.graph.replay()
            logits = step.logits[:, :T].clone()
            for layer in cache.layers:
                layer.is_empty = False
            cache.advance(T, ids.device)
            if before is not None:
                inputs = None if T == 1 else [x.clone() for x in step.inputs]
                cache.record(T, partial(self._undo, before, was_empty, inputs, mask))
            cache.is_broken = False
        return logits

    def _step(self, B: int, T: int, masked: bool) -> Step:
        key = B, T, masked
        step = self.steps.pop(key, None) or self._capture(B, T, masked)
        self.steps[key] = step  # behind all others
        if len(self.steps) > KEPT:
            oldest = next(iter(self.steps))
            del self.steps[oldest]
            if oldest[2]:
                self.redos.pop(oldest[:2], None)
        return step

    def _capture(self, B: int, T: int, masked: bool) -> Step:
        model, home = self.model(), self.home
        ids, last = (torch.zeros(size, dtype=torch.int64, device=model.device) for size in ((B, T), 1))
        mask = torch.ones(B, T, dtype=torch.bool, device=model.device) if masked else None

        def run() -> tuple[Tensor, list[Tensor] | None]:
            inputs: list[Tensor] | None = [] if 1 < T <= LONGEST else None
            x = model.model.read(model.model.embed_tokens(ids), home, mask, inputs=inputs)
            x = x if T <= LONGEST else x[:, last]
            return model.logits(model.model.norm(x)), inputs

        graph, outputs = self._record(run)
        return Step(graph, ids, mask, last, *outputs)

    def _record(self, run) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of `run`, and what it returned. The states are those from before, whatever happens."""
        before = None if self.tenant() is None else self.memory.clone()
        if self.pool is None:
            self.pool, self.side = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.memory.device)
        stream, graph = self.side, torch.cuda.CUDAGraph()
        try:
            with CAPTURING:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    run()  # compiles kernels, and makes what libraries keep
                with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                    outputs = run()
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            if before is not None:
                self.memory.copy_(before)
        return graph, outputs

    # taking tokens back

    def _undo(
        self, before: Tensor, was_empty: bool, inputs: list | None, mask: Tensor | None, cache: XLSTMCache, kept: int
    ) -> None:  # fmt: skip
        with self.turn(), torch.inference_mode(False), torch.no_grad():
            B = cache.layers[0].batch_size
            self._move_in(cache, B)
            self._states(B).copy_(before)
            if kept:
                T = _bucket(inputs[0].shape[1])
                redo, step = self._redo(B, T), self._step(B, T, True)
                for static, x in zip(step.inputs, inputs, strict=True):
                    static.copy_(x)
                step.mask[:, kept:] = False
                step.mask[:, :kept] = True if mask is None else mask[:, :kept]
                redo.replay()
            for layer in cache.layers:
                layer.is_empty = was_empty and not kept
            if ACTIVE.get() is None:
                self._move_out()

    def _redo(self, B: int, T: int) -> torch.cuda.CUDAGraph:
        if (B, T) not in self.redos:
            step, blocks, home = self._step(B, T, True), self.model().model.layers, self.home

            def run():
                for i, (block, x) in enumerate(zip(blocks, step.inputs, strict=True)):
                    state = home.get_state(i, B)
                    home.update(block.mixer(block.mixer_norm(x), state, mask=step.mask)[1], i)

            self.redos[B, T], _ = self._record(run)
        return self.redos[B, T]

    # whose states they are

    def _settle(self, B: int) -> None:
        """Makes the memory that of `B` rows. Nobody may live there."""
        model = self.model()
        if B not in self.homes:
            home = XLSTMCache(model.config)
            needed = home.numbers(B)
            with torch.inference_mode(False), torch.no_grad():
                if self.memory is None or self.memory.numel() < needed:
                    self.steps, self.redos, self.homes, self.pool = {}, {}, {}, None
                    self.memory = torch.zeros(needed, dtype=state_dtype(model.dtype), device=model.device)
                home.take(self.memory, B)
                home.seen_tokens = torch.zeros((), dtype=torch.int64, device=model.device)
            self.homes[B] = home
        self.home = self.homes[B]
        self.cells = [layer.state.cell for layer in self.home.layers]

    def _states(self, B: int) -> Tensor:
        """The part of the memory that the states of `B` rows take, who live there."""
        return self.memory[: self.home.numbers(B)]

    def _is_in(self, cache: XLSTMCache) -> bool:
        # plain loops: a GPU waits for this at every step
        for layer, cell in zip(cache.layers, self.cells, strict=True):
            if layer.state is None or layer.state.cell is not cell:
                return False
        return True

    def _move_in(self, cache: XLSTMCache, B: int) -> None:
        if self.tenant() is cache and self._is_in(cache):
            self.tenants_stream = self.stream
            return
        if self.tenant() is not cache:
            self._move_out()
        states = [layer.state for layer in cache.layers]
        self._settle(B)
        is_empty = cache.layers[0].is_empty
        if is_empty:
            self.memory.zero_()
        for layer, home, state in zip(cache.layers, self.home.layers, states, strict=True):
            if not is_empty:
                home.update(state)
            layer.state = home.state
            layer.is_empty = is_empty
        self.tenant, self.tenants_stream = weakref.ref(cache), self.stream
        TURNS[cache] = weakref.ref(self)

    def _move_out(self) -> None:
        cache = self.tenant()
        self.tenant = lambda: None
        if cache is None or not self._is_in(cache):  # or it has left by itself
            return
        empty = [layer.is_empty for layer in cache.layers]
        B = self.home.layers[0].batch_size
        others = self.tenants_stream != self.stream
        if others:
            self.tenants_stream.wait_stream(self.stream)
        with torch.cuda.stream(self.tenants_stream):  # where its thread goes on
            cache.take(self._states(B).clone(), B)
        if others:
            self.stream.wait_stream(self.tenants_stream)
        for layer, is_empty in zip(cache.layers, empty, strict=True):
            layer.is_empty = is_empty


def _bucket(T: int) -> int:
    """So many tokens, padding included, are read in place of T: one of few numbers, the closer the longer a text is."""
    power = 1 << (T - 1).bit_length()
    return -(-T // (power // 8)) * (power // 8) if power > 512 else power


def _survey(model: Any) -> tuple[tuple, bool]:
    """What graphs of a model depend on, as far as that can change; and whether all modules are of PyTorch or of this
    package, and weights plain: what others do may change from call to call, with weights that are who knows where."""
    roots = ("torch.nn.", __name__.rpartition(".")[0] + ".")
    modules = list(model.modules())
    tensors = [own_part(x) for m in modules for x in (*m._parameters.values(), *m._buffers.values()) if x is not None]
    config = model.config
    fields = state_fields(config), config.output_logit_soft_cap
    key = [x.data_ptr() for x in tensors], [(m.__dict__.get("backend"), m.__dict__.get("eps")) for m in modules], fields
    is_known = all(f"{type(m).__module__}.".startswith(roots) for m in modules)
    is_known = is_known and all(type(x) in (nn.Parameter, Tensor) for x in tensors)
    return key, is_known


def _stops_late(device: torch.device, cache: Any, cache_is_returned: bool, is_assistant: bool) -> bool:
    """What `DeferredStopCheck.is_supported` of Transformers says on Apple's GPUs, also where steps are replayed.

    Whether a text has ended is then looked up while the next step runs already, and the GPU does not wait for it. That
    step is not taken back: not where the cache is returned.
    """
    if device.type == "cuda" and ACTIVE.get() is not None:
        return not (cache_is_returned or is_assistant)
    return _stops_late_elsewhere(device, cache, cache_is_returned, is_assistant)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, models make their passes themselves."""
    token = ACTIVE.set(None)
    try:
        yield
    finally:
        ACTIVE.reset(token)


# the graphs that the models of this thread replay: set inside of `generate`
ACTIVE: ContextVar[StepGraphs | None] = ContextVar("ACTIVE", default=None)
_GRAPHS: weakref.WeakKeyDictionary[nn.Module, StepGraphs] = weakref.WeakKeyDictionary()
CAPTURING = threading.RLock()  # one graph at a time, whatever the model


def graphs_of(model: nn.Module) -> StepGraphs:
    """The graphs of a model, which live as long as it does."""
    with CAPTURING:
        if model not in _GRAPHS:
            _GRAPHS[model] = StepGraphs(model)
        return _GRAPHS[model]


_check: Any = getattr(transformers.generation.utils, "DeferredStopCheck", None)  # of version 5.17 and later
if _check is not None and list(signature(_check.is_supported).parameters) == list(signature(_stops_late).parameters):
    _stops_late_elsewhere = _check.is_supported
    _check.is_supported = staticmethod(_stops_late)
