"""Training: which weights decay, and texts longer than memory, whose state is carried from step to step.

`from modeling_xlstm.training_xlstm import Windows, XLSTMTrainer`; the package itself does without `Trainer`.

Dims: `B` batch `T` time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .cache_xlstm import XLSTMCache
from .fingerprint import find_stack
from .layers_xlstm import BlockDiagonalLinear, SLSTMLayer


STATE = "state.safetensors"  # in a checkpoint


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

    The text is cut into B parts of one length; what does not fill a window is left out. Items have `input_ids` and
    `shift_labels`, the tokens after them, `[T]` int64 each; `labels`, which say that there is a loss; and `window`, how
    many come before it.
    """

    def __init__(self, text: Sequence[int] | Tensor, batch_size: int, length: int):
        if batch_size < 1 or length < 1:
            raise ValueError(f"batch_size and length must be at least 1, got {batch_size} and {length}.")
        self.text = torch.as_tensor(text, dtype=torch.int64)
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
        ids = self.text[start : start + self.length]
        after = self.text[start + 1 : start + self.length + 1]
        return {"input_ids": ids, "labels": ids, "shift_labels": after, "window": window}


class XLSTMTrainer(Trainer):
    """A `Trainer` that decays the weights in `decaying`, and carries the state of each row from step to step where the
    data are `Windows`: truncated backpropagation through time.

    States start empty with each pass over the text, are detached between steps, and are kept in checkpoints, so that
    what is resumed goes on as if nothing had been. Evaluation starts each batch from an empty state.

    Raises ValueError if windows do not follow each other, or are to be trained on several devices.
    """

    cache: XLSTMCache | None = None
    windows = 0  # that the cache has read of each row

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decaying(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, Windows):
            return super()._get_train_sampler(train_dataset)
        rows, size, processes = dataset.batch_size, self.args.train_batch_size, self.args.world_size
        if rows != size or processes > 1:
            raise ValueError(
                f"Windows of {rows} rows need one device and batches of as many, got {processes} of {size}."
            )
        return SequentialSampler(dataset)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            columns += ["shift_labels", "window"]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        window = inputs.pop("window", None)
        if window is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        first, last = int(window.min()), int(window.max())
        if first == 0:
            self.cache, self.windows = XLSTMCache(find_stack(self.model).config), 0
        if first != last or first != self.windows or self.cache is None:
            raise ValueError(f"Window {self.windows} must come next in each row, got windows {first} to {last}.")
        result = super().compute_loss(model, {**inputs, "past_key_values": self.cache}, *args, **kwargs)
        self.cache.detach_()
        self.windows += 1
        return result

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.cache is not None:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            self.cache.save(folder / STATE, self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint, STATE)
        if path.is_file():
            self.cache = XLSTMCache.load(path, self.model)
            data: Any = self.train_dataset
            self.windows = self.cache.get_seq_length() // data.length
