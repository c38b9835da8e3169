"""Steps of training whole models on one GPU beside their peers: `python -m benchmarks.training [SECTION ...] [--tiny]`.

Models of 400 M parameters (width 1024, 24 blocks, vocabulary 50304) with random weights in bfloat16 take AdamW steps
(fused) on random tokens, all of which are predicted; a step is forward pass, backward pass and optimiser, the median of
5 after 3. Memory is the peak of all, weights and optimiser included. The tests of what is timed run first. Each model
has a process of its own.

- `step`: of 16,384 or 32,768 tokens in texts of three lengths; `skip_logits` asks for the loss alone. Transformers' own
  xLSTM has weights in float32 under autocast, as it does not train in bfloat16, and its native kernels.
- `compiled`: the first of these by `torch.compile`, and how long the first three steps took.
- `stack`: the same size of the first paper, without sLSTM and with three in 24 blocks.

`--tiny` tries it with models and lengths of no meaning, untested, on a CPU too.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import torch
import transformers
from tqdm import tqdm

import modeling_xlstm
from benchmarks.command import run, show
from benchmarks.generation import asked, in_tree, ours, section_parser, synchronize
from benchmarks.ops import OURS, Worker, version


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TESTS = ("tests/test_logits_triton.py", "tests/test_model_triton.py")
EXAMPLES = """examples:
  python -m benchmarks training stack --tiny

on a GPU:
  python -m benchmarks training
  python -m benchmarks training step
"""

Row = dict[str, Any]  # cells by column


class Sizes(NamedTuple):
    """Shapes of models, and batches in texts and tokens."""

    xlstm: dict[str, Any]
    llama: dict[str, Any]
    batches: tuple[tuple[int, int], ...]


FULL = Sizes(
    {"hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 4, "vocab_size": 50304},
    {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 2816},
    ((8, 2048), (2, 8192), (1, 32768)),
)
TINY = Sizes(
    {"hidden_size": 64, "num_hidden_layers": 8, "num_heads": 2, "vocab_size": 512},
    {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 128},
    ((2, 64), (1, 128)),
)


def stack(ratio: str) -> Callable[[Sizes], Any]:
    def make(sizes: Sizes) -> Any:
        shape = {name: sizes.xlstm[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
        return modeling_xlstm.XLSTMForCausalLM(modeling_xlstm.XLSTMConfig.from_ratio(ratio, **shape))

    return make


def llama(sizes: Sizes) -> Any:
    longest = max(T for _, T in sizes.batches)
    options: dict[str, Any] = {"vocab_size": sizes.xlstm["vocab_size"], "max_position_embeddings": longest}
    options |= {**sizes.llama, "attn_implementation": "sdpa"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))


class Peer(NamedTuple):
    """A model, and how its forward pass is called."""

    make: Callable[[Sizes], Any]
    options: dict[str, Any] = {}
    dtype: torch.dtype = torch.bfloat16


ALONE = f"{OURS}, skip_logits"
NATIVE, LLAMA = "Transformers xLSTM, native", "Llama"
ONLY_MLSTM, WITH_SLSTM = f"{OURS}, xLSTM[1:0]", f"{OURS}, xLSTM[7:1]"
PEERS = {
    OURS: Peer(ours),
    ALONE: Peer(ours, {"skip_logits": True}),
    NATIVE: Peer(in_tree, dtype=torch.float32),
    LLAMA: Peer(llama),
    ONLY_MLSTM: Peer(stack("1:0")),
    WITH_SLSTM: Peer(stack("7:1")),
}


def measure(name: str, sizes: Sizes, B: int, T: int, compiled: bool) -> Row:
    """A step of B texts of T tokens."""
    peer = PEERS[name]
    torch.manual_seed(0)
    torch.set_default_dtype(peer.dtype)
    with torch.device(DEVICE):
        model = peer.make(sizes).train()
        ids = torch.randint(0, model.config.vocab_size, (B, T))
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        synchronize()
        start = time.perf_counter()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=peer.dtype == torch.float32):
            loss = forward(input_ids=ids, labels=ids, **peer.options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        return time.perf_counter() - start

    first = sum(step() for _ in range(3))
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(step() for _ in range(5))
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
    return {"ms": seconds * 1e3, "tokens/s": B * T / seconds, "peak GiB": peak, "s for three": first}


class Section(NamedTuple):
    """A table: who steps on which batches, and who is compared with whom."""

    peers: tuple[str, ...]
    batches: slice
    compiled: bool = False


SECTIONS = {
    "step": Section((OURS, ALONE, LLAMA, NATIVE), slice(None)),
    "compiled": Section((OURS, ALONE, LLAMA), slice(1), compiled=True),
    "stack": Section((ONLY_MLSTM, WITH_SLSTM), slice(1)),
}
COLUMNS = {"ms": ".1f", "tokens/s": ".0f", "peak GiB": ".1f", "s for three": ".1f", "of first": ".2f"}


def table(name: str, section: Section, sizes: Sizes) -> list[str]:
    """Prints a table, and returns what is wrong with ours."""
    print(f"| model | texts | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}", flush=True)
    wrong, rates = [], dict[tuple[int, int], float]()
    runs = [(batch, peer) for batch in sizes.batches[section.batches] for peer in section.peers]
    for (B, T), peer in tqdm(runs, name, disable=None, leave=False):
        with closing(Worker()) as worker:
            row, error = worker.attempt(measure, peer, sizes, B, T, section.compiled)
        if error:
            show(f"| {peer} | {B} x {T} | {error} |")
            wrong += [f"{peer}: {error}"] if peer.startswith(OURS) else []
            continue
        row["of first"] = row["tokens/s"] / rates.setdefault((B, T), row["tokens/s"])
        cells = ["" if row[column] is None else format(row[column], kind) for column, kind in COLUMNS.items()]
        show(f"| {peer} | {B} x {T} | {' | '.join(cells)} |")
    return wrong


def build_parser() -> argparse.ArgumentParser:
    return section_parser("training", __doc__, EXAMPLES, SECTIONS)


def main(arguments: list[str] | None = None) -> None:
    args = asked(build_parser(), arguments, SECTIONS, TESTS, DEVICE)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine()
    print(device, "bfloat16", *(f"{name} {version(name)}" for name in ("torch", "triton", "transformers")), sep=", ")
    sizes, wrong = TINY if args.tiny else FULL, []
    for name in args.sections or SECTIONS:
        print(f"\n{name}\n", flush=True)
        wrong += table(name, SECTIONS[name], sizes)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    run(main)
