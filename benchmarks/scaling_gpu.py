"""Measures what `benchmarks/scaling.py` starts from, on GPUs: `python -m benchmarks.scaling_gpu`.

On one GPU: how long a block of each model, or the share of it that one of several GPUs has, takes for a token, forward
and backward pass. Started by `torchrun --nproc-per-node 4 -m benchmarks.scaling_gpu`: messages, and steps of the 7B
model under FSDP2. Times are medians of 5 after 3.
"""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.command import run
from benchmarks.ops import obstacle
from benchmarks.scaling import CHECKS, LINKS, MODELS, Run, Scheme, T
from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM
from modeling_xlstm.sequence_parallel import shard_sequence, split_sequence


TESTS = ("tests/test_logits_triton.py", "tests/test_model_triton.py")


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a step, the median of 5 after 3, and the peak of memory in bytes."""
    seconds = list[float]()
    for i in range(8):
        if i == 3:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:]), torch.cuda.max_memory_allocated()


def training_step(model: Any, n: int, split: bool, *optimizers: torch.optim.Optimizer) -> Callable[[], None]:
    """Of a text of n tokens, which all GPUs have a slice of with `split`."""
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, n), device="cuda")
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if split:
        shard_sequence(model)
        batch = split_sequence(batch)

    def step() -> None:
        model(**batch).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    return step


def measured_block(name: str, tp: int, again: bool, split: bool) -> tuple[float, float]:
    """Microseconds a token of one of `tp` GPUs' share of a block, and of all but blocks: models of 1 and 4 blocks."""
    config, seconds = MODELS[name], list[float]()
    shared: dict[str, Any] = {"hidden_size": config.hidden_size, "num_heads": config.num_heads // tp}
    shared |= {"qk_dim_factor": 0.5 / tp, "v_dim_factor": 1 / tp, "ffn_round_up_to_multiple_of": 8}
    shared["ffn_proj_factor"] = config.ffn_size / tp / config.hidden_size
    torch.set_default_dtype(torch.bfloat16)
    for count in (1, 4):
        with torch.device("cuda"):
            model = XLSTMForCausalLM(XLSTMConfig(num_hidden_layers=count, **shared)).train()
        if again:
            model.gradient_checkpointing_enable()
        seconds.append(timed(training_step(model, T, split))[0])
    torch.set_default_dtype(torch.float32)
    each = (seconds[1] - seconds[0]) / 3
    return each / T * 1e6, (seconds[0] - each) / T * 1e6


def measured_check(scheme: Scheme, once: Run) -> tuple[float, float]:
    """Seconds and peak GiB of a step under FSDP2, weights in float32 and products in bfloat16."""
    with torch.device("cuda"):
        model = XLSTMForCausalLM(MODELS["7B"]).train()
    if once.checkpointing:
        model.gradient_checkpointing_enable()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy, reshard_after_forward=not scheme.keep)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    seconds, peak = timed(training_step(model, once.tokens * scheme.sp, scheme.sp > 1, optimizer))
    return seconds, peak / 2**30


def measure_one() -> None:
    """Prints `BLOCK`, `ENDS` and `SLICE`."""
    if sentence := obstacle(TESTS):
        sys.exit(f"No speed without correct results: {sentence}")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    print(torch.cuda.get_device_name(), torch.__version__)
    for name, tp, again, split in product(MODELS, (1, 2, 4, 8), (False, True), (False, True)):
        if not split or tp == 1:
            block, ends = measured_block(name, tp, again, split)
            print(f"{name}, {tp=}, {again=}, {split=}: {block:.3f} us a token, and {ends:.3f}", flush=True)


def measure_many(rank: int) -> None:
    """Prints `LINKS` and what is measured of `CHECKS`."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    lines = [f"{dist.get_world_size()} x {torch.cuda.get_device_name()} {torch.__version__}"]
    for size in LINKS:
        x = torch.empty(size << 19, dtype=torch.bfloat16, device=device)
        part = x.chunk(dist.get_world_size())[rank].clone()
        seconds, _ = timed(partial(dist.all_gather_into_tensor, x, part))
        lines.append(f"all-gather of {size} MiB: {seconds * 1e6:.0f} us")
    del x, part
    for what, scheme, once, *_ in CHECKS:
        gc.collect()  # the model before, which refers to itself
        seconds, peak = measured_check(scheme, once)
        lines.append(f"{what}, {once.tokens}: {seconds:.3f} s, {peak:.1f} GiB")
    if rank == 0:
        print("\n".join(lines))


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("Steps are measured on CUDA GPUs, and PyTorch finds none here.")
    rank = os.environ.get("RANK")
    measure_one() if rank is None else measure_many(int(rank))
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
