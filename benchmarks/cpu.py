"""Whole models on a CPU beside their peers: `python -m benchmarks.cpu [--rounds N] [--csv FILE] [--tiny]`.

Every peer runs every measurement once a round, in turn, so that all see the same machine; a ratio is the median over
the rounds of peer time / our time. The tests that show that our models compute the same as the peers run first, and
nothing is printed if they fail.

Models of 47 M parameters (width 512, 12 blocks, vocabulary 8192) read a prompt of 512 and predict the next token
(`prefill`; Transformers' xLSTM, whatever `logits_to_keep` says, predicts all 512), continue it by 16 tokens, one at a
time (`decode`; `bf16`: with weights in bfloat16; `compiled`: by `torch.compile`, which takes minutes before anything is
timed), continue 16 tokens by 128 in one call of `generate` (`generate`), and take AdamW steps on 4 x 512 tokens
(`train`). Models of the first paper (width 512, six blocks; the package's `vanilla` sLSTM, the one for CPUs) only
train, and so do two sLSTM blocks by themselves, without embedding and head (`train blocks`).

`--tiny` tries it with models and lengths of no meaning, untested and without what is compiled.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.command import command_line, integer, new_file, run, show
from benchmarks.ops import OURS, obstacle, write
from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM


TESTS = ("tests/test_parity.py", "tests/test_mlstm.py", "tests/test_slstm.py")
PACKAGES = ("xlstm", "mlstm_kernels")  # of peers; where the first is installed, Transformers' own xLSTM asks for both
EXAMPLES = """examples:
  python -m benchmarks cpu --tiny --rounds 1

in many minutes:
  python -m benchmarks cpu --rounds 1 --csv cpu.csv
"""


class Sizes(NamedTuple):
    """Of models, and of what they read and write, in tokens."""

    vocab: int
    width: int
    blocks: int
    prompt: int
    batch: int
    new: int
    text: int


FULL = Sizes(vocab=8192, width=512, blocks=12, prompt=512, batch=4, new=16, text=128)
TINY = Sizes(vocab=64, width=128, blocks=2, prompt=64, batch=2, new=2, text=4)


class Peer(NamedTuple):
    """A model to time: how to make it, the name of its cache argument, and what it is compared in."""

    name: str
    group: str
    make: Callable[[Sizes], Any]
    measurements: tuple[str, ...]
    cache: str = "past_key_values"


def ours(sizes: Sizes) -> nn.Module:
    shape: dict[str, Any] = {"hidden_size": sizes.width, "num_hidden_layers": sizes.blocks, "num_heads": 4}
    return XLSTMForCausalLM(XLSTMConfig(vocab_size=sizes.vocab, **shape))


def in_tree(sizes: Sizes) -> nn.Module:
    from transformers.models.xlstm.configuration_xlstm import xLSTMConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMForCausalLM

    shape: dict[str, Any] = {"hidden_size": sizes.width, "num_hidden_layers": sizes.blocks, "num_heads": 4}
    twins: dict[str, Any] = {"embedding_dim": sizes.width, "num_blocks": sizes.blocks}
    return xLSTMForCausalLM(xLSTMConfig(vocab_size=sizes.vocab, **shape, **twins))


def llama(sizes: Sizes) -> nn.Module:
    shape: dict[str, Any] = {"hidden_size": sizes.width, "num_hidden_layers": sizes.blocks, "num_attention_heads": 8}
    shape["intermediate_size"] = sizes.width * 11 // 4
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=sizes.vocab, **shape))


def our_stack(sizes: Sizes, blocks: int, slstm_at: tuple[int, ...]) -> XLSTMForCausalLM:
    block_types = ["slstm" if i in slstm_at else "mlstm" for i in range(blocks)]
    shape = {"hidden_size": sizes.width, "num_hidden_layers": blocks, "block_types": block_types}
    return XLSTMForCausalLM(XLSTMConfig.from_ratio("1:0", vocab_size=sizes.vocab, **shape))


def paper_stack(sizes: Sizes, blocks: int, slstm_at: tuple[int, ...]) -> Any:
    import xlstm

    mlstm = xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=4))
    slstm = xlstm.sLSTMBlockConfig(
        slstm=xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=4), feedforward=xlstm.FeedForwardConfig()
    )
    config = xlstm.xLSTMLMModelConfig(
        mlstm_block=mlstm,
        slstm_block=slstm if slstm_at else None,
        context_length=sizes.prompt,
        num_blocks=blocks,
        embedding_dim=sizes.width,
        slstm_at=list(slstm_at),
        vocab_size=sizes.vocab,
    )
    return xlstm.xLSTMLMModel(config)


ALL = ("prefill", "decode", "decode bf16", "generate bf16", "train")
COMPILED = (*ALL, "decode bf16, compiled")
PEERS = [
    Peer(OURS, "7B style", ours, COMPILED),
    Peer("Transformers xLSTM", "7B style", in_tree, COMPILED, cache="cache_params"),
    Peer("Llama", "7B style", llama, ALL),
    Peer(OURS, "6 mLSTM", lambda s: our_stack(s, 6, ()), ("train",)),
    Peer("xlstm package", "6 mLSTM", lambda s: paper_stack(s, 6, ()), ("train",)),
    Peer(OURS, "4 mLSTM, 2 sLSTM", lambda s: our_stack(s, 6, (1, 4)), ("train",)),
    Peer("xlstm package", "4 mLSTM, 2 sLSTM", lambda s: paper_stack(s, 6, (1, 4)), ("train",)),
    Peer(OURS, "2 sLSTM", lambda s: our_stack(s, 2, (0, 1)).model.layers, ("train blocks",)),
    Peer("xlstm package", "2 sLSTM", lambda s: paper_stack(s, 2, (0, 1)).xlstm_block_stack.blocks, ("train blocks",)),
]


def prefill(model: nn.Module, peer: Peer, ids: Tensor, sizes: Sizes) -> Callable[[], object]:
    def run():
        return model(ids[:1], use_cache=True, logits_to_keep=1)

    return run


def decode(model: nn.Module, peer: Peer, ids: Tensor, sizes: Sizes) -> Callable[[], object]:
    cache = model(ids[:1], use_cache=True)[peer.cache]

    def run():
        for i in range(sizes.new):
            model(ids[:1, i : i + 1], **{peer.cache: cache}, use_cache=True)

    return run


def in_bfloat16(model: Any) -> Any:
    """The model as it is loaded in bfloat16: in float32 stays what the class keeps there."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=torch.bfloat16)


def decode_bf16(model: nn.Module, peer: Peer, ids: Tensor, sizes: Sizes) -> Callable[[], object]:
    return decode(in_bfloat16(model), peer, ids, sizes)


def generate_bf16(model: nn.Module, peer: Peer, ids: Tensor, sizes: Sizes) -> Callable[[], object]:
    model = in_bfloat16(model)
    options = {"max_new_tokens": sizes.text, "min_new_tokens": sizes.text, "do_sample": False, "pad_token_id": 0}

    def run():
        return model.generate(ids[:1, : sizes.new], **options)

    return run


def decode_compiled(model: nn.Module, peer: Peer, ids: Tensor, sizes: Sizes) -> Callable[[], object]:
    model = in_bfloat16(model)
    model.forward = torch.compile(model.forward)
    return decode(model, peer, ids, sizes)


def train(model: nn.Module, peer: Peer, ids: Tensor, sizes: Sizes) -> Callable[[], object]:
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


def train_blocks(blocks: nn.ModuleList, peer: Peer, ids: Tensor, sizes: Sizes) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(blocks.parameters(), lr=1e-4)
    inputs = torch.randn(sizes.batch, sizes.prompt, sizes.width)

    def run():
        x = inputs.requires_grad_()
        for block in blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        x.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


MEASUREMENTS: dict[str, tuple[Callable[..., Callable[[], object]], str, Callable[[float, Sizes], float]]] = {
    "prefill": (prefill, "ms for {prompt} tokens", lambda s, sizes: s * 1e3),
    "decode": (decode, "ms a token", lambda s, sizes: s * 1e3 / sizes.new),
    "decode bf16": (decode_bf16, "ms a token", lambda s, sizes: s * 1e3 / sizes.new),
    "generate bf16": (generate_bf16, "ms a token", lambda s, sizes: s * 1e3 / sizes.text),
    "decode bf16, compiled": (decode_compiled, "ms a token", lambda s, sizes: s * 1e3 / sizes.new),
    "train": (train, "tokens/s", lambda s, sizes: sizes.batch * sizes.prompt / s),
    "train blocks": (train_blocks, "tokens/s", lambda s, sizes: sizes.batch * sizes.prompt / s),
}


def time_group(peers: list[Peer], measurement: str, sizes: Sizes, rounds: int, bar: tqdm) -> list[dict[str, Any]]:
    """Times one measurement of all peers of a group in turn. The first peer is ours."""
    make_run, unit, scale = MEASUREMENTS[measurement]
    torch.manual_seed(0)
    ids = torch.randint(0, sizes.vocab, (sizes.batch, sizes.prompt))
    runs = []
    with torch.set_grad_enabled(measurement.startswith("train")):
        for peer in peers:
            model = peer.make(sizes).train(measurement.startswith("train"))
            runs.append(make_run(model, peer, ids, sizes))
            runs[-1]()
            bar.update()
        seconds: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            for run_once, times in zip(runs, seconds, strict=True):
                start = time.perf_counter()
                run_once()
                times.append(time.perf_counter() - start)
                bar.update()
    return [
        {
            "group": peer.group,
            "measurement": measurement,
            "model": peer.name,
            "value": scale(statistics.median(times), sizes),
            "unit": unit.format(prompt=sizes.prompt),
            "ours is faster by": statistics.median(t / own for t, own in zip(times, seconds[0], strict=True)),
        }
        for peer, times in zip(peers, seconds, strict=True)
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = command_line("cpu", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--rounds", type=integer(1), default=9, metavar="N", help="times every measurement is repeated (%(default)s)")
    add("--csv", type=new_file, metavar="FILE", help="also write the table to this file")
    add("--tiny", action="store_true", help="small models and short texts, to try it")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        sys.exit(f"The peers are of the packages {' and '.join(PACKAGES)}, got no {missing[0]}: it is not installed.")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not args.tiny and (sentence := obstacle(TESTS)):
        sys.exit(f"No speed without correct results: {sentence}")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, float32, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, median of {args.rounds} rounds")
    show("| models | measurement | model | value | unit | ours is faster by |\n|---|---|---|---|---|---|")
    tables = [
        (measurement, [peer for peer in PEERS if peer.group == first.group and measurement in peer.measurements])
        for first in PEERS
        if first.name == OURS
        for measurement in first.measurements
        if not (args.tiny and measurement.endswith("compiled"))
    ]
    rows = []
    with tqdm(desc="runs", total=sum(len(peers) for _, peers in tables) * (1 + args.rounds), disable=None) as bar:
        for measurement, peers in tables:
            for row in time_group(peers, measurement, TINY if args.tiny else FULL, args.rounds, bar):
                rows.append(row)
                cells = {**row, "value": f"{row['value']:.4g}", "ours is faster by": f"{row['ours is faster by']:.2f}x"}
                show("| " + " | ".join(str(cell) for cell in cells.values()) + " |")
    if args.csv:
        write(rows, args.csv)


if __name__ == "__main__":
    run(main)
