"""Training: the papers' recipes, which weights decay, and texts longer than memory, whose state is carried on.

`from modeling_xlstm.training_xlstm import Windows, XLSTMTrainer, recipe`; the package itself does without `Trainer`.

Dims: `B` batch `T` time.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from .cache_xlstm import XLSTMCache
from .fingerprint import find_stack
from .layers_xlstm import BlockDiagonalLinear, SLSTMLayer
from .modeling_xlstm import XLSTMForCausalLM


STATE = "state.safetensors"  # in a checkpoint

# Of xLSTM-7B's 550,000 steps, 3,000 and 7,000: rounded down, as a share of the steps is rounded up.
WARMUP, COOLDOWN = 0.0054545, 0.0127272


def recipe(output_dir: str, paper: str = "xlstm-7b", **options: Any) -> TrainingArguments:
    """How the authors pre-trained: AdamW, weight decay, clipped gradients, and the schedule of the learning rate.

    `"xlstm"` is the first paper (https://arxiv.org/abs/2405.04517): a warm-up of 750 steps, however long the training
    is, and a cosine to a tenth of the learning rate, which the paper has smaller for larger models. `"xlstm-7b"` is
    https://arxiv.org/abs/2503.13427: of 550,000 steps, a warm-up of 3,000, an exponential decay to a tenth, and a
    linear cool-down to 0 of 7,000, kept as shares of the steps: a shorter training has a schedule of the same
    shape. It needs an `XLSTMTrainer`; a plain `Trainer` raises TypeError when it starts. Betas, decay and clipping are
    those of the authors' code, NX-AI/xlstm-jax.

    `options` are further arguments of `TrainingArguments`, or other values of these; the batch, and how long to train,
    are among them, and single `lr_scheduler_kwargs`. bfloat16 is on where there is a GPU that computes in it, unless
    `fp16` is. Raises ValueError if `paper` is another.
    """
    schedules: dict[str, dict[str, Any]] = {
        "xlstm": {
            "learning_rate": 1e-3,
            "warmup_steps": 750,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        },
        "xlstm-7b": {
            "learning_rate": 5e-4,
            "warmup_steps": WARMUP,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {
                "decay_type": "exponential",
                "min_lr_ratio": 0.1,
                "num_cooldown_steps": COOLDOWN,
            },
        },
    }
    if paper not in schedules:
        raise ValueError(f"paper must be one of {', '.join(schedules)}, got {paper!r}.")
    schedule = schedules[paper]
    defaults, given = schedule.pop("lr_scheduler_kwargs"), options.pop("lr_scheduler_kwargs", None) or {}
    theirs, asked = {**schedule, **defaults}, {**schedule, **defaults, **options, **given}
    same = all(asked.get(name) == theirs.get(name) for name in ("lr_scheduler_type", "decay_type"))
    schedule["lr_scheduler_kwargs"] = {**defaults, **given} if same else given  # another kind has none of these
    on_gpu = torch.cuda.is_available() and not (options.get("use_cpu") or options.get("fp16"))
    common = {
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(including_emulation=False),
    }
    return TrainingArguments(output_dir, **{**common, **schedule, **options})


def exponential_schedule(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    min_lr_ratio: float,
    num_cooldown_steps: float = 0,
) -> LambdaLR:
    """The learning rate rises linearly from 0, decays exponentially to `min_lr_ratio` of itself, and falls linearly to
    0 in the last `num_cooldown_steps`, a share of all steps where below 1 (https://arxiv.org/abs/2503.13427).

    Raises ValueError if no step is left for the decay, or it has no end to reach.
    """
    total, warmup = num_training_steps, num_warmup_steps
    cooldown = math.ceil(num_cooldown_steps if num_cooldown_steps >= 1 else total * num_cooldown_steps)
    decay = total - warmup - cooldown
    if cooldown < 0 or decay < 1:
        raise ValueError(
            f"Warm-up and cool-down must be at least 0 and leave a step of {total} for the decay, got {warmup} and "
            f"{cooldown} steps."
        )
    if not 0 < min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio must be above 0 and at most 1 for an exponential decay, got {min_lr_ratio}.")

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        left = total - step
        if left < cooldown:
            return min_lr_ratio * max(left, 0) / cooldown
        return min_lr_ratio ** ((step - warmup) / decay)

    return LambdaLR(optimizer, factor)


def decaying(model: nn.Module) -> list[str]:
    """Names of the weights to decay: those of linear maps, recurrent ones too. Neither embeddings, even if they are the
    output projection as well, nor norms, convolutions and biases are drawn to zero.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    maps: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Linear | BlockDiagonalLinear):
            maps.append(module.weight)
        elif isinstance(module, SLSTMLayer):
            maps += [module.gate_weight, module.recurrent_weight]
    wanted = {id(weight) for weight in maps} - embeddings
    return [name for name, weight in model.named_parameters() if id(weight) in wanted]


class Windows(Dataset):
    """Windows of one long text, in such an order that row b of each batch goes on where that of the batch before ended.

    The text is cut into B parts of one length; what does not fill a window is left out. It takes an `XLSTMTrainer` to
    carry the states on. Items have `input_ids` and `shift_labels`, the tokens after them, `[T]` int64 each; `labels`,
    which say that there is a loss; and `window`, how many come before it.
    """

    def __init__(self, text: Sequence[int] | Tensor, batch_size: int, length: int):
        if batch_size < 1 or length < 1:
            raise ValueError(f"batch_size and length must be at least 1, got {batch_size} and {length}.")
        if isinstance(text, str):
            raise TypeError("A text must be a row of token ids, got a str; a tokenizer makes them.")
        self.text = torch.as_tensor(text)
        if self.text.dim() != 1 or self.text.is_floating_point() or self.text.is_complex():
            raise ValueError(
                f"A text must be a row of token ids, got {self.text.dtype} of shape {tuple(self.text.shape)}."
            )
        self.batch_size, self.length = batch_size, length
        self.part = len(self.text) // batch_size
        self.count = (self.part - 1) // length
        if self.count < 1:
            needed = batch_size * (length + 1)
            raise ValueError(
                f"A text for {batch_size} rows of {length} must have {needed} tokens, got {len(self.text)}."
            )

    def __len__(self) -> int:
        return self.count * self.batch_size

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index}.")
        window, row = divmod(index, self.batch_size)
        start = row * self.part + window * self.length
        ids, after = (self.text[at : at + self.length].to(torch.int64) for at in (start, start + 1))
        return {"input_ids": ids, "labels": ids, "shift_labels": after, "window": window}


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint in a folder that was written to its end, the state of the `Trainer`; None without one."""
    numbered = [
        (int(number), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdigit() and _is_complete(path)
    ]
    return str(max(numbered)[1]) if numbered else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


class XLSTMTrainer(Trainer):
    """A `Trainer` that decays the weights in `decaying`, knows the schedules of `recipe`, and carries the state of each
    row from step to step where the data are `Windows`: truncated backpropagation through time.

    States start empty with each pass over the text, are detached between steps, and are kept in checkpoints, so that
    what is resumed goes on as if nothing had been; `resume_from_checkpoint=True` is from the `last_checkpoint`.
    Evaluation starts each batch from an empty state. A language model that computes its loss itself does so without all
    of its logits in memory (`skip_logits`).

    Raises ValueError if windows do not follow each other, or are to be trained on several devices or with smoothed
    labels, and if a checkpoint of such a training has no states.
    """

    cache: XLSTMCache | None = None
    windows = 0  # that the cache has read of each row

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            folder = self.args.output_dir
            resume_from_checkpoint = last_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(f"A training goes on from a checkpoint that is complete, got none in {folder}.")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decaying(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        args: Any = self.args
        options = dict(args.lr_scheduler_kwargs or {})
        is_wsd = args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY
        if self.lr_scheduler is None and is_wsd and options.pop("decay_type", None) == "exponential":
            optimizer = self.optimizer if optimizer is None else optimizer
            warmup = args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = exponential_schedule(optimizer, warmup, num_training_steps, **options)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, Windows):
            return super()._get_train_sampler(train_dataset)
        rows, size = dataset.batch_size, self.args.train_batch_size
        devices = self.args.world_size * max(1, self.args.n_gpu)
        if rows != size or devices > 1:
            raise ValueError(f"Windows of {rows} rows need one device and batches of as many, got {devices} of {size}.")
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor must be 0 to train on Windows, got {self.args.label_smoothing_factor}: it "
                "knows no labels that are shifted already."
            )
        return SequentialSampler(dataset)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            columns += ["shift_labels", "window"]

    def _needs_no_logits(self, model: nn.Module, return_outputs: bool) -> bool:
        if not model.training or return_outputs or self.label_smoother or self.compute_loss_func:
            return False
        base: Any = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return isinstance(base.get_base_model() if hasattr(base, "get_base_model") else base, XLSTMForCausalLM)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:  # fmt: skip
        window = inputs.pop("window", None)
        if "labels" in inputs and self._needs_no_logits(model, return_outputs):
            inputs = {**inputs, "skip_logits": True}
        if window is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        first, last = int(window.min()), int(window.max())
        if first == 0:
            self.cache, self.windows = XLSTMCache(find_stack(self.model).config), 0
        if first != last or first != self.windows or self.cache is None:
            raise ValueError(f"Window {self.windows} must come next in each row, got windows {first} to {last}.")
        inputs = {**inputs, "past_key_values": self.cache}
        result = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        self.cache.detach_()
        self.windows += 1
        return result

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step < self.state.max_steps:
            return super().get_batch_samples(*args, **kwargs)
        self.control.should_training_stop = True  # it was at its end when it was resumed
        return [], None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.cache is not None:  # first, as a checkpoint that seems complete is, and those before it are deleted
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            self.cache.save(folder / STATE, self.model)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if isinstance(self.train_dataset, Windows):
            path = Path(resume_from_checkpoint, STATE)
            if not path.is_file():
                raise ValueError(
                    f"A checkpoint of a training on Windows must hold {STATE}, got {path.parent} without it."
                )
            self.cache = XLSTMCache.load(path, self.model)
            self.windows = self.cache.get_seq_length() // self.train_dataset.length
