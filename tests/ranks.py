"""Processes of a group on this machine, and what `test_sequence_parallel.py` has them compute, whole or in slices.

A text of 37 tokens is split in 2 to 4 slices, some of one or two tokens: fewer than a convolution looks back.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import gradients, random_ids, randomise, tiny_config, tiny_model, use_checkpointing
from torch import Tensor
from transformers import TrainingArguments

from modeling_xlstm import MLSTMState, XLSTMBlock, XLSTMForSequenceClassification, mlstm_chunkwise
from modeling_xlstm.sequence_parallel import SequenceParallelTrainer, shard_sequence, split_sequence, state_before
from modeling_xlstm.training_xlstm import XLSTMTrainer


LENGTHS = {1: [37], 2: [23, 14], 3: [2, 30, 5], 4: [1, 17, 2, 17]}
LENGTH = 37
Case = dict[str, Any]

# texts in one row: across slices, from the first token of a slice on, of a token, of none
BOUNDS = {
    "across": [0, 10, 30, 37],
    "aligned": [0, 1, 18, 23, 37],
    "short": [0, 4, 19, 19, 20, 21, 36, 37],
    "one": [0, 37],
}
CELLS: dict[str, Case] = {
    "plain": {},
    "sigmoid": {"input_gate": "sigmoid"},
    "capped": {"gate_soft_cap": 5.0},
    "extreme": {"scale": 12.0},
    "closed": {"closed": True},
    "no_eps": {"eps": 0.0},
    "padded": {"padded": True},
    "padded_sigmoid": {"padded": True, "input_gate": "sigmoid"},
    **{f"packed_{name}": {"bounds": bounds} for name, bounds in BOUNDS.items()},
    "packed_sigmoid": {"bounds": BOUNDS["across"], "input_gate": "sigmoid"},
    "packed_closed": {"bounds": BOUNDS["short"], "closed": True},
}
MODELS: dict[str, Case] = {
    **{kind: {"kind": kind} for kind in ("post_up", "sigmoid", "pre_up")},
    "post_up_padded": {"kind": "post_up", "padded": True},
    "pre_up_padded": {"kind": "pre_up", "padded": True},
    **{f"pre_up_{name}": {"kind": "pre_up", "bounds": bounds} for name, bounds in BOUNDS.items()},
    "post_up_positions": {"kind": "post_up", "bounds": BOUNDS["aligned"], "positions": True},
    "pre_up_checkpointed": {"kind": "pre_up", "checkpointed": True},
    "pre_up_reentrant": {"kind": "pre_up", "checkpointed": True, "use_reentrant": True},
}
DTYPES = (torch.float64, torch.float32)


def run(function: Callable, world: int, folder: Path, *args: Any, timeout: float = 60) -> list[Any]:
    """What `function(rank, *args)` returns in each of so many processes; the traceback of one that fails is raised."""
    multiprocessing.set_forkserver_preload(["ranks"])  # imported once for all, not in each process
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        mp.start_processes(_process, (function, world, folder, timeout, args), nprocs=world, start_method="forkserver")
    return [torch.load(path) if (path := folder / f"{rank}.pt").exists() else None for rank in range(world)]


def _process(rank: int, function: Callable, world: int, folder: Path, timeout: float, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    result = function(rank, *args)
    torch.save(result, folder / f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def mask_of(rows: int) -> Tensor:
    """Padding on the left of the first row, on the right of the second, and inside the third."""
    mask = torch.ones(rows, LENGTH, dtype=torch.bool)
    mask[0, :19], mask[1, 21:], mask[2, 5:22] = False, False, False
    return mask


def local_bounds(bounds: list[int] | None, lengths: list[int]) -> Tensor | None:
    """Boundaries of this process's slice."""
    if bounds is None:
        return None
    batch = {"input_ids": torch.zeros(1, LENGTH, dtype=torch.int64), "cu_seq_lens_q": torch.tensor(bounds)}
    return split_sequence(batch, lengths=lengths)["cu_seq_lens_q"] if len(lengths) > 1 else torch.tensor(bounds).int()


def cell(name: str, dtype: torch.dtype, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """h, the final state and gradients of a slice, from a loss on both."""
    case = dict(CELLS[name])
    random = torch.Generator().manual_seed(0)
    B, H, K, V = 1 if "bounds" in case else 3, 2, 4, 6
    scale, closed, padded = case.pop("scale", 1.0), case.pop("closed", False), case.pop("padded", False)
    bounds = case.pop("bounds", None)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    q, k, v, dh = normal(B, LENGTH, H, K), normal(B, LENGTH, H, K), normal(B, LENGTH, H, V), normal(B, LENGTH, H, V)
    igate, fgate = scale * normal(B, LENGTH, H), scale * (2 + normal(B, LENGTH, H))
    d_state = normal(1, H, K, V), normal(1, H, K), normal(1, H)
    if closed:
        fgate[:, [7, 20, 28]] = -torch.inf
        igate[:, 25:28] = -torch.inf
        igate[:, 20] = -torch.inf  # with its forget gate
    if padded:
        for x in (q, k, v, igate, fgate):  # may hold anything there
            x[~mask_of(B)] = torch.nan
    lengths = LENGTHS[world]
    start = sum(lengths[:rank])
    slice_ = slice(start, start + lengths[rank])
    q, k, v, igate, fgate = (x[:, slice_].to(dtype, copy=True).requires_grad_() for x in (q, k, v, igate, fgate))
    eps = case.pop("eps", 1e-6)
    case["mask"] = mask_of(B)[:, slice_] if padded else None
    case["cu_seqlens"] = local_bounds(bounds, lengths)
    state = state_before(k, v, igate, fgate, **case) if world > 1 else None
    h, state = mlstm_chunkwise(q, k, v, igate, fgate, state, chunk_size=8, eps=eps, **case)
    state = MLSTMState(*(x[-1:] if bounds else x for x in state))
    dh = dh[:, slice_]
    if padded:
        dh = dh * case["mask"][..., None, None]
    loss = (h * dh).sum()
    if rank == world - 1:
        loss = loss + sum((x * dx).sum() for x, dx in zip(state, d_state, strict=True))
    grads = torch.autograd.grad(loss, (q, k, v, igate, fgate))
    result = dict(zip(("h", "dq", "dk", "dv", "di", "df"), (h.detach(), *grads), strict=True))
    return result | ({f"final {x}": y.detach() for x, y in state._asdict().items()} if rank == world - 1 else {})


def batch_of(case: Case) -> dict[str, Tensor]:
    """Ids, labels, some of which do not count, and padding or boundaries."""
    rows = 1 if "bounds" in case else 3
    ids = random_ids(rows, LENGTH)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.2, -100)
    batch = {"input_ids": ids, "labels": labels}
    if case.get("padded"):
        batch["attention_mask"] = mask_of(rows).long()
        batch["labels"] = labels.masked_fill(~mask_of(rows), -100)
    if "bounds" in case:
        bounds = torch.tensor(case["bounds"], dtype=torch.int32)
        if case.get("positions"):
            batch["position_ids"] = torch.cat([torch.arange(int(n)) for n in bounds.diff()])[None]
        else:
            batch["cu_seq_lens_q"] = bounds
    return batch


def model(name: str, dtype: torch.dtype, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Logits and loss of a slice, and gradients, summed over slices."""
    case = MODELS[name]
    module = tiny_model(case["kind"]).to(dtype).train()
    if case.get("checkpointed"):
        use_checkpointing(module, case.get("use_reentrant", False))
    batch = batch_of(case)
    if world > 1:
        shard_sequence(module)
        batch = split_sequence(batch, lengths=LENGTHS[world])
    output = module(**batch)
    output.loss.backward()
    logits = output.logits.detach()
    result = {"logits": logits, "loss": output.loss.detach(), **gradients(module)}
    if world > 1:
        for tensor in [x for key, x in result.items() if key != "logits"]:
            dist.all_reduce(tensor)
    return result


def block(kind: str, dtype: torch.dtype, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """The state of a block after a slice."""
    torch.manual_seed(0)
    module = XLSTMBlock(tiny_config(kind)).to(dtype)
    randomise(module)
    lengths = LENGTHS[world]
    start = sum(lengths[:rank])
    x = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    sharding = shard_sequence(module) if world > 1 else None
    with torch.no_grad():
        y, state = module(x[:, start : start + lengths[rank]])
        if sharding is not None:
            sharding.remove()
            _, alone = module(x)
            assert rank < world - 1 or torch.allclose(alone.cell.C, state.cell.C, rtol=1e-4)
    last = {f"final {name}": tensor for name, tensor in state.tensors().items()} if rank == world - 1 else {}
    return {"y": y, **last}


CASES: dict[str, tuple[Callable, list[str]]] = {
    "cell": (cell, list(CELLS)),
    "model": (model, list(MODELS)),
    "block": (block, ["post_up", "pre_up"]),
}


def all_cases(rank: int, world: int) -> dict[tuple, dict[str, Tensor]]:
    """All of the above in slices, in one process of several."""
    return {
        (kind, name, dtype): function(name, dtype, rank, world)
        for kind, (function, names) in CASES.items()
        for name in names
        for dtype in DTYPES
    }


class Stream(torch.utils.data.IterableDataset):
    """Texts of which nobody knows how many there are."""

    def __iter__(self):
        return iter(TEXTS)


def refusals(rank: int, folder: Path) -> dict[str, str]:
    """What is refused, and the sentence."""

    def trainer(**options: Any) -> Any:
        return trainer_of(folder, 1, 2, options.pop("arguments", {}), **options)

    only_first = dist.new_group([0])
    batch = batch_of(MODELS["post_up"])
    sharded: Any = tiny_model("post_up")
    sharding = shard_sequence(sharded)
    local = split_sequence(batch)
    ids, x = local["input_ids"], torch.randn(3, 5, 32)
    _, state = XLSTMBlock(tiny_config("post_up"))(x)
    late = {**batch, "attention_mask": torch.ones(3, LENGTH).index_fill(1, torch.arange(19, LENGTH), 0.0)}
    attempts: dict[str, Callable] = {
        "slstm": lambda: shard_sequence(tiny_model("post_up_slstm")),
        "twice": lambda: shard_sequence(sharded),
        "none": lambda: shard_sequence(torch.nn.Linear(2, 2)),
        "classifier": lambda: shard_sequence(tiny_model("post_up", XLSTMForSequenceClassification)),
        "cache": lambda: sharded(ids, use_cache=True),
        "generate": lambda: sharded.generate(ids, max_new_tokens=2),
        "state": lambda: sharded.model.layers[0](x, state),
        "labels": lambda: sharded(ids, labels=ids),
        "positions": lambda: sharded(ids, position_ids=torch.arange(ids.shape[1])[None]),
        "rows": lambda: sharded(ids[: rank + 1]),
        "unknown": lambda: split_sequence({**batch, "token_type_ids": batch["input_ids"]}),
        "no ids": lambda: split_sequence({"labels": batch["labels"]}),
        "lengths": lambda: split_sequence(batch, lengths=[37, 0]),
        "padding": lambda: split_sequence(late),
        "batches": lambda: split_sequence({**batch, "labels": batch["labels"] + rank}),
        "outside": lambda: shard_sequence(tiny_model("post_up"), only_first),
        "size": lambda: trainer(sequence_parallel_size=3),
        "smoothing": lambda: trainer(arguments={"label_smoothing_factor": 0.1}),
        "loss": lambda: trainer(compute_loss_func=print),
        "stream": lambda: trainer(train_dataset=Stream()).train(),
        "no labels": lambda: trainer(train_dataset=[{"input_ids": text["input_ids"]} for text in TEXTS]).train(),
        "predictions": lambda: trainer().predict(TEXTS),
    }  # fmt: skip
    sentences = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (ValueError, RuntimeError) as error:
            sentences[name] = str(error)
    sharding.remove()
    return sentences


def left_alone(rank: int, how: str, timeout: float) -> tuple[str, float] | None:
    """The error, and after how long, of a step that the last process leaves; None of that one."""
    module = tiny_model("pre_up").train()
    shard_sequence(module)
    batch = split_sequence(batch_of(MODELS["pre_up"]))
    module(**batch).loss.backward()
    dist.barrier()
    start, leaves = time.monotonic(), rank == dist.get_world_size() - 1
    if leaves and how == "killed":
        os._exit(0)
    if leaves and how == "stuck":
        time.sleep(2 * timeout)
        os._exit(0)
    try:
        loss = module(**batch).loss
        if leaves:
            os._exit(0)
        loss.backward()
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    raise AssertionError("A step without one of the processes must fail.")


TEXTS = [{"input_ids": x, "labels": x.masked_fill(x % 5 == 0, -100)} for x in random_ids(12, 21)]


def trainer_of(folder: Path, rows: int, world: int, arguments: dict[str, Any], **options: Any) -> Any:
    """A trainer for three steps of two batches each."""
    settings: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": rows, "per_device_eval_batch_size": rows, "report_to": [],
        "gradient_accumulation_steps": 2, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "seed": 3,
        "save_strategy": "no", "learning_rate": 1e-2, "max_grad_norm": 1.0,
        "ddp_backend": "gloo" if world > 1 else None,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **{**settings, **arguments})
    defaults = {"model": tiny_model("pre_up").double(), "train_dataset": TEXTS, "eval_dataset": TEXTS[:6]}
    kind = SequenceParallelTrainer if world > 1 else XLSTMTrainer
    return kind(args=args, **{**defaults, **options})


def train(rank: int, folder: Path, rows: int, size: int | None = None, world: int = 1) -> dict[str, Tensor]:
    """Weights after three steps, the losses on the way and of an evaluation."""
    options = {"sequence_parallel_size": size} if world > 1 else {}
    trainer = trainer_of(folder, rows, world, {}, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"losses": torch.tensor(losses), "eval loss": torch.tensor(trainer.evaluate()["eval_loss"])}
    return result | {name: x.detach() for name, x in trainer.model.named_parameters()}


def fails(rank: int) -> None:
    """In the last process only."""
    if rank == dist.get_world_size() - 1:
        raise ZeroDivisionError("this one fails")
    dist.barrier()
