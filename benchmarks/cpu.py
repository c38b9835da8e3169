"""Whole models on a CPU beside their peers: `python -m benchmarks.cpu [--rounds N] [--csv FILE]`.

Every peer runs every measurement once a round, in turn, so that all see the same machine; a ratio is the median over
the rounds of peer time / our time. The tests that show that our models compute the same as the peers run first, and
nothing is printed if they fail.

Models of 47 M parameters (width 512, 12 blocks, vocabulary 8192) read a prompt of 512 and predict the next token
(`prefill`; Transformers' xLSTM, whatever `logits_to_keep` says, predicts all 512), continue it by 16 tokens, one at a
time (`decode`; `bf16`: with weights in bfloat16; `compiled`: by `torch.compile`, which takes minutes before anything is
timed), continue 16 tokens by 128 in one call of `generate` (`generate`), and take AdamW steps on 4 x 512 tokens
(`train`). Models of the first paper (width 512, six blocks; the package's `vanilla` sLSTM, the one for CPUs) only
train, and so do two sLSTM blocks by themselves, without embedding and head (`train blocks`).
"""

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM


VOCAB, WIDTH, BLOCKS, PROMPT, BATCH, NEW, TEXT = 8192, 512, 12, 512, 4, 16, 128
TESTS = ["tests/test_parity.py", "tests/test_mlstm.py", "tests/test_slstm.py"]


class Peer(NamedTuple):
    """A model to time: how to make it, the name of its cache argument, and what it is compared in."""

    name: str
    group: str
    make: Callable[[], nn.Module]
    measurements: tuple[str, ...]
    cache: str = "past_key_values"


def ours() -> nn.Module:
    config = XLSTMConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_heads=4)
    return XLSTMForCausalLM(config)


def in_tree() -> nn.Module:
    from transformers.models.xlstm.configuration_xlstm import xLSTMConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMForCausalLM

    sizes = {"hidden_size": WIDTH, "embedding_dim": WIDTH, "num_hidden_layers": BLOCKS, "num_blocks": BLOCKS}
    return xLSTMForCausalLM(xLSTMConfig(vocab_size=VOCAB, num_heads=4, **sizes))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=1408, num_hidden_layers=BLOCKS, num_attention_heads=8
    )
    return transformers.LlamaForCausalLM(config)


def our_stack(blocks: int, slstm_at: tuple[int, ...]) -> nn.Module:
    block_types = ["slstm" if i in slstm_at else "mlstm" for i in range(blocks)]
    shape = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": blocks, "block_types": block_types}
    return XLSTMForCausalLM(XLSTMConfig.from_ratio("1:0", **shape))


def paper_stack(blocks: int, slstm_at: tuple[int, ...]) -> nn.Module:
    import xlstm

    mlstm = xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=4))
    slstm = xlstm.sLSTMBlockConfig(
        slstm=xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=4), feedforward=xlstm.FeedForwardConfig()
    )
    config = xlstm.xLSTMLMModelConfig(
        mlstm_block=mlstm,
        slstm_block=slstm if slstm_at else None,
        context_length=PROMPT,
        num_blocks=blocks,
        embedding_dim=WIDTH,
        slstm_at=list(slstm_at),
        vocab_size=VOCAB,
    )
    return xlstm.xLSTMLMModel(config)


ALL = ("prefill", "decode", "decode bf16", "generate bf16", "train")
COMPILED = (*ALL, "decode bf16, compiled")
PEERS = [
    Peer("modeling_xlstm", "7B style", ours, COMPILED),
    Peer("Transformers xLSTM", "7B style", in_tree, COMPILED, cache="cache_params"),
    Peer("Llama", "7B style", llama, ALL),
    Peer("modeling_xlstm", "6 mLSTM", lambda: our_stack(6, ()), ("train",)),
    Peer("xlstm package", "6 mLSTM", lambda: paper_stack(6, ()), ("train",)),
    Peer("modeling_xlstm", "4 mLSTM, 2 sLSTM", lambda: our_stack(6, (1, 4)), ("train",)),
    Peer("xlstm package", "4 mLSTM, 2 sLSTM", lambda: paper_stack(6, (1, 4)), ("train",)),
    Peer("modeling_xlstm", "2 sLSTM", lambda: our_stack(2, (0, 1)).model.layers, ("train blocks",)),
    Peer("xlstm package", "2 sLSTM", lambda: paper_stack(2, (0, 1)).xlstm_block_stack.blocks, ("train blocks",)),
]


def prefill(model: nn.Module, peer: Peer, ids: Tensor) -> Callable[[], object]:
    def run():
        return model(ids[:1], use_cache=True, logits_to_keep=1)

    return run


def decode(model: nn.Module, peer: Peer, ids: Tensor) -> Callable[[], object]:
    cache = model(ids[:1], use_cache=True)[peer.cache]

    def run():
        for i in range(NEW):
            model(ids[:1, i : i + 1], **{peer.cache: cache}, use_cache=True)

    return run


def in_bfloat16(model: Any) -> Any:
    """The model as it is loaded in bfloat16: in float32 stays what the class keeps there."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=torch.bfloat16)


def decode_bf16(model: nn.Module, peer: Peer, ids: Tensor) -> Callable[[], object]:
    return decode(in_bfloat16(model), peer, ids)


def generate_bf16(model: nn.Module, peer: Peer, ids: Tensor) -> Callable[[], object]:
    model = in_bfloat16(model)
    options = {"max_new_tokens": TEXT, "min_new_tokens": TEXT, "do_sample": False, "pad_token_id": 0}

    def run():
        return model.generate(ids[:1, :NEW], **options)

    return run


def decode_compiled(model: nn.Module, peer: Peer, ids: Tensor) -> Callable[[], object]:
    model = in_bfloat16(model)
    model.forward = torch.compile(model.forward)
    return decode(model, peer, ids)


def train(model: nn.Module, peer: Peer, ids: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    next_ids = nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].flatten()

    def run():
        if isinstance(model, transformers.PreTrainedModel):
            loss = model(ids, labels=ids, use_cache=False).loss
        else:
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), next_ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def train_blocks(blocks: nn.ModuleList, peer: Peer, ids: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(blocks.parameters(), lr=1e-4)
    inputs = torch.randn(BATCH, PROMPT, WIDTH)

    def run():
        x = inputs.requires_grad_()
        for block in blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        x.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


MEASUREMENTS = {
    "prefill": (prefill, "ms for 512 tokens", lambda s: s * 1e3),
    "decode": (decode, "ms a token", lambda s: s * 1e3 / NEW),
    "decode bf16": (decode_bf16, "ms a token", lambda s: s * 1e3 / NEW),
    "generate bf16": (generate_bf16, "ms a token", lambda s: s * 1e3 / TEXT),
    "decode bf16, compiled": (decode_compiled, "ms a token", lambda s: s * 1e3 / NEW),
    "train": (train, "tokens/s", lambda s: BATCH * PROMPT / s),
    "train blocks": (train_blocks, "tokens/s", lambda s: BATCH * PROMPT / s),
}


def time_group(peers: list[Peer], measurement: str, rounds: int) -> list[dict[str, object]]:
    """Times one measurement of all peers of a group in turn. The first peer is ours."""
    make_run, unit, scale = MEASUREMENTS[measurement]
    torch.manual_seed(0)
    ids = torch.randint(0, VOCAB, (BATCH, PROMPT))
    runs = []
    with torch.set_grad_enabled(measurement.startswith("train")):
        for peer in peers:
            model = peer.make().train(measurement.startswith("train"))
            runs.append(make_run(model, peer, ids))
            runs[-1]()
        seconds: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            for run, times in zip(runs, seconds, strict=True):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
    return [
        {
            "group": peer.group,
            "measurement": measurement,
            "model": peer.name,
            "value": scale(statistics.median(times)),
            "unit": unit,
            "ours is faster by": statistics.median(t / own for t, own in zip(times, seconds[0], strict=True)),
        }
        for peer, times in zip(peers, seconds, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="times every measurement is repeated (default: 9)")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *TESTS], stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"No speed without correct results: the tests {', '.join(TESTS)} fail.")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, float32, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, median of {args.rounds} rounds")
    print("| models | measurement | model | value | unit | ours is faster by |\n|---|---|---|---|---|---|")
    rows = []
    for group in dict.fromkeys(peer.group for peer in PEERS):
        peers = [peer for peer in PEERS if peer.group == group]
        for measurement in peers[0].measurements:
            timed = [peer for peer in peers if measurement in peer.measurements]
            for row in time_group(timed, measurement, args.rounds):
                rows.append(row)
                cells = {**row, "value": f"{row['value']:.4g}", "ours is faster by": f"{row['ours is faster by']:.2f}x"}
                print("| " + " | ".join(str(cell) for cell in cells.values()) + " |", flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
