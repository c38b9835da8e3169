"""A loop of its own with FSDP2 or tensor parallelism of Transformers, or both, which goes on from what it has saved."""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer
from transformers.distributed import DistributedConfig
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed

from modeling_xlstm import XLSTMForCausalLM


DEMO = Path("checkpoints/xlstm-demo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="the step to go on with, of those saved")
    parser.add_argument("--steps", type=int, default=4, help="the step to end before")
    parser.add_argument("--tp_size", type=int, default=1, help="processes that share heads, and read the same rows")
    args = parser.parse_args()
    if not dist.is_initialized():
        dist.init_process_group()
    readers = dist.get_world_size() // args.tp_size  # of rows of their own
    reader = dist.get_rank() // args.tp_size
    tokens = AutoTokenizer.from_pretrained(DEMO)((DEMO / "README.md").read_text(encoding="utf-8"), return_tensors="pt")
    rows = tokens.input_ids[0].split(128)[:-1]
    source = args.output_dir if args.first else DEMO
    config = DistributedConfig(fsdp_size=readers, tp_size=args.tp_size)
    model = XLSTMForCausalLM.from_pretrained(source, dtype="float32", distributed_config=config).train()
    # before the model computes anything; one weight at a time, as some may be split and others not
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    if args.first:
        load_optimizer_distributed(model, optimizer, args.output_dir / "optimizer")
    for step in range(args.first, args.steps):
        torch.manual_seed(step * readers + reader)  # of dropout, whether the loop was interrupted or not
        ids = rows[(step * readers + reader) % len(rows)][None].to(model.device)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {total.item() / dist.get_world_size()}")
    model.save_pretrained(args.output_dir)
    save_optimizer_distributed(model, optimizer, args.output_dir / "optimizer")


if __name__ == "__main__":
    main()
