"""What processes compute that share the rows of a batch, and maybe the weights; `ranks.run` starts them."""

import importlib
import io
import json
import os
import runpy
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ranks
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from models import random_ids, tiny_model, use_checkpointing
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from transformers import TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.integrations import HfDeepSpeedConfig

from modeling_xlstm import XLSTMForCausalLM
from modeling_xlstm.layers_xlstm import SLSTMLayer
from modeling_xlstm.linear import is_hooked
from modeling_xlstm.training_xlstm import XLSTMTrainer


Case = dict[str, Any]
Result = dict[str, Any]

ROOT = Path(__file__).parents[1]
EXAMPLES, DEMO = ROOT / "notebooks" / "many_gpus", ROOT / "checkpoints" / "xlstm-demo"
# of 99 tokens, but for one: the last of two processes has a row less of an embedding
MODELS: dict[str, Case] = {
    "post_up": {"kind": "post_up"},
    "pre_up_slstm": {"kind": "pre_up_slstm"},
    "checkpointed": {"kind": "pre_up_slstm", "checkpointed": True},
    "tied": {"kind": "post_up", "tie_word_embeddings": True},
    "tied_bfloat16": {"kind": "post_up", "tie_word_embeddings": True, "vocab_size": 100, "dtype": torch.bfloat16},
    "post_up_bfloat16": {"kind": "post_up", "dtype": torch.bfloat16},
    "pre_up_slstm_bfloat16": {"kind": "pre_up_slstm", "dtype": torch.bfloat16},
}
BATCHES = [random_ids(4, 21, seed) for seed in range(3)]
PROMPTS, PADDING = random_ids(2, 9), torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
TEXTS = [{"input_ids": x, "labels": x} for x in random_ids(24, 21)]


def save(folder: Path, name: str) -> None:
    """A checkpoint of a model, of numbers that bfloat16 has."""
    case = {key: x for key, x in MODELS[name].items() if key not in ("dtype", "checkpointed")}
    model: Any = tiny_model(**case)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    model.save_pretrained(folder / name)


def load(folder: Path, world: int = 1, name: str = "post_up", dtype: torch.dtype | None = None) -> Any:
    """A model in training mode, its weights shared by so many processes."""
    dtype = dtype or MODELS[name].get("dtype", torch.float32)
    config = DistributedConfig(fsdp_size=world) if world > 1 else None
    model: Any = XLSTMForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=config)
    if world == 1:
        for parameter in model.parameters():  # a product may round otherwise where a weight lies as in the file
            parameter.data = parameter.data.clone()
        for layer in [x for x in model.modules() if isinstance(x, SLSTMLayer) and dtype == torch.bfloat16]:
            layer.float()  # as FSDP2 has it
    return (use_checkpointing(model) if MODELS[name].get("checkpointed") else model).train()


def whole(x: Tensor) -> Tensor:
    """A tensor, whose parts other processes may have."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by name."""
    return {name: whole(x) for name, x in model.named_parameters()}


def adamw(model: nn.Module) -> AdamW:
    """An optimizer, before any pass of the model."""
    return AdamW(model.parameters(), lr=1e-2)


def steps(model: nn.Module, optimizer: Any, batches: list[Tensor]) -> Result:
    """Losses, gradients and last weights of a step for each batch."""
    losses, gradients = [], []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: whole(x.grad) for name, x in model.named_parameters() if x.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients, "weights": weights(model)}


def same_rows(rank: int, folder: Path, world: int, name: str) -> Result:
    """Steps on the same rows in each process, and what is saved after them, if weights are shared."""
    model = load(folder / name, world, name)
    result = steps(model, adamw(model), BATCHES)
    if world > 1:
        from transformers.distributed.checkpoint import consolidate_distributed_checkpoint

        model.save_pretrained(folder / f"{name} gathered")
        model.save_pretrained(folder / f"{name} shards", distributed_checkpoint=True)
        if rank == 0:
            consolidate_distributed_checkpoint(folder / f"{name} shards", folder / f"{name} merged")
            model.config.save_pretrained(folder / f"{name} merged")
        result["hooked"] = is_hooked(model.lm_head)
        result["reloaded"] = weights(load(folder / f"{name} shards", world, name))
    return result


def own_rows(rank: int, folder: Path, world: int, name: str) -> Result:
    """Steps in float64 on rows of each process; the losses are the means over processes."""
    model = load(folder / name, world, name, torch.float64)
    result = steps(model, adamw(model), [ids.chunk(world)[rank] for ids in BATCHES])
    if world > 1:
        for loss in result["losses"]:
            dist.all_reduce(loss)
            loss /= world
    return result


def resumed(rank: int, folder: Path, world: int, name: str) -> Result:
    """Two steps after one, and two of another model that starts from what was saved after that."""
    from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed

    model = load(folder / name, world, name)
    optimizer = adamw(model)
    steps(model, optimizer, BATCHES[:1])
    model.save_pretrained(folder / f"{name} step", distributed_checkpoint=True)
    save_optimizer_distributed(model, optimizer, str(folder / f"{name} optimizer"))
    other = load(folder / f"{name} step", world, name)
    its_optimizer = adamw(other)
    load_optimizer_distributed(other, its_optimizer, str(folder / f"{name} optimizer"))
    return {"on": steps(model, optimizer, BATCHES[1:]), "again": steps(other, its_optimizer, BATCHES[1:])}


def generated(rank: int, folder: Path, world: int, name: str) -> Tensor:
    """Tokens that continue a row of each process, or all."""
    rows = slice(rank, rank + 1) if world > 1 else slice(None)
    model = load(folder / name, world, name).eval()
    return model.generate(PROMPTS[rows], attention_mask=PADDING[rows], max_new_tokens=6, do_sample=False)


class Leave(TrainerCallback):
    """The last process is gone when a step begins, as if killed."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            os._exit(0)


def trainer_of(model: Any, folder: Path, world: int, **arguments: Any) -> Any:
    """A trainer for four steps of four rows."""
    settings: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 4 // world, "report_to": [], "use_cpu": True, "seed": 3,
        "disable_tqdm": True, "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-2, "max_grad_norm": 1.0,
        "ddp_backend": "gloo" if world > 1 else None, "ddp_find_unused_parameters": False,
    }  # fmt: skip
    return XLSTMTrainer(model, TrainingArguments(str(folder), **settings | arguments), train_dataset=TEXTS)


def losses(trainer: Any) -> list[float]:
    """Of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sharded_trainer(rank: int, folder: Path, world: int) -> Result:
    """A training of a model that shares its weights, what it saves, and why it saves no optimizer."""
    model = load(folder / "post_up", world, dtype=torch.float64)
    sentence = ""
    try:
        trainer_of(model, folder / "refused", world)
    except ValueError as error:
        sentence = str(error)
    trainer = trainer_of(model, folder / f"trainer of {world}", world, save_only_model=True)
    trainer.train()
    return {"losses": losses(trainer), "weights": weights(model), "refused": sentence}


def trainer(
    rank: int, folder: Path, world: int, output: Path, leaves: int | None = None, resume: bool | None = None
) -> Result:
    """A training with a whole model in each process, or the error with which it ends and after how long."""
    run = trainer_of(load(folder / "post_up", dtype=torch.float64), output, world)
    if leaves is not None:
        run.add_callback(Leave(leaves))
    start = time.monotonic()
    try:
        run.train(resume)
    except RuntimeError as error:
        return {"error": str(error), "seconds": time.monotonic() - start}
    return {"losses": losses(run), "weights": weights(run.model)}


def ddp(rank: int, folder: Path, world: int, name: str, same: bool) -> Result:
    """Steps of a `DistributedDataParallel` without settings, on the same rows or on rows of each process."""
    model = load(folder / name, 1, name, None if same else torch.float64)
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    batches = [ids if same else ids.chunk(world)[rank] for ids in BATCHES]
    result = steps(wrapped, adamw(model), batches)
    return {key: without_prefix(value) for key, value in result.items()}


def without_prefix(value: Any) -> Any:
    """Names as they are without `DistributedDataParallel`."""
    if isinstance(value, dict):
        return {name.removeprefix("module."): without_prefix(x) for name, x in value.items()}
    return [without_prefix(x) for x in value] if isinstance(value, list) else value


def loading(rank: int, folder: Path, world: int) -> dict[str, int]:
    """The most memory that loading takes, and the size of this process's part."""
    return peak_of(lambda name: load(folder / name, world))


def anonymous_memory() -> int:
    """Bytes that this process has for itself: not those of a file that is mapped."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def peak_of(loader: Callable[[str], nn.Module]) -> dict[str, int]:
    """The most memory that it takes to load the model `large`, looked at all the time, and the size of what it has."""
    loader("post_up")  # what else loading needs
    before, most, done = anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = loader("large")
    done.set()
    watcher.join()
    local = [x.to_local() if isinstance(x, DTensor) else x for x in model.parameters()]
    return {"peak": most - before, "part": sum(x.nbytes for x in local)}


def accelerated(rank: int, folder: Path, environment: dict[str, str]) -> Result:
    """Steps with FSDP2 of accelerate, which has none on a CPU: its state is told that this were no CPU."""

    with patch.dict(os.environ, environment):
        model = load(folder / "pre_up_slstm")
        optimizer = adamw(model)
        accelerator = Accelerator(cpu=True)
        alone = accelerator.distributed_type
        plugin = FullyShardedDataParallelPlugin()
        AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        model, optimizer = accelerator.prepare(model, optimizer)
    groups = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    return {"without": str(alone.value), "groups": groups, **steps(model, optimizer, BATCHES)}


def example(rank: int, folder: Path, command: list[str], settings: dict[str, str] | None = None) -> str:
    """What a script prints that a launcher starts in a folder, with its arguments."""
    os.chdir(folder)
    os.environ.update({"DS_ACCELERATOR": "cpu"} | (settings or {}))
    sys.argv = command
    with redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(command[0], run_name="__main__")
    return printed.getvalue()


def page_commands(launcher: str) -> list[str]:
    """Of the page on many devices."""
    page = (ROOT / "notebooks" / "many_gpus.md").read_text(encoding="utf-8")
    return [line for line in page.splitlines() if line.startswith(launcher)]


def run_printing(line: str, folder: Path, settings: dict[str, str] | None = None) -> list[str]:
    """What a command of the page prints in each of two processes like those of its launcher."""
    words = shlex.split(line)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    for name in ("checkpoints", "notebooks"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    processes = Path(tempfile.mkdtemp(dir=folder))
    return ranks.run(example, 2, processes, folder, words[script:], settings, timeout=300)


def run_command(line: str, folder: Path, settings: dict[str, str] | None = None) -> Path:
    """Where a command of the page has written to."""
    run_printing(line, folder, settings)
    words = shlex.split(line)
    return folder / words[words.index("--output_dir") + 1]


def assert_loads(output: Path) -> None:
    """One process loads what was saved, all of it."""
    _, info = XLSTMForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])


def tiny_source(folder: Path) -> Path:
    """A model as small as can be, with the tokenizer of the demo."""
    source = folder / "tiny"
    model: Any = tiny_model("pre_up_slstm", vocab_size=4096)
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, source)
    return source


def flags_of(source: Path, output: str, *others: str) -> list[str]:
    """Of four steps of train.py, with a checkpoint after every second."""
    settings = {
        "model": source, "text": DEMO / "README.md", "length": 32, "output_dir": output, "max_steps": 4,
        "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, "disable_tqdm": True,
    }  # fmt: skip
    return [*(f"--{name}={x}" for name, x in settings.items()), *others]


def curve(output: Path, steps: int = 4) -> list[float]:
    """Losses of the steps of train.py."""
    log = json.loads((output / f"checkpoint-{steps}" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == steps
    return losses


def interrupt(output: Path, other: Path) -> None:
    """What a training leaves that has ended after its second step."""
    shutil.copytree(output / "checkpoint-2", other / "checkpoint-2")


def assert_same_training(actual: Path, expected: Path, steps: int = 4) -> None:
    """To the bit."""
    assert curve(actual, steps) == curve(expected, steps)
    mine, other = (load_file(folder / "model.safetensors") for folder in (actual, expected))
    torch.testing.assert_close(mine, other, rtol=0, atol=0)


def zero3(rank: int, folder: Path, world: int, name: str) -> Result:
    """Steps and tokens of ZeRO-3, which has no weight whole but in use, or of one process without it."""
    batches = [ids.chunk(world)[rank] for ids in BATCHES]
    if world == 1:
        model = load(folder / name, 1, name)
        result = steps(model, adamw(model), batches)
        return {**result, "tokens": model.eval().generate(PROMPTS, attention_mask=PADDING, max_new_tokens=6)}
    os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = importlib.import_module("deepspeed")

    settings = json.loads((EXAMPLES / "deepspeed_zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # not even the small ones
    settings["optimizer"]["params"] = {"lr": 1e-2, "torch_adam": True}
    settings |= {"train_micro_batch_size_per_gpu": len(batches[0]), "gradient_accumulation_steps": 1}
    settings |= {"gradient_clipping": 0.0, "bf16": {"enabled": False}}
    kept = HfDeepSpeedConfig(settings)  # from_pretrained looks for one that is alive
    refused = said(XLSTMForCausalLM.from_pretrained, folder / "nan")
    torch.use_deterministic_algorithms(True)  # which fills memory, as behind the last part of a weight, with NaN
    odd = said(XLSTMForCausalLM.from_pretrained, folder / "odd")
    torch.use_deterministic_algorithms(False)
    model = XLSTMForCausalLM.from_pretrained(folder / name).train()
    parts = {key: (x.numel(), x.ds_tensor.numel(), x.ds_numel) for key, x in model.named_parameters()}
    engine, *_ = deepspeed.initialize(model=model, config=kept.config)
    losses = []
    for ids in batches:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total / world)
    model.eval()
    tokens = model.generate(PROMPTS, attention_mask=PADDING, max_new_tokens=6)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        whole_weights = weights(model)
    return {
        "losses": losses,
        "weights": whole_weights,
        "tokens": tokens,
        "parts": parts,
        "refused": refused,
        "odd": odd,
    }


def said(function: Callable, *args: Any, **kwargs: Any) -> str:
    """The error that a call raises."""
    try:
        function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def all_sharded(rank: int, folder: Path, world: int) -> dict[tuple[str, str], Any]:
    """Everything but `Trainer` with weights that are shared, or in one process."""
    functions: dict[str, Callable] = {"same": same_rows, "own": own_rows, "generated": generated}
    if world > 1:
        functions["resumed"] = resumed
    names = {"same": list(MODELS), "own": ["post_up", "pre_up_slstm", "tied"], "generated": ["post_up", "pre_up_slstm"]}
    names["resumed"] = ["pre_up_slstm", "tied"]
    return {
        (kind, name): function(rank, folder, world, name)
        for kind, function in functions.items()
        for name in names[kind]
    }
