"""Continues a text with a model whose heads all processes share: `torchrun --nproc-per-node 2 generate.py`."""

import argparse

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import modeling_xlstm  # noqa: F401  registers xLSTM with the Auto classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="checkpoints/xlstm-demo")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=20)
    args = parser.parse_args()
    if not dist.is_initialized():
        dist.init_process_group()
    sharing = DistributedConfig(tp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32", distributed_config=sharing)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(0)  # all processes draw the same tokens
    prompt = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    text = model.generate(**prompt, max_new_tokens=args.max_new_tokens)
    if dist.get_rank() == 0:
        print(tokenizer.decode(text[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
