"""Trains a small model of mLSTM blocks on long texts, each split over all processes (see many_gpus.md)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, HfArgumentParser, TrainingArguments

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM
from modeling_xlstm.sequence_parallel import SequenceParallelTrainer


@dataclass
class Options:
    """What `TrainingArguments` do not say."""

    tokenizer: str = "checkpoints/xlstm-demo"
    text: str = "checkpoints/xlstm-demo/README.md"
    length: int = 4096  # tokens of a row


def main() -> None:
    parser = HfArgumentParser((Options, TrainingArguments))
    parser.set_defaults(use_cpu=not torch.accelerator.is_available(), per_device_train_batch_size=1)
    options, args = parser.parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    ids = tokenizer(Path(options.text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    texts = ids.repeat(4 * options.length // len(ids) + 1).split(options.length)[:4]
    rows = [{"input_ids": text, "labels": text} for text in texts]
    torch.manual_seed(args.seed)  # all processes start from the same weights
    config = XLSTMConfig(vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4, num_heads=4)
    trainer = SequenceParallelTrainer(XLSTMForCausalLM(config), args, train_dataset=rows)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
