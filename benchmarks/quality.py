"""What small models learn, beside a Llama of their size: `python -m benchmarks.quality SECTION ... [--data DIR]`.

The models of a section on text have as many parameters, to 4 %. All read the same tokens in the same order; only a seed
changes their weights and that order. AdamW, betas 0.9 and 0.95; weights of linear maps decay by 0.1; gradients are
clipped at a norm of 1; the learning rate warms up for a tenth of the steps and falls to a tenth by a cosine. On a GPU a
step is a CUDA graph, so that none waits for Python.

- `text`: 28 M parameters and English text, the output of `checkpoints/prepare_data.py` in DIR, autocast to bfloat16.
  Bits per byte of the held-out text, in windows of the length trained on; tokens/s and peak memory of training. The
  tests of what is timed run first.
- `small`: the same with 7.1 M parameters, 14 MB in bfloat16.
- `languages`: regular languages, 2 blocks of width 64 in float32, the sLSTM without convolution. After each symbol a
  model names the state of the automaton, in sequences of 40 symbols; it is tested with 256. Percent of right answers up
  to the 40th and after it.

`--models`, `--seeds`, `--steps` and `--learning-rate` are for other runs, `--jobs` runs several at once; `--tiny` tries
it with models of no meaning, on a CPU too.
"""

import argparse
import gc
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm

from benchmarks.command import check_data, command_line, die_of_interrupts, integer, run
from benchmarks.generation import synchronize
from benchmarks.ops import obstacle, version
from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM
from modeling_xlstm.__main__ import number
from modeling_xlstm.training_xlstm import decaying


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TESTS = ("tests/test_model_triton.py",)
WARM_UP, LEAST = 0.1, 0.1  # of the steps, of the learning rate
UNTIMED = 10  # steps
EXAMPLES = """examples:
  python -m benchmarks quality languages --tiny --seeds 1 --models xLSTM-7B

on a GPU:
  python -m benchmarks quality languages --jobs 6

with what `python checkpoints/prepare_data.py --cache .` fetches from the network:
  python -m benchmarks quality text --tiny --data data
  python -m benchmarks quality text small --data data  # on a GPU
"""

Batches = Iterator[tuple[Tensor, Tensor]]  # ids and targets [batch, time]
Row = dict[str, Any]


class Size(NamedTuple):
    """Of models: `blocks` of xLSTM-7B or a Llama are as large as `stack` of the first paper. And of their training."""

    width: int
    blocks: int
    stack: int
    heads: int
    attention_heads: int
    batch: int
    length: int
    steps: int
    learning_rate: float


TEXT = Size(512, 8, 16, 4, 8, batch=64, length=512, steps=1000, learning_rate=2e-3)
SMALL = Size(384, 3, 6, 4, 4, batch=128, length=512, steps=800, learning_rate=3e-3)
LANGUAGES = Size(64, 2, 2, 1, 4, batch=256, length=40, steps=4000, learning_rate=3e-3)
TINY = Size(32, 2, 2, 1, 2, batch=2, length=16, steps=12, learning_rate=1e-3)
TEST = 256  # symbols


def model_7b(size: Size, vocab: int) -> XLSTMForCausalLM:
    """Blocks of xLSTM-7B."""
    shape: dict[str, Any] = {"hidden_size": size.width, "num_hidden_layers": size.blocks, "num_heads": size.heads}
    return XLSTMForCausalLM(XLSTMConfig(vocab_size=vocab, tie_word_embeddings=True, **shape))


def stack(size: Size, vocab: int, kinds: tuple[str, ...], **options: Any) -> XLSTMForCausalLM:
    """Blocks of the first paper, of these kinds in turn."""
    options |= {"hidden_size": size.width, "num_hidden_layers": size.stack, "num_heads": size.heads}
    options |= {"vocab_size": vocab, "tie_word_embeddings": True}
    options["block_types"] = [kinds[i % len(kinds)] for i in range(size.stack)]
    return XLSTMForCausalLM(XLSTMConfig.from_ratio("1:0", **options))


def llama(size: Size, vocab: int) -> Any:
    options: dict[str, Any] = {"vocab_size": vocab, "tie_word_embeddings": True, "attn_implementation": "sdpa"}
    options |= {"hidden_size": size.width, "num_hidden_layers": size.blocks}
    options |= {"num_attention_heads": size.attention_heads}
    options["intermediate_size"] = 64 * math.ceil(size.width * 8 / 3 / 64)  # as those of our blocks
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))


ONLY_MLSTM = ("mlstm",)
ON_TEXT: dict[str, Callable[[Size, int], Any]] = {
    "xLSTM[1:0]": partial(stack, kinds=ONLY_MLSTM),
    "xLSTM[5:1]": partial(stack, kinds=(*["mlstm"] * 5, "slstm")),
    "xLSTM[7:1]": partial(stack, kinds=(*["mlstm"] * 7, "slstm")),
    "xLSTM-7B": model_7b,
    "Llama": llama,
}
ON_LANGUAGES: dict[str, Callable[[Size, int], Any]] = {
    "xLSTM[1:0]": partial(stack, kinds=ONLY_MLSTM),
    "xLSTM[1:1]": partial(stack, kinds=("mlstm", "slstm"), slstm_conv_kernel_size=0),
    "xLSTM[0:1]": partial(stack, kinds=("slstm",), slstm_conv_kernel_size=0),
    "xLSTM-7B": model_7b,
    "Llama": llama,
}


# training


def train(model: Any, batches: Batches, size: Size, autocast: bool) -> Row:
    """Trains for as many steps as there are batches, replayed as a CUDA graph after the first."""
    wanted = set(decaying(model))
    groups = [
        {"params": [p for name, p in model.named_parameters() if (name in wanted) == decays], "weight_decay": decay}
        for decays, decay in ((True, 0.1), (False, 0.0))
    ]
    rate = torch.tensor(size.learning_rate, device=DEVICE)
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True, capturable=DEVICE == "cuda")
    schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, round(WARM_UP * size.steps), size.steps, min_lr_rate=LEAST
    )
    model.config.use_cache = False

    def step(ids: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    if DEVICE == "cuda":
        gc.collect()  # of a run before
        torch.cuda.reset_peak_memory_stats()
    start = warm = time.perf_counter()
    take = step
    for count, batch in enumerate(batches):
        if count == UNTIMED:
            take = replay(step, batch) if DEVICE == "cuda" else step
            synchronize()
            warm = time.perf_counter()
        take(*batch)
        schedule.step()
    synchronize()
    end = time.perf_counter()
    return {"seconds": end - start, "tokens/s": (size.steps - UNTIMED) * size.batch * size.length / (end - warm)}


def replay(step: Callable[..., None], batch: tuple[Tensor, ...]) -> Callable[..., None]:
    """A step for batches like this one, without Python. It has been taken before, so that nothing is compiled."""
    places, graph = [x.clone() for x in batch], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*places)

    def take(*batch: Tensor) -> None:
        for place, x in zip(places, batch, strict=True):
            place.copy_(x)
        graph.replay()

    return take


# text


def random_windows(tokens: Tensor, size: Size, seed: int) -> Batches:
    """Ids and the tokens after them, from anywhere in the text."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(size.steps):
        starts = torch.randint(len(tokens) - size.length, (size.batch, 1), generator=generator).to(DEVICE)
        windows = tokens[starts + torch.arange(size.length + 1, device=DEVICE)].long()
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def all_windows(tokens: Tensor, size: Size) -> Batches:
    """As many windows as the text has, by each token but the first is predicted once; the last may be shorter."""
    inputs, targets = tokens[:-1].long(), tokens[1:].long()
    full = len(inputs) // size.length * size.length
    rows = (part[:full].view(-1, size.length).split(size.batch) for part in (inputs, targets))
    yield from zip(*rows, strict=True)
    if full < len(inputs):
        yield inputs[None, full:], targets[None, full:]


def learn_text(size: Size, name: str, seed: int, data: Path, language: str) -> Row:
    """Trains a model and tests it with the held-out text."""
    train_tokens, held_out = (
        torch.from_numpy(np.load(data / f"{part}.npy").astype(np.int32)).to(DEVICE) for part in ("train", "held_out")
    )
    described = json.loads((data / "data.json").read_text())
    vocab = json.loads((data / "tokenizer.json").read_text())["model"]["vocab"]
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        model = ON_TEXT[name](size, len(vocab)).train()
    row = train(model, random_windows(train_tokens, size, seed), size, autocast=True)
    if DEVICE == "cuda":
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    model.eval()
    nats = 0.0
    for ids, targets in all_windows(held_out, size):
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            logits = model(input_ids=ids).logits
        nats += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
    bits = nats / math.log(2) / described["held_out"]["bytes"]
    return row | {"bits per byte": bits, "parameters": model.num_parameters()}


# languages


def parity() -> Tensor:
    """Is the number of ones odd?"""
    return torch.tensor([[0, 1], [1, 0]])


def counting() -> Tensor:
    """The sum of digits modulo 5."""
    return (torch.arange(5)[:, None] + torch.arange(5)) % 5


def arithmetic() -> Tensor:
    """The value modulo 5 of sums, differences and products from left to right; symbols are an operator and a digit.
    No product is with 0, after which nothing before would matter.
    """
    value, digit = torch.arange(5)[:, None], torch.arange(5)
    return torch.cat([value + digit, value - digit, value * digit[1:]], 1) % 5


LANGUAGES_BY_NAME = {"parity": parity, "counting modulo 5": counting, "arithmetic modulo 5": arithmetic}


def words(table: Tensor, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random symbols and the states after them `[count, length]`; the automaton with this table starts in state 0."""
    symbols = torch.randint(table.shape[1], (count, length), generator=generator)
    state, states = torch.zeros(count, dtype=torch.long), torch.empty_like(symbols)
    for t in range(length):
        state = table[state, symbols[:, t]]
        states[:, t] = state
    return symbols.to(DEVICE), states.to(DEVICE)


def learn_language(size: Size, name: str, seed: int, data: Path | None, language: str) -> Row:
    """Trains a model and tests it with longer words."""
    table, generator = LANGUAGES_BY_NAME[language](), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        model = ON_LANGUAGES[name](size, max(table.shape)).train()
    batches = (words(table, size.batch, size.length, generator) for _ in range(size.steps))
    row = train(model, batches, size, autocast=False)
    symbols, states = words(table, 1024, TEST, generator)
    model.eval()
    with torch.no_grad():
        right = 100.0 * (model(input_ids=symbols).logits.argmax(-1) == states)
    percent = {"up to 40": right[:, : size.length].mean().item(), "after 40": right[:, size.length :].mean().item()}
    return row | percent | {"parameters": model.num_parameters()}


# tables


class Section(NamedTuple):
    """A table: what is learned, and by whom; each column is a mean and the range of all seeds."""

    learn: Callable[[Size, str, int, Any, str], Row]
    models: tuple[str, ...]
    subjects: tuple[str, ...]
    size: Size
    columns: dict[str, str]


MEASURED = {"parameters": ",", "bits per byte": ".4f", "tokens/s": ",.0f", "peak GiB": ".1f", "seconds": ".0f"}
ANSWERS = {"parameters": ",", "up to 40": ".1f", "after 40": ".1f", "seconds": ".0f"}
NO_SLSTM, OTHERS = ("xLSTM[1:0]",), ("xLSTM-7B", "Llama")
SECTIONS = {
    "text": Section(learn_text, (*NO_SLSTM, "xLSTM[7:1]", *OTHERS), ("held-out text",), TEXT, MEASURED),
    "small": Section(learn_text, (*NO_SLSTM, "xLSTM[5:1]", *OTHERS), ("held-out text",), SMALL, MEASURED),
    "languages": Section(learn_language, tuple(ON_LANGUAGES), tuple(LANGUAGES_BY_NAME), LANGUAGES, ANSWERS),
}


def runs(section: Section, args: argparse.Namespace) -> dict[tuple[str, str], list[Row]]:
    """Rows of all seeds by subject and model; what fails is told and left out."""
    sizes: dict[str, Any] = {"steps": args.steps, "learning_rate": args.learning_rate}
    size = (TINY if args.tiny else section.size)._replace(**{key: value for key, value in sizes.items() if value})
    names = [name for name in section.models if name in (args.models or section.models)]
    rows: dict[tuple[str, str], list[Row]] = {(s, name): [] for s in section.subjects for name in names}
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), die_of_interrupts) as pool:
        futures = {
            pool.submit(section.learn, size, name, seed, args.data, subject): (subject, name, seed)
            for seed in range(args.seeds)
            for subject, name in rows
        }
        for future in tqdm(as_completed(futures), "runs", total=len(futures), disable=None, leave=False):
            subject, name, seed = futures[future]
            if error := future.exception():
                said = f"{type(error).__name__}: {error}"
            else:
                row = future.result()
                rows[subject, name].append(row)
                said = ", ".join(f"{row[c]:{kind}} {c}" for c, kind in section.columns.items() if c in row)
            tqdm.write(f"{subject}, {name}, seed {seed}: {said}", file=sys.stderr)
    return rows


def cell(values: list[Any], kind: str) -> str:
    """Mean and range of the seeds, where they differ."""
    if not values:
        return ""
    mean, least, most = (format(f(values), kind) for f in (statistics.mean, min, max))
    return mean if least == most else f"{mean} ({least} to {most})"


def table(section: Section, args: argparse.Namespace) -> bool:
    """Prints a table; whether all of its runs came to an end."""
    rows = runs(section, args)
    print(f"| learned | model | {' | '.join(section.columns)} |\n|{'---|' * (len(section.columns) + 2)}")
    for (subject, name), of_seeds in rows.items():
        cells = [cell([row[c] for row in of_seeds if c in row], kind) for c, kind in section.columns.items()]
        print(f"| {subject} | {name} | {' | '.join(cells)} |", flush=True)
    return all(len(of_seeds) == args.seeds for of_seeds in rows.values())


def build_parser() -> argparse.ArgumentParser:
    parser = command_line("quality", __doc__, EXAMPLES)
    add = parser.add_argument
    add("sections", nargs="+", metavar="SECTION", choices=SECTIONS, help=f"of {', '.join(SECTIONS)}")
    add("--data", type=Path, metavar="DIR", help="the output of prepare_data.py")
    add("--models", nargs="+", metavar="NAME", help="names in the table (default: all)")
    add("--seeds", type=integer(1), default=3, metavar="N", help="how many (default: 3)")
    add("--steps", type=integer(UNTIMED + 1), metavar="N", help="another length of training")
    rate = number(float, "above 0 and at most 1", lambda x: 0 < x <= 1)
    add("--learning-rate", type=rate, metavar="X", help="another learning rate")
    jobs = "runs at once, which makes tokens/s meaningless (default: 1)"
    add("--jobs", type=integer(1), default=1, metavar="N", help=jobs)
    add("--tiny", action="store_true", help="small models and few steps, to try it")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    on_text = {"text", "small"} & set(args.sections)
    if on_text:
        check_data(parser, args.data, "data.json", "train.npy", "held_out.npy", "tokenizer.json")
    known = {name for section in args.sections for name in SECTIONS[section].models}
    if unknown := set(args.models or ()) - known:
        parser.error(f"Models are {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}.")
    if not args.tiny and DEVICE == "cpu":
        sys.exit("Models of this size are trained on a CUDA GPU, and PyTorch finds none here; --tiny needs none.")
    if on_text and not args.tiny and (sentence := obstacle(TESTS)):
        sys.exit(f"No speed without correct results: {sentence}")
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine()
    print(device, *(f"{name} {version(name)}" for name in ("torch", "triton", "transformers")), sep=", ")
    complete = True
    for name in args.sections:
        print(f"\n{name}\n", flush=True)
        complete &= table(SECTIONS[name], args)
    if not complete:
        sys.exit("Some runs did not come to an end.")


if __name__ == "__main__":
    run(main)
