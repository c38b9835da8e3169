"""Whole models on one GPU beside their peers: `python -m benchmarks.generation [SECTION ...] [--tiny]`.

Models of the shape of xLSTM-7B (width 4096, 32 blocks, 8 heads, vocabulary 50304) and a Llama of its size, made on the
GPU with random weights in bfloat16, as each initialises itself; our states are float32, those of Transformers' own
xLSTM bfloat16. Texts are greedy and of a fixed length. The tests of what is timed run first. Each model has a process
of its own, since some peers abort theirs.

- `generate`: texts after a prompt of 16, median of 3 calls, what is compiled excluded. They are of 256 tokens, or of 32
  where a token takes long, so models are compared by the tokens after the first: a call less one of a single token. Of
  these a step of ours is what is replayed, without the choice of a token and the loop around both.
- `first`: seconds from a model to the end of the first call, of one token, and to the end of the second, of two, in a
  fresh process; with an empty folder for compiled code, and with what that process has left there.
- `prefill`: one forward pass that keeps the state and the last logits, median of 5, and the same within `generate` of
  one token. Transformers' own xLSTM, whatever `logits_to_keep` says, predicts every token.
- `long`: `generate` of one token after 1,048,576 beside its speed after 16,384; extra memory is the peak less what was
  there before.
- `position`: 128 tokens after prompts that have been read, median of 5 rounds in which the prompts take turns.
- `lookup`: `prompt_lookup_num_tokens` beside plain `generate`, for one text of 256 tokens, median of 3. The trained
  model of `checkpoints`, in float32, must write the same text. Random weights have to write a program of the prompt
  again, with another name in some lines: whatever their logits, the next token of that is chosen.

`--tiny` tries it with models and lengths of no meaning, untested, on a CPU too.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import modeling_xlstm
from benchmarks.command import command_line, run, show
from benchmarks.ops import OURS, ROOT, Worker, obstacle, version
from modeling_xlstm.graphs_xlstm import graphs_of


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TESTS = ("tests/test_graphs.py",)
EXAMPLES = """examples:
  python -m benchmarks generation position --tiny

on a GPU:
  python -m benchmarks generation
  python -m benchmarks generation generate prefill
"""
PIECE = 16384
DEMO = ROOT / "checkpoints" / "xlstm-demo"
LINES = "KING.\nMy lord, what say you to the news from France?\n\nQUEEN.\nI say, France is not our friend.\n\n"
PROGRAM = "".join(
    f"    if kind == {kind!r}:\n        value = read_{kind}(file, size)\n        check(value, low, high)\n"
    for kind in ("byte", "short", "word", "long", "float", "double", "string", "date", "time", "zone", "name", "list")
)

Row = dict[str, Any]  # cells by column


class Sizes(NamedTuple):
    """Shapes of models, and lengths in tokens: of prompts, and of what is written."""

    xlstm: dict[str, Any]
    llama: dict[str, Any]
    batches: tuple[int, ...]
    prompt: int
    new: int
    few: int
    prefills: tuple[int, ...]
    long: tuple[int, int]
    positions: tuple[int, ...]
    after: int


FULL = Sizes(
    {"hidden_size": 4096, "num_hidden_layers": 32, "num_heads": 8, "vocab_size": 50304},
    {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    (1, 8, 64), 16, 256, 32, (2048, 16384), (16384, 1 << 20), (1024, 102400, 1 << 20), 128,
)  # fmt: skip
TINY = Sizes(
    {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 512},
    {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
    (1, 2), 4, 8, 4, (16, 70), (16, 64), (8, 64), 4,
)  # fmt: skip


# models


def ours(sizes: Any) -> Any:
    return modeling_xlstm.XLSTMForCausalLM(modeling_xlstm.XLSTMConfig(**sizes.xlstm))


def in_tree(sizes: Any, **kernels: Any) -> Any:
    from transformers.models.xlstm.configuration_xlstm import xLSTMConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMForCausalLM

    shape = sizes.xlstm
    twins = {"embedding_dim": shape["hidden_size"], "num_blocks": shape["num_hidden_layers"]}
    return xLSTMForCausalLM(xLSTMConfig(**shape, **twins, **kernels))


def llama(sizes: Sizes) -> Any:
    options: dict[str, Any] = {**sizes.llama, "attn_implementation": "sdpa"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))


class Peer(NamedTuple):
    """A model, and how it generates; what is slow writes few tokens."""

    make: Callable[[Sizes], Any]
    options: dict[str, Any] = {}
    slow: bool = False
    warm_ups: int = 1
    triton: bool = False  # kernels of mlstm_kernels


KERNELS = ("xlstm", "mlstm_kernels")
EAGER = f"{OURS}, disable_compile"
NATIVE, LIMIT_CHUNK, XL_CHUNK = (f"Transformers xLSTM, {kernels}" for kernels in ("native", "limit_chunk", "xl_chunk"))
LLAMA = "Llama"
TRITON = partial(in_tree, sequence_kernel="native_sequence__triton", step_kernel="triton")
PEERS = {
    OURS: Peer(ours),
    EAGER: Peer(ours, {"disable_compile": True}, slow=True),
    NATIVE: Peer(in_tree, slow=True),
    LIMIT_CHUNK: Peer(partial(TRITON, chunkwise_kernel="chunkwise--triton_limit_chunk"), slow=True, triton=True),
    XL_CHUNK: Peer(partial(TRITON, chunkwise_kernel="chunkwise--triton_xl_chunk"), slow=True, triton=True),
    LLAMA: Peer(llama, {"cache_implementation": "static"}, warm_ups=2),  # which makes generate compile it
}


def missing(peer: Peer) -> str:
    """Why a peer cannot be measured here, empty if it can."""
    # where xlstm is installed, Transformers takes its blocks, which import mlstm_kernels whatever kernels they use
    needed = KERNELS if peer.triton else KERNELS[1:] if peer.make is in_tree and find_spec("xlstm") else ()
    if absent := [package for package in needed if find_spec(package) is None]:
        return f"which needs {' and '.join(absent)}."
    return "whose kernels need a GPU." if peer.triton and DEVICE == "cpu" else ""


def prepared(model: Any) -> Any:
    transformers.logging.set_verbosity_error()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    synchronize()
    return model.eval()


def made(name: str, sizes: Sizes) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return prepared(PEERS[name].make(sizes))
    finally:
        torch.set_default_dtype(torch.float32)


# calls and their times


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def median_seconds(call: Callable[[], Any], rounds: int = 3, warm_ups: int = 1) -> float:
    for _ in range(warm_ups):
        call()
    return statistics.median(seconds(call) for _ in range(rounds))


def random_ids(model: Any, *size: int) -> Tensor:
    return torch.randint(1, model.config.vocab_size, size, device=DEVICE)


def write(model: Any, ids: Tensor, new: int, **options: Any) -> Tensor:
    text = model.generate(ids, max_new_tokens=new, do_sample=False, **options)
    if text.shape != (len(ids), ids.shape[1] + new):
        raise ArithmeticError(f"{new} tokens after {tuple(ids.shape)} were asked for, got {tuple(text.shape)}.")
    return text


def measure_generate(name: str, sizes: Sizes) -> list[Row]:
    peer, model, rows = PEERS[name], made(name, sizes), []
    new = sizes.few if peer.slow else sizes.new
    for B in sizes.batches:
        ids = random_ids(model, B, sizes.prompt)
        whole = median_seconds(partial(write, model, ids, new, **peer.options), warm_ups=peer.warm_ups)
        first = median_seconds(partial(write, model, ids, 1, **peer.options))
        row: Row = {"batch": B, "new tokens": new, "tokens/s": B * new / whole, "ms for the first": first * 1e3}
        step = graphs_of(model).steps.get((B, 1, False)) if name == OURS else None
        alone = None if step is None else median_seconds(step.graph.replay, rounds=9)
        row |= {"tokens/s after it": B * (new - 1) / (whole - first), "tokens/s of a step": alone and B / alone}
        rows.append(row)
    return rows


def starting_times(name: str, sizes: Sizes) -> tuple[float, float]:
    """Seconds from a model to the end of the first two calls."""
    model, options = made(name, sizes), PEERS[name].options
    ids = random_ids(model, 1, sizes.prompt)
    first = seconds(partial(write, model, ids, 1, **options))
    return first, first + seconds(partial(write, model, ids, 2, **options))


def measure_first(name: str, sizes: Sizes) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        caches = {cache: os.path.join(folder, cache) for cache in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        with mock.patch.dict(os.environ, caches):
            for compiled in ("nothing", "all"):
                with closing(Worker()) as worker:
                    times, error = worker.attempt(starting_times, name, sizes)
                if error:
                    raise RuntimeError(error)
                rows.append({"compiled before": compiled, "s to the first": times[0], "s to the second": times[1]})
    return rows


@torch.no_grad()
def measure_prefill(name: str, sizes: Sizes) -> list[Row]:
    model, rows = made(name, sizes), []
    for T in sizes.prefills:
        ids = random_ids(model, 1, T)
        s = median_seconds(partial(model, ids, use_cache=True, logits_to_keep=1), rounds=5)
        first = median_seconds(partial(write, model, ids, 1, **PEERS[name].options), rounds=5, warm_ups=2)
        rows.append({"tokens": T, "ms": s * 1e3, "tokens/s": T / s, "tokens/s in generate": T / first})
    return rows


def measure_long(name: str, sizes: Sizes) -> list[Row]:
    model, options, rows = made(name, sizes), PEERS[name].options, list[Row]()
    for T, warm_ups, rounds in zip(sizes.long, (1, 0), (3, 1), strict=True):
        ids, before = random_ids(model, 1, T), 0
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        s = median_seconds(partial(write, model, ids, 1, **options), rounds, warm_ups)
        extra = (torch.cuda.max_memory_allocated() - before) / 2**30 if DEVICE == "cuda" else None
        rows.append({"tokens": T, "s": s, "tokens/s": T / s, "extra GiB": extra})
    return [row | {"of shorter": row["tokens/s"] / rows[0]["tokens/s"]} for row in rows]


@torch.no_grad()
def read(model: Any, tokens: int) -> tuple[Tensor, modeling_xlstm.XLSTMCache]:
    """Ids, and the state of all but the last."""
    ids, cache = random_ids(model, 1, tokens + 1), modeling_xlstm.XLSTMCache(model.config)
    for piece in ids[:, :-1].split(PIECE, 1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    return ids, cache


def measure_position(name: str, sizes: Sizes) -> list[Row]:
    model = made(name, sizes)
    texts = [read(model, tokens) for tokens in sizes.positions]
    times: list[list[float]] = [[] for _ in texts]
    for _ in range(6):  # the first of which warms up
        for (ids, cache), taken in zip(texts, times, strict=True):
            taken.append(seconds(partial(write, model, ids, sizes.after, past_key_values=cache.fork(1))))
    ms = [statistics.median(taken[1:]) / sizes.after * 1e3 for taken in times]
    lengths = zip(sizes.positions, ms, strict=True)
    return [{"tokens before": T, "ms a token": x, "of the first": x / ms[0]} for T, x in lengths]


def compare_lookup(text: str, model: Any, ids: Tensor, new: int, **options: Any) -> list[Row]:
    rows, plain = [], write(model, ids, new, **options)
    for drafted in (0, 10, 5):
        call = partial(write, model, ids, new, **options, prompt_lookup_num_tokens=drafted or None)
        rate, streamer = new / median_seconds(call), mock.Mock()
        same = int((call(streamer=streamer) == plain).cumprod(1).sum()) - ids.shape[1]
        passes = streamer.put.call_count - 1  # the prompt comes first
        row = {"after": text, "drafted": drafted, "tokens/s": rate, "accepted a pass": new / passes - 1}
        rows.append(row | {"as plain": f"{same} of {new}", "wrong": same < new})
    return [row | {"of plain": row["tokens/s"] / rows[0]["tokens/s"]} for row in rows]


class Dictation(transformers.LogitsProcessor):
    """Makes the next token that of a text `[1, T]`."""

    def __init__(self, text: Tensor):
        self.text = text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.text[:, input_ids.shape[1] : input_ids.shape[1] + 1]
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def measure_lookup(name: str, sizes: Sizes) -> list[Row]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)

    def encoded(text: str) -> Tensor:
        return tokenizer(text, return_tensors="pt").input_ids.to(DEVICE)

    demo = modeling_xlstm.XLSTMForCausalLM.from_pretrained(DEMO, dtype=torch.float32).to(DEVICE)
    rows = compare_lookup("a repeated text, trained, float32", prepared(demo), encoded(LINES * 3), sizes.new)
    model, prompt = made(name, sizes), encoded(PROGRAM)
    text = torch.cat((prompt, encoded(PROGRAM.replace("value, low", "number, low"))), 1) % model.config.vocab_size
    options = {"logits_processor": [Dictation(text)]}
    return rows + compare_lookup("a program, random, bfloat16", model, text[:, : prompt.shape[1]], sizes.new, **options)


# tables


class Section(NamedTuple):
    """A table: what makes a row, whose columns have these formats, and the rate whose ratio to ours is shown."""

    measure: Callable[[str, Sizes], list[Row]]
    peers: tuple[str, ...]
    columns: dict[str, str]
    key: str = ""
    rate: str = ""


SECTIONS = {
    "generate": Section(
        measure_generate, (OURS, EAGER, NATIVE, LIMIT_CHUNK, LLAMA),
        {"batch": "d", "new tokens": "d", "tokens/s": ".1f", "ms for the first": ".1f", "tokens/s after it": ".1f",
         "tokens/s of a step": ".1f"},
        "batch", "tokens/s after it",
    ),
    "first": Section(
        measure_first, (OURS, NATIVE, LIMIT_CHUNK),
        {"compiled before": "s", "s to the first": ".2f", "s to the second": ".2f"},
    ),
    "prefill": Section(
        measure_prefill, (OURS, NATIVE, LIMIT_CHUNK, XL_CHUNK, LLAMA),
        {"tokens": "d", "ms": ".1f", "tokens/s": ".0f", "tokens/s in generate": ".0f"},
        "tokens", "tokens/s in generate",
    ),
    "long": Section(
        measure_long, (OURS,),
        {"tokens": "d", "s": ".2f", "tokens/s": ".0f", "of shorter": ".2f", "extra GiB": ".2f"},
    ),
    "position": Section(
        measure_position, (OURS,), {"tokens before": "d", "ms a token": ".3f", "of the first": ".3f"}
    ),
    "lookup": Section(
        measure_lookup, (OURS,),
        {"after": "s", "drafted": "d", "tokens/s": ".1f", "of plain": ".2f", "accepted a pass": ".2f", "as plain": "s"},
    ),
}  # fmt: skip


def table(name: str, section: Section, sizes: Sizes) -> list[str]:
    """Prints a table, and returns what is wrong with ours."""
    formats = section.columns | ({"of ours": ".2f"} if section.rate else {})
    print(f"\n{name}\n\n| model | {' | '.join(formats)} |\n|{'---|' * (len(formats) + 1)}", flush=True)
    wrong, unmeasured, rates = list[str](), list[str](), dict[Any, float]()
    for peer in tqdm(section.peers, name, disable=None, leave=False):
        rows, error = list[Row](), missing(PEERS[peer])
        if not error:
            with closing(Worker()) as worker:
                rows, error = worker.attempt(section.measure, peer, sizes)
            wrong += [error] if error and PEERS[peer].make is ours else []
        unmeasured += [f"Not measured: {peer}, {error}"] if error else []
        for row in rows or []:
            wrong += [f"another text than plain after {row['after']}"] if row.get("wrong") else []
            if section.rate:
                key, rate = row[section.key], row[section.rate]
                rates |= {key: rate} if peer == OURS else {}
                row["of ours"] = rate / rates[key] if key in rates else None
            cells = ["" if row[column] is None else format(row[column], kind) for column, kind in formats.items()]
            show(f"| {' | '.join((peer, *cells))} |")
    if unmeasured:
        print("", *unmeasured, sep="\n", flush=True)
    return [f"{name}: {sentence}" for sentence in wrong]


def section_parser(name: str, doc: str | None, examples: str, sections: Collection[str]) -> argparse.ArgumentParser:
    """A parser for sections to measure, and whether with tiny models."""
    parser = command_line(name, doc, examples)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(sections)} (default: all)")
    parser.add_argument("--tiny", action="store_true", help="small models and short texts, to try it")
    return parser


def asked(
    parser: argparse.ArgumentParser, arguments: list[str] | None, sections: Collection[str], tests: tuple[str, ...],
    device: str,
) -> argparse.Namespace:  # fmt: skip
    """What is asked for. Ends the process where models cannot be measured."""
    args = parser.parse_args(arguments)
    if unknown := set(args.sections) - set(sections):
        parser.error(f"Sections are {', '.join(sections)}, got {', '.join(sorted(unknown))}.")
    if not args.tiny and device == "cpu":
        sys.exit("Models of this size are measured on a CUDA GPU, and PyTorch finds none here; --tiny needs none.")
    if not args.tiny and (sentence := obstacle(tests)):
        sys.exit(f"No speed without correct results: {sentence}")
    return args


def build_parser() -> argparse.ArgumentParser:
    return section_parser("generation", __doc__, EXAMPLES, SECTIONS)


def main(arguments: list[str] | None = None) -> None:
    args = asked(build_parser(), arguments, SECTIONS, TESTS, DEVICE)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine()
    packages = [p for p in ("torch", "triton", "transformers", *KERNELS) if find_spec(p) is not None]
    print(device, "bfloat16", *(f"{name} {version(name)}" for name in packages), sep=", ", flush=True)
    sizes = TINY if args.tiny else FULL
    if wrong := [fault for name in args.sections or SECTIONS for fault in table(name, SECTIONS[name], sizes)]:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    run(main)
