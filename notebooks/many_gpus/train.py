"""Trains an xLSTM with `Trainer` on one device or many: what starts it, and a flag, decide how (see many_gpus.md).

Started again with the same flags, it goes on from the last checkpoint that is complete.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, HfArgumentParser, TrainingArguments
from transformers.distributed import DistributedConfig

from modeling_xlstm import XLSTMForCausalLM
from modeling_xlstm.training_xlstm import XLSTMTrainer, last_checkpoint


@dataclass
class Options:
    """What `TrainingArguments` do not say."""

    model: str = "checkpoints/xlstm-demo"
    text: str = "checkpoints/xlstm-demo/README.md"
    length: int = 128  # tokens of a row
    fsdp_size: int = 1  # devices that share the weights, with FSDP2 of Transformers


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((Options, TrainingArguments))
    # processes that are not told to use a CPU, where there is nothing else, would each train alone
    parser.set_defaults(use_cpu=not torch.accelerator.is_available(), ddp_find_unused_parameters=False)
    options, args = parser.parse_args_into_dataclasses(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(Path(options.text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    rows = [{"input_ids": row, "labels": row} for row in ids.split(options.length)[:-1]]
    sharding = DistributedConfig(fsdp_size=options.fsdp_size) if options.fsdp_size > 1 else None
    model = XLSTMForCausalLM.from_pretrained(options.model, dtype="float32", distributed_config=sharding)
    trainer = XLSTMTrainer(model, args, train_dataset=rows)
    trainer.train(None if args.save_only_model else last_checkpoint(args.output_dir))
    trainer.save_model()


if __name__ == "__main__":
    main()
