"""Sequence parallelism of mLSTM layers: one long text split over processes, exactly, forward and backward.

```python
shard_sequence(model, group)                   # once; every process of the group has the same weights
local = split_sequence(batch, group)           # of a batch that all have in full, the slice of this one
loss = model(**local).loss                     # its part of the loss: the sum over the group is the loss
loss.backward()                                # so is the sum of gradients
```

Gradients are to be summed over the group: by `all_reduce`, or by `DistributedDataParallel`, which takes the mean, of a
loss times the number of processes. `SequenceParallelTrainer` does all of it.

An mLSTM's state after a slice is linear in the state before it: `C = f C_before + C_slice`. So each process sums up
its slice as if nothing were before, and a prefix scan over the group, of about log2(processes) messages of the size
of a state, gives each what is before it. The backward pass sends gradients the other way.

All processes of a group must run the same layers, with gradients of the same weights, in the same order: in each pass
each sends to each other. A slice has one token or more, and slices may differ in length. Packed texts are told by
`cu_seqlens` of the slice, whose first text goes on from the slice before: bounds `[0, 0, ...]` if another begins at the
first token. If a process is gone or stuck, the others raise RuntimeError, at the latest after the timeout of the group.

Dims: `B` batch `T` time, of a slice `H` heads `K` query and key dim `V` value dim `C` channels `N` packed texts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.data_loader import BatchSamplerShard  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .backends import CACHE, HAS_TRITON, OTHER_NAMES, resolve
from .checks import check_sequence, full_precision, state_dtype
from .custom_op import differentiable_once
from .distribution_xlstm import check_alike
from .fused import soft_cap
from .inputs_xlstm import BOUNDARIES, packed_bounds, padding_mask
from .layers_xlstm import CausalConv1d, MLSTMLayer, MLSTMPreUpLayer, SLSTMLayer
from .mlstm_torch import MLSTMState, hold_padding
from .modeling_xlstm import XLSTMForCausalLM, XLSTMForSequenceClassification, XLSTMForTokenClassification, XLSTMModel
from .training_xlstm import XLSTMTrainer


if HAS_TRITON:
    from .slice_triton import slice_sum, slice_sum_backward


IGNORED = -100  # of labels


class _Summary(NamedTuple):
    """What a slice does to the state before it: the state after it is `exp(log_f) * before + (C, n)`, stabilised."""

    log_f: Tensor  # [B, H] minus infinity if a text begins in the slice
    m: Tensor  # [B, H] minus infinity if nothing enters
    C: Tensor  # [B, H, K, V]
    n: Tensor  # [B, H, K]


def state_before(
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    group: ProcessGroup | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    input_gate: str = "exp",
    gate_soft_cap: float | None = None,
) -> MLSTMState:
    """The state that `mlstm_chunkwise` starts from in this process's slice of a text; differentiable.

    Args:
        k, v, igate, fgate, mask, input_gate, gate_soft_cap: Of the slice, as in `mlstm_chunkwise`.
        group: The processes that have the slices, in order; all of them when omitted.
        cu_seqlens: `[N + 1]` boundaries within the slice, the first text of which goes on from the slice before.

    Returns:
        `MLSTMState` of batch B (N with `cu_seqlens`, of which only the first is not empty).

    Raises:
        ValueError: `mask` or `cu_seqlens` do not fit.
        RuntimeError: Another process of the group is gone, or did not take part within its timeout.

    ```python
    >>> state = state_before(k, v, igate, fgate)
    >>> h, state = mlstm_chunkwise(q, k, v, igate, fgate, state)  # of the last process, that of the whole text
    ```
    """
    check_sequence(k.shape[0], k.shape[1], k.device, mask, cu_seqlens)
    igate, fgate = soft_cap(igate, gate_soft_cap), soft_cap(fgate, gate_soft_cap)
    _, k, v, igate, fgate = hold_padding(k, k, v, igate, fgate, mask)
    with full_precision(k.device):
        w, log_f, m = _weights(igate, fgate, state_dtype(k.dtype), cu_seqlens, input_gate)
        combine = partial(_combine, input_gate=input_gate)
        C, n = _WeightedSum.apply(k, v, w)
        slice_ = _Summary(log_f, m, C, n)
        nothing = _Summary(*(torch.zeros_like(x) for x in slice_))
        empty = nothing if input_gate == "sigmoid" else nothing._replace(m=torch.full_like(m, -math.inf))
        # the first text starts from an m of 0
        before = combine(nothing, _scan(slice_, empty, combine, group))
        return MLSTMState(*(_first_of(x, cu_seqlens) for x in (before.C, before.n, before.m)))


def _weights(
    igate: Tensor, fgate: Tensor, dtype: torch.dtype, cu_seqlens: Tensor | None, input_gate: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights `[B, H, T]` of the slice's tokens in the state after it, its log forget gate and its m."""
    igate, fgate = (x.mT.contiguous() for x in (igate, fgate))  # a GPU sums up fastest along the last axis
    # Both minus infinity: the state is empty, and m is 0 (`clear_closed`).
    closed = torch.isneginf(igate) & torch.isneginf(fgate)
    logi, logf = igate.double().masked_fill(closed, 0.0), F.logsigmoid(fgate.double())
    logi = F.logsigmoid(logi) if input_gate == "sigmoid" else logi
    from_here = F.pad(logf.flip(-1).cumsum(-1).flip(-1), (0, 1))  # [B, H, T + 1] sums to the end
    D, log_f = logi + from_here[..., 1:], from_here[..., 0]
    begins = cu_seqlens is not None and cu_seqlens.numel() > 2
    if begins:
        start = cu_seqlens[-2].long()
        D = D.masked_fill(torch.arange(D.shape[-1], device=D.device) < start, -math.inf)
        log_f = torch.full_like(log_f, -math.inf)
    if input_gate == "sigmoid":
        m = torch.zeros_like(log_f)
    elif begins:
        m = torch.maximum(D.amax(-1), from_here.index_select(-1, start[None])[..., 0])
    else:
        m = D.amax(-1)
    m = m.to(dtype)
    return torch.exp(D - _finite(m)[..., None]).masked_fill(closed, 0.0).to(dtype), log_f.to(dtype), m


def _finite(m: Tensor) -> Tensor:
    return m.masked_fill(torch.isneginf(m), 0.0)


def _combine(first: _Summary, then: _Summary, input_gate: str) -> _Summary:
    """The summary of two adjacent slices. Associative."""
    if input_gate == "sigmoid":
        m, keep, enter = then.m, torch.exp(then.log_f), torch.ones_like(then.m)
    else:
        m = torch.maximum(then.log_f + first.m, then.m)
        keep, enter = torch.exp(then.log_f + first.m - _finite(m)), torch.exp(then.m - _finite(m))
    n = keep[..., None] * first.n + enter[..., None] * then.n
    C = keep[..., None, None] * first.C + enter[..., None, None] * then.C
    return _Summary(first.log_f + then.log_f, m, C, n)


class _WeightedSum(torch.autograd.Function):
    """C `[B, H, K, V]` and n `[B, H, K]` of k, v and weights `[B, H, T]`, in the dtype of the weights."""

    @staticmethod
    def forward(ctx, k, v, w):
        ctx.save_for_backward(k, v, w)
        if resolve("auto", k) == "triton":
            return slice_sum(k, v, w)
        k = k * w.mT[..., None]
        return torch.einsum("bthk,bthv->bhkv", k, v.to(w.dtype)), k.sum(1)

    @staticmethod
    @differentiable_once("state_before")
    def backward(ctx, dC, dn):
        k, v, w = ctx.saved_tensors
        if resolve("auto", k) == "triton":
            return slice_sum_backward(dC, dn, k, v, w)
        with full_precision(k.device):
            d = torch.einsum("bthv,bhkv->bthk", v.to(w.dtype), dC) + dn[:, None]
            dv = torch.einsum("bthk,bhkv->bthv", k * w.mT[..., None], dC)
        return (d * w.mT[..., None]).to(k.dtype), dv.to(v.dtype), (d * k).sum(-1).mT


def inputs_before(
    x: Tensor,
    past: int,
    group: ProcessGroup | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The state that a causal convolution starts from in this process's slice of a text; differentiable.

    Args:
        x: Inputs of the slice `[B, T, C]`.
        past: How many inputs the convolution looks back.
        Others: As in `state_before`.

    Returns:
        The last real inputs before the slice `[B, past, C]` (`[N, past, C]` with `cu_seqlens`), zeros where the text
        has no more, in float32 or better.

    Raises:
        As `state_before`.
    """
    B, T, _ = x.shape
    check_sequence(B, T, x.device, mask, cu_seqlens)
    position = torch.arange(T, device=x.device)
    begins = cu_seqlens is not None and cu_seqlens.numel() > 2
    if begins:
        mask = (position >= cu_seqlens[-2])[None]
    real = position.expand(B, T) if mask is None else torch.where(mask, position, -1)
    newest = F.pad(real, (past, 0), value=-1).topk(past).values.flip(1)  # of fewer, the first are -1
    tail = x.to(state_dtype(x.dtype)).gather(1, newest.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
    tail = torch.where((newest >= 0)[..., None], tail, 0.0)
    count = tail.new_full((B,), past) if begins else (newest >= 0).sum(1).to(tail.dtype)
    before = _scan(_Tail(count, tail), _Tail(torch.zeros_like(count), torch.zeros_like(tail)), _newest, group)
    return _first_of(before.x, cu_seqlens)


class _Tail(NamedTuple):
    """The last inputs of a slice."""

    filled: Tensor  # [B] how many, up to past; all if a text begins in the slice
    x: Tensor  # [B, past, C] aligned to the right, zeros before them


def _newest(first: _Tail, then: _Tail) -> _Tail:
    """The last inputs of two adjacent slices. Associative."""
    past, channels = then.x.shape[1:]
    place = torch.arange(past, device=then.x.device) + then.filled.long()[:, None]
    x = F.pad(first.x, (0, 0, 0, past)).gather(1, place[..., None].expand(-1, -1, channels))
    return _Tail((first.filled + then.filled).clamp(max=past), x + then.x)


def _first_of(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """States of all packed texts, x `[1, ...]` being that of the first; x itself without such."""
    others = 0 if cu_seqlens is None else cu_seqlens.numel() - 2
    return torch.cat((x, x.new_zeros(others, *x.shape[1:]))) if others else x


Slice = TypeVar("Slice", _Summary, _Tail)


def _scan(x: Slice, empty: Slice, combine: Callable[[Slice, Slice], Slice], group: ProcessGroup | None) -> Slice:
    """`combine` of the x of all processes before this one, in their order; `empty` in the first."""
    x = _shift(x, empty, 1, group)
    reach = 1  # of how many processes x is
    while reach < dist.get_world_size(group) - 1:
        x = combine(_shift(x, empty, reach, group), x)
        reach *= 2
    return x


def _shift(x: Slice, empty: Slice, distance: int, group: ProcessGroup | None) -> Slice:
    """x of the process `distance` before this one, as one message; `empty` where there is none."""
    flat = _Shift.apply(torch.cat([y.flatten() for y in x]), torch.cat([y.flatten() for y in empty]), distance, group)
    parts = flat.split([y.numel() for y in x])
    return type(x)(*(part.view_as(y) for part, y in zip(parts, x, strict=True)))


class _Shift(torch.autograd.Function):
    """One message to another process and one from another; in the backward pass their gradients, the other way."""

    @staticmethod
    def forward(ctx, x, empty, distance, group):
        ctx.distance, ctx.group = distance, group
        return _exchange(x, empty, distance, group)

    @staticmethod
    @differentiable_once("sequence parallelism")
    def backward(ctx, dy):
        return _exchange(dy.contiguous(), torch.zeros_like(dy), -ctx.distance, ctx.group), None, None, None


def _exchange(x: Tensor, missing: Tensor, distance: int, group: ProcessGroup | None) -> Tensor:
    """x of the process `distance` before this one in the group; `missing` where there is none."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    y, messages = missing.clone(), []
    if 0 <= rank + distance < size:
        messages.append(dist.P2POp(dist.isend, x, group=group, group_peer=rank + distance))
    if 0 <= rank - distance < size:
        messages.append(dist.P2POp(dist.irecv, y, group=group, group_peer=rank - distance))
    for work in dist.batch_isend_irecv(messages) if messages else ():
        work.wait()
    return y


def split_sequence(
    batch: Mapping[str, Any], group: ProcessGroup | None = None, lengths: Sequence[int] | None = None
) -> dict[str, Any]:
    """The slice of this process of a batch for `XLSTMForCausalLM`, which every process of the group has in full.

    Args:
        batch: `input_ids` or `inputs_embeds` `[B, T, ...]`, and any of `labels`, `shift_labels`, `attention_mask`, the
            boundaries of packed texts (`cu_seq_lens_q`, `seq_idx` or `position_ids`), `num_items_in_batch`, and flags.
        group: All processes when omitted.
        lengths: Of each process's slice; as equal as can be when omitted.

    Returns:
        The same of the slice. Labels are shifted before the split, so that the last token of a slice has the first of
        the next to predict; `num_items_in_batch`, by which the loss is divided, counts those of all slices; boundaries
        are `cu_seq_lens_q`.

    Raises:
        ValueError: The batch holds what cannot be split, or is another in another process, or a slice has no token that
            is not padding.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    given = {name: x for name, x in batch.items() if x is not None and name not in UNUSED}
    unknown = [name for name, x in given.items() if isinstance(x, Tensor) and name not in KNOWN]
    if unknown:
        raise ValueError(f"Tensors of a batch to split must be among {', '.join(KNOWN)}, got {', '.join(unknown)}.")
    tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if name in given), None)
    if tokens is None:
        raise ValueError(f"A batch to split must have input_ids or inputs_embeds, got {', '.join(given) or 'nothing'}.")
    check_alike(group, "batch", *(given[name] for name in sorted(given) if isinstance(given[name], Tensor)))
    B, T = tokens.shape[:2]
    if lengths is None:
        lengths = [T // size + (i < T % size) for i in range(size)]
    if len(lengths) != size or sum(lengths) != T or min(lengths) < 1:
        raise ValueError(f"Lengths must be {size} numbers of at least 1 and sum up to {T}, got {list(lengths)}.")
    ends = list(accumulate(lengths))
    start, end = ends[rank] - lengths[rank], ends[rank]

    if "labels" in given:
        given.setdefault("shift_labels", F.pad(given["labels"], (0, 1), value=IGNORED)[..., 1:])
    if "shift_labels" in given:
        given.setdefault("num_items_in_batch", (given["shift_labels"] != IGNORED).sum())
    mask = padding_mask(given.get("attention_mask"), B, T, None)
    bounds = packed_bounds(given, B, T, tokens.device, mask)
    local = {name: x for name, x in given.items() if name not in BOUNDARIES}
    local |= {name: local[name][:, start:end] for name in SPLIT if name in local}
    if bounds is not None:
        inside = [bound - start for bound in bounds.tolist() if bound > 0 and start <= bound < end]
        local["cu_seq_lens_q"] = torch.tensor([0, *inside, end - start], dtype=torch.int32, device=tokens.device)
        local.pop("attention_mask", None)
    elif mask is not None:
        empty = [i for i, part in enumerate(mask.split(list(lengths), 1)) if not part.any()]
        if empty:
            raise ValueError(f"Each slice must have a token that is not padding, got none in slice {empty[0]}.")
    return local


SPLIT = ("input_ids", "inputs_embeds", "labels", "shift_labels", "attention_mask")
KNOWN = (*SPLIT, *BOUNDARIES, "num_items_in_batch")
UNUSED = ("cu_seq_lens_k", "max_length_q", "max_length_k")  # what collators add for attention


class Sharding:
    """That a model, of these mixers, reads slices; `remove()` ends it."""

    def __init__(self, model: nn.Module, mixers: list[MLSTMLayer | MLSTMPreUpLayer], group: ProcessGroup | None):
        self.mixers, self.hooks = mixers, []
        for mixer in mixers:
            mixer._cell = partial(_cell, mixer._cell, mixer.config, mixer.head_sizes, group)  # type: ignore[method-assign]
        for module in model.modules():
            hook: Any = next((hook for kind, hook in HOOKS.items() if isinstance(module, kind)), None)
            if hook is not None:
                self.hooks.append(module.register_forward_pre_hook(partial(hook, group), with_kwargs=True))

    def remove(self) -> None:
        for mixer in self.mixers:
            del mixer._cell
        for hook in self.hooks:
            hook.remove()
        self.mixers, self.hooks = [], []


def shard_sequence(model: nn.Module, group: ProcessGroup | None = None) -> Sharding:
    """From now on, until `remove()` of what is returned, `model` reads a slice of each text in each process of a group.

    It is called with what `split_sequence` gives, without `past_key_values`: text is generated by one process.

    Args:
        model: With mLSTM layers only; PEFT and `DistributedDataParallel` may be around it. Or a block or mixer, which
            returns the state after its slice: in the last process, that of the whole text.
        group: The processes that have the slices, in order; all of them when omitted.

    Raises:
        ValueError: `model` has sLSTM layers, or classifies; or it is sharded already.
        RuntimeError: `torch.distributed` is not initialised, or this process is not of the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("torch.distributed must be initialised to split texts over processes.")
    if dist.get_rank(group) < 0:
        raise RuntimeError("Only processes of the group can shard a model over it, got one that is not of it.")
    slstm = [name for name, x in model.named_modules() if isinstance(x, SLSTMLayer)]
    if slstm:
        raise ValueError(
            "Texts can be split over processes for mLSTM layers only, as the recurrence of an sLSTM is not linear: its "
            "state after a slice cannot be had before that in front of it is known. Got sLSTM layers "
            f"{', '.join(slstm)}."
        )
    mixers = [x for x in model.modules() if isinstance(x, MLSTMLayer | MLSTMPreUpLayer)]
    if not mixers:
        raise ValueError(f"A model to be split over processes must have mLSTM layers, got a {type(model).__name__}.")
    if (ranks := mixers[0].config.ranks) > 1:
        raise ValueError(f"Texts cannot be split over processes that share heads, got a model with tp_size={ranks}.")
    if any("_cell" in vars(x) for x in mixers):
        raise ValueError("A model can be split over processes once, got one that is already.")
    if any(isinstance(x, XLSTMForSequenceClassification | XLSTMForTokenClassification) for x in model.modules()):
        raise ValueError("Only language models and stacks can be split over processes, got a classifier.")
    return Sharding(model, mixers, group)


def _cell(
    cell: Callable, config: Any, head_sizes: tuple[int, int], group: ProcessGroup | None,
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, state: MLSTMState | None, in_place: bool,
    mask: Tensor | None, cu_seqlens: Tensor | None, *others: Any,
) -> tuple[Tensor, MLSTMState]:  # fmt: skip
    """A mixer's `_cell` from the state that the slices before leave."""
    _check_no_state(state)
    K, V = head_sizes
    igate, fgate = gates.chunk(2, -1)
    options = {"input_gate": config.mlstm_input_gate, "gate_soft_cap": config.gate_soft_cap}
    heads = k.unflatten(-1, (-1, K)), v.unflatten(-1, (-1, V))
    state = state_before(*heads, igate, fgate, group, mask=mask, cu_seqlens=cu_seqlens, **options)
    return cell(q, k, v, gates, state, False, mask, cu_seqlens, *others)


def _check_no_state(state: Any) -> None:
    if state is not None:
        raise ValueError("A text that is split over processes starts from an empty state, got past_key_values.")


def _before_conv(group: ProcessGroup | None, conv: CausalConv1d, args: tuple, kwargs: dict[str, Any]) -> tuple:
    x, state = args
    _check_no_state(state)
    return (x, inputs_before(x, conv.kernel_size - 1, group, **kwargs)), kwargs


def _before_stack(group: ProcessGroup | None, stack: XLSTMModel, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Refuses what a slice cannot have, and slices that are not of one batch."""
    given = [name for name in (CACHE, *OTHER_NAMES) if kwargs.get(name) is not None]
    if given or kwargs.get("use_cache"):
        got = " and ".join(given) or "use_cache=True"
        raise ValueError(f"A text that is split over processes has no cache, and is not generated, got {got}.")
    for name in ("seq_idx", "position_ids"):
        if kwargs.get(name) is not None:
            raise ValueError(f"Packed texts must be split by split_sequence, which gives cu_seq_lens_q, got {name}.")
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if isinstance(tokens, Tensor):
        mine = torch.tensor([len(tokens), torch.is_grad_enabled(), stack.training], device=tokens.device)
        all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(all_of_them, mine, group=group)
        got = torch.stack(all_of_them).unique(dim=0).tolist()
        if len(got) > 1:
            raise ValueError(
                "Processes that share a text must have the same rows, and all be in training or evaluation, with or "
                f"without gradients, got (rows, gradients, training) {' and '.join(str(tuple(x)) for x in got)}."
            )
    return args, {**kwargs, "use_cache": False}


def _before_head(group: ProcessGroup | None, model: XLSTMForCausalLM, args: tuple, kwargs: dict[str, Any]) -> None:
    """A loss of labels that are not shifted would miss those of the first tokens of slices, without a word."""
    missing = [name for name in ("shift_labels", "num_items_in_batch") if kwargs.get(name) is None]
    if kwargs.get("labels") is not None and missing:
        raise ValueError(f"Labels must be split by split_sequence, got some without {' and '.join(missing)}.")


HOOKS: dict[type[nn.Module], Callable] = {
    CausalConv1d: _before_conv, XLSTMModel: _before_stack, XLSTMForCausalLM: _before_head
}  # fmt: skip


class SequenceParallelTrainer(XLSTMTrainer):
    """A `Trainer` that splits each text over processes: `torchrun --nproc-per-node N` with a model of mLSTM layers.

    Data, collators and arguments are those of a `Trainer`, and so are losses and weights: those of one process, or of
    so many data-parallel ones as there are groups. A batch of `per_device_train_batch_size` rows is that of a group.
    Evaluation gives losses only. `sharding.remove()` makes the model whole again.

    Args:
        sequence_parallel_size: How many processes are a group, which shares texts; all of them when omitted.

    Raises:
        ValueError: Processes, data or arguments do not fit; and as `shard_sequence` and `split_sequence`.
    """

    def __init__(self, *args: Any, sequence_parallel_size: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        world = self.args.world_size
        self.size = world if sequence_parallel_size is None else sequence_parallel_size
        if world < 2 or self.size < 1 or world % self.size:
            raise ValueError(
                f"sequence_parallel_size must divide the number of processes, of which there must be two or more, got "
                f"{self.size} of {world}."
            )
        wanted = {"average_tokens_across_devices": True, "label_smoothing_factor": 0.0}
        for name, value in wanted.items():
            if getattr(self.args, name) != value:
                raise ValueError(f"{name} must be {value} to split texts, got {getattr(self.args, name)}.")
        if self.compute_loss_func is not None:
            raise ValueError("The loss of a text that is split is that of the model, got a compute_loss_func.")
        self.group, _ = dist.new_subgroups(self.size, timeout=timedelta(seconds=self.args.ddp_timeout))
        self.sharding = shard_sequence(self.model, self.group)

    def get_total_train_batch_size(self, args: Any) -> int:
        return super().get_total_train_batch_size(args) // self.size

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        shard = getattr(loader, "batch_sampler", None)
        if not isinstance(shard, BatchSamplerShard):
            raise ValueError(
                "Data whose texts are split must have a length, and dispatch_batches must be off, got a "
                f"{type(loader).__name__} of {type(loader.dataset).__name__}."
            )
        shard.num_processes //= self.size  # those that share a text read the same batches
        shard.process_index //= self.size
        return loader

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if num_items_in_batch is None:
            raise ValueError(f"Texts that are split must come with labels, got {', '.join(inputs)}.")
        count = num_items_in_batch / self.size  # which every process of a group has counted
        return super().compute_loss(model, split_sequence(inputs, self.group), return_outputs, count, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, None, None]:
        if not prediction_loss_only:
            raise ValueError("prediction_loss_only must be True where texts are split, got False.")
        loss, _, _ = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        if loss is not None:
            dist.all_reduce(loss, group=self.group)
            loss /= self.size
        return loss, None, None
