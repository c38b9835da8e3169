"""What a step of training costs on many GPUs, by formulas: `python -m benchmarks.scaling [SECTION ...]`.

Prints the tables of `benchmarks/SCALING.md`, which defines the symbols and names the assumptions: memory, communication
and time of a 7B and a 70B model on H100s, under each way to share them. Formulas need no GPU.

- `models`, `blocks`: sizes, what blocks keep, and how long they take, as measured.
- `peaks`, `links`, `check`: memory, messages and steps under FSDP2 on four GPUs, computed and measured.
- `steps`, `long`, `slices`, `limits`: what each scheme needs for a step, with long texts, and where it ends.

What is measured in them is printed by `python -m benchmarks.scaling_gpu`.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

from benchmarks.command import command_line, run
from benchmarks.ops import Shape, chunkwise_flops
from modeling_xlstm import XLSTMConfig
from modeling_xlstm.cache_xlstm import state_shapes


EXAMPLES = """examples:
  python -m benchmarks scaling models limits
"""
MODELS = {
    "7B": XLSTMConfig.preset("xlstm-7b"),
    "70B": XLSTMConfig(hidden_size=8192, num_hidden_layers=80, num_heads=16),
}
T, TEXTS = 8192, 512  # tokens of a text, texts of a step
GPUS, NODE = (8, 64, 1024), 8
CHUNK = 256  # tokens between the states that the mLSTM's kernels keep
BUDGET = 72 * 2**30  # bytes of a GPU for tensors
PEAK = 989e12  # FLOP/s of an H100 in bfloat16
COPY = 3.02e12  # bytes/s it reads and writes
SHARE = 0.743  # of a link's rate that NCCL gives: the slope of the last two of `LINKS`
NVLINK, NET = SHARE * 450e9, SHARE * 50e9  # bytes/s of a GPU in its node, and to other nodes
START, HOP_NVLINK, HOP_NET = 50e-6, 3.4e-6, 14e-6  # seconds
# Microseconds a token on one H100 of a block by (model, GPUs that share it, checkpointing), and of all but blocks.
BLOCK = {
    ("7B", 1, False): 2.185, ("7B", 1, True): 2.690, ("7B", 2, False): 1.163, ("7B", 2, True): 1.369,
    ("7B", 4, False): 0.709, ("7B", 4, True): 0.838, ("7B", 8, False): 0.488, ("7B", 8, True): 0.733,
    ("70B", 1, False): 8.077, ("70B", 1, True): 9.740, ("70B", 2, False): 3.801, ("70B", 2, True): 5.032,
    ("70B", 4, False): 2.200, ("70B", 4, True): 2.744, ("70B", 8, False): 1.206, ("70B", 8, True): 1.553,
}  # fmt: skip
ENDS = {"7B": 2.3, "70B": 4.2}
# What the states of slices add to a block with sequence parallelism, by (model, checkpointing).
SLICE = {("7B", False): 0.517, ("7B", True): 0.732, ("70B", False): 0.446, ("70B", True): 0.986}
# Microseconds of an all-gather of so many MiB by four GPUs of a node.
LINKS = {16: 109, 128: 421, 384: 1031, 1536: 3741}
# Peaks in GiB of steps of 400 M parameters, by tokens: notebooks/benchmarks.md.
PEAKS = {"8 x 2048": (16384, 18.7), "1 x 32768": (32768, 35.1)}


class Scheme(NamedTuple):
    """Who shares what. All GPUs that do not share a text or a block read other texts."""

    name: str
    shards: int | None = None  # GPUs that share weights, gradients and optimiser; all when omitted
    tp: int = 1  # GPUs that share each block
    keep: bool = False  # weights are gathered once a step
    sp: int = 1  # GPUs that share each text


SCHEMES = (
    Scheme("DDP", shards=1), Scheme("ZeRO-2", keep=True), Scheme("FSDP2"), Scheme("HSDP, 8 shards", shards=8),
    Scheme("HSDP, 64 shards", shards=64), *(Scheme(f"TP {tp} x FSDP2", tp=tp) for tp in (2, 4, 8)),
    Scheme("sequence 2 x FSDP2", sp=2),
)  # fmt: skip


class Run(NamedTuple):
    """What each GPU does at once: texts, of how many tokens, how often a step, and whether blocks are recomputed."""

    gpus: int
    texts: int = 1
    tokens: int = T
    passes: int = 1
    checkpointing: bool = True


class Cost(NamedTuple):
    """Of a step and GPU."""

    run: Run
    memory: float  # bytes
    volume: float  # bytes received
    compute: float  # seconds, as the next two
    exposed: float  # messages that computation waits for
    hidden: float  # messages that computation may hide

    @property
    def bounds(self) -> tuple[float, float]:
        """Seconds if all is hidden that may be, and if nothing is."""
        return max(self.compute + self.exposed, self.hidden), self.compute + self.exposed + self.hidden


def block_parameters(config: XLSTMConfig) -> int:
    D, H, qk, v = config.hidden_size, config.num_heads, config.qk_size, config.inner_size
    return D * (2 * qk + 3 * v) + 3 * D * config.ffn_size + 2 * H * (D + 1) + 2 * D + v


def parameters(config: XLSTMConfig) -> int:
    D = config.hidden_size
    return config.num_hidden_layers * block_parameters(config) + 2 * config.vocab_size * D + D


def state_numbers(config: XLSTMConfig) -> int:
    """Of a message between slices: the state of a layer, and the log of how much is kept of the one before."""
    return sum(map(math.prod, state_shapes(config)["mlstm"].values())) + config.num_heads


def flops(config: XLSTMConfig, tp: int = 1, checkpointing: bool = False) -> float:
    """Of a token through a GPU's share of a block, forward and backward; what is recomputed counts again."""
    H, K, V = config.num_heads, config.qk_size // config.num_heads, config.inner_size // config.num_heads
    cell = chunkwise_flops(Shape("token", 1, 1, H, K, V))
    return (8 if checkpointing else 6) / 2 * (2 * block_parameters(config) + cell) / tp


def model_flops(config: XLSTMConfig) -> float:
    """Of a token through the model, forward and backward, nothing recomputed."""
    return config.num_hidden_layers * flops(config) + 6 * config.vocab_size * config.hidden_size


def saved(config: XLSTMConfig, tp: int = 1) -> float:
    """Bytes a token that a block keeps for its backward pass."""
    D, H, F = config.hidden_size, config.num_heads / tp, config.ffn_size / tp
    qk, v = config.qk_size / tp, config.inner_size / tp
    K, V = qk / H, v / H
    norms, mixer, ffn = 8 * D + 8, 4 * qk + 8 * v, 6 * F
    return norms + mixer + ffn + H * (48 + (40 + 2 * K * V + 4 * K) / CHUNK)


def memory(config: XLSTMConfig, scheme: Scheme, run: Run) -> float:
    """The peak: when the loss is there, or in the backward pass of the first block."""
    D, V, L, tp = config.hidden_size, config.vocab_size, config.num_hidden_layers, scheme.tp
    P, block, n = parameters(config), block_parameters(config) / tp, run.texts * run.tokens
    shards = scheme.shards or run.gpus // tp
    state, gradients = (14 * P / tp, 2 * P / tp) if shards == 1 else (12 * P / tp / shards, 4 * P / tp / shards)
    gathered = 0.0 if shards == 1 else 10 * block + 6 * V * D / tp
    kept = 2 * P / tp + 6 * block + 2 * V * D / tp if scheme.keep else gathered
    a, logits, backward = saved(config, tp), 4 * V, 4 * config.ffn_size / tp + 2 * D
    states = 8 * state_numbers(config) * rounds(scheme.sp) * run.texts
    blocks = 2 * D * L * n if run.checkpointing else L * (a * n + states)
    at_loss = state + kept + blocks + logits * n + (gradients if run.passes > 1 else 0)
    return max(at_loss, state + gradients + gathered + (a + backward) * n + states)


def rounds(sp: int) -> int:
    """Messages that each slice waits for, one after the other."""
    return 0 if sp == 1 else 1 + math.ceil(math.log2(sp - 1))


def message(config: XLSTMConfig, sp: int) -> tuple[float, float]:
    """Bytes and seconds of one of them, for a text."""
    size, in_node = 4 * state_numbers(config), sp <= NODE
    return size, START + size / (NVLINK if in_node else NET) + (HOP_NVLINK if in_node else HOP_NET)


def ring(size: float, ranks: int, per_node: int) -> tuple[float, float]:
    """Bytes received and seconds of an all-gather or reduce-scatter of `size` bytes over `ranks`."""
    nodes, volume = max(1, ranks // per_node), size * (ranks - 1) / ranks
    rate = NVLINK if nodes == 1 else min(NVLINK, per_node * NET)
    hops = (ranks - nodes) * HOP_NVLINK + (nodes - 1) * HOP_NET
    return (volume, START + volume / rate + hops) if ranks > 1 else (0.0, 0.0)


def all_reduce(size: float, ranks: int, per_node: int) -> tuple[float, float]:
    """The same of an all-reduce: two rings, or a tree, where that has fewer hops."""
    volume, seconds = ring(size, ranks, per_node)
    nodes = max(1, ranks // per_node)
    hops = (ranks - nodes) * HOP_NVLINK + (nodes - 1) * HOP_NET
    tree = (min(ranks, per_node) - 1) * HOP_NVLINK + math.ceil(math.log2(nodes)) * HOP_NET
    return 2 * volume, 2 * (seconds - max(0.0, hops - tree)) - (START if ranks > 1 else 0)


def cost(name: str, scheme: Scheme, run: Run) -> Cost:
    config, (gpus, texts, tokens, passes, checkpointing) = MODELS[name], run
    L, D, tp, n = config.num_hidden_layers, config.hidden_size, scheme.tp, texts * tokens
    block, ends = block_parameters(config) / tp, 2 * config.vocab_size * D / tp
    ranks, per_node = gpus // tp, max(1, NODE // tp)
    shards = scheme.shards or ranks
    token = (
        L * (BLOCK[name, tp, checkpointing] + (SLICE[name, checkpointing] if scheme.sp > 1 else 0)) + ENDS[name] / tp
    )
    compute = passes * n * token / 1e6 + 28 * parameters(config) / tp / shards / COPY

    def summed(collective: Callable, bytes_each: float, times: int, *group: int) -> list[tuple[float, float]]:
        """One for each block and one for the rest, so often a step."""
        parts = [collective(bytes_each * block, *group)] * L + [collective(bytes_each * ends, *group)]
        return parts * times

    hidden: list[tuple[float, float]] = []
    if shards == 1:
        hidden += summed(all_reduce, 2, 1, ranks, per_node)
    else:
        hidden += summed(ring, 2, 1 if scheme.keep else 2 * passes, shards, per_node)
        hidden += summed(ring, 4, passes, shards, per_node)
        replicas = ranks // shards
        hidden += summed(all_reduce, 4 / shards, 1, replicas, max(1, per_node // shards))
    exposed: list[tuple[float, float]] = []
    if tp > 1:
        exposed += [all_reduce(2 * n * D, tp, NODE)] * (passes * (L * (6 if checkpointing else 4) + 2))
        exposed += [ring(2 * n * config.vocab_size, tp, NODE)] * passes
    if scheme.sp > 1:
        exposed += [message(config, scheme.sp)] * (passes * texts * L * rounds(scheme.sp) * (3 if checkpointing else 2))
    volume = sum(size for size, _ in hidden + exposed)
    return Cost(run, memory(config, scheme, run), volume, compute, *(sum(s for _, s in x) for x in (exposed, hidden)))


def best(name: str, scheme: Scheme, gpus: int, texts: int, tokens: int) -> Cost | str:
    """The fastest step of `texts` of `tokens` that fits, by the time with nothing hidden; or why there is none."""
    if (scheme.shards or 0) > gpus:
        return "fewer GPUs than shards"
    share = texts * scheme.tp * scheme.sp // gpus
    if share < 1:
        return f"{texts * scheme.tp * scheme.sp / gpus:g} texts a GPU"
    sizes = [2**i for i in range(share.bit_length()) if share % 2**i == 0]
    runs = [Run(gpus, x, tokens // scheme.sp, share // x, again) for x, again in product(sizes, (True, False))]
    costs = [cost(name, scheme, x) for x in runs]
    fitting = [x for x in costs if x.memory <= BUDGET]
    return (
        min(fitting, key=lambda x: x.bounds[1]) if fitting else f"needs {min(x.memory for x in costs) / 2**30:.1f} GiB"
    )


Rows = Iterator[tuple[Any, ...]]


def models() -> Rows:
    yield "model", "parameters", "of a block", "blocks", "heads, K, V", "GFLOP a token", "state of a layer, MB"
    for name, config in MODELS.items():
        H, K, V = config.num_heads, config.qk_size // config.num_heads, config.inner_size // config.num_heads
        sizes = f"{parameters(config):,}", f"{block_parameters(config):,}", config.num_hidden_layers, f"{H}, {K}, {V}"
        yield name, *sizes, f"{model_flops(config) / 1e9:.1f}", f"{4 * state_numbers(config) / 1e6:.2f}"


def blocks() -> Rows:
    yield "model", "GPUs a block", "bytes kept a token", "us a token", "% of peak", "us, checkpointing", "% of peak"
    for name, tp in product(MODELS, (1, 2, 4, 8)):
        config, numbers = MODELS[name], list[str]()
        for again in (False, True):
            seconds = BLOCK[name, tp, again] / 1e6
            numbers += [f"{seconds * 1e6:.2f}", f"{100 * flops(config, tp, again) / seconds / PEAK:.0f}"]
        yield name, tp, f"{saved(config, tp):,.0f}", *numbers
    for name in MODELS:
        sliced = (f"{BLOCK[name, 1, again] + SLICE[name, again]:.2f}" for again in (False, True))
        yield name, "1, of slices", "", next(sliced), "", next(sliced), ""
        yield name, "all but blocks", "", ENDS[name], "", ENDS[name], ""


def peaks() -> Rows:
    yield "400 M, tokens", "computed GiB", "measured GiB"
    config = XLSTMConfig(hidden_size=1024, num_hidden_layers=24, num_heads=4)
    for name, (n, measured) in PEAKS.items():
        each = config.num_hidden_layers * saved(config) + 4 * config.vocab_size
        yield name, f"{(6 * parameters(config) + n * each) / 2**30:.1f}", measured


FSDP = Scheme("FSDP2")
# Steps of the 7B model under FSDP2 on four GPUs: what is read, how, and seconds and peak GiB as measured.
CHECKS: tuple[tuple[str, Scheme, Run, float, float], ...] = (
    ("a text each", FSDP, Run(4), 0.858, 29.2),
    ("weights kept", Scheme("ZeRO-2", keep=True), Run(4), 0.825, 36.5),
    ("nothing again", FSDP, Run(4, tokens=4096, checkpointing=False), 0.420, 39.9),
    ("a text each", FSDP, Run(4, tokens=32768), 3.053, 35.8),
    ("a text of 131072 for all", Scheme("sequence", sp=4), Run(4, tokens=32768), 4.096, 35.8),
)


def links() -> Rows:
    yield "MiB gathered by 4 GPUs", "us, computed", "us, measured"
    for size, measured in LINKS.items():
        yield size, f"{ring(size << 20, 4, NODE)[1] * 1e6:.0f}", measured


def check() -> Rows:
    yield "FSDP2, 4 GPUs", "tokens a GPU", "s, hidden", "s, not", "s, measured", "GiB", "GiB, measured"
    for what, scheme, once, seconds, peak in CHECKS:
        x = cost("7B", scheme, once)
        yield what, once.tokens, *(f"{s:.3f}" for s in (*x.bounds, seconds)), f"{x.memory / 2**30:.1f}", peak


def cells(name: str, x: Cost, tokens: int) -> tuple[str, ...]:
    """What the tables of steps say of one of so many tokens on all GPUs."""
    shares = (100 * tokens * model_flops(MODELS[name]) / x.run.gpus / s / PEAK for s in x.bounds)
    at_once = f"{x.run.texts}{', again' if x.run.checkpointing else ''}"
    times = f"{x.compute:.2f} + {x.exposed:.2f}, {x.hidden:.2f}"
    step = " to ".join(f"{s:.2f}" for s in x.bounds)
    return (
        at_once,
        f"{x.memory / 2**30:.0f}",
        f"{x.volume / 1e9:.0f}",
        times,
        step,
        " to ".join(f"{s:.0f}" for s in shares),
    )


COLUMNS = "at once", "GiB", "GB received", "compute + exposed, hidden s", "step, s", "% of peak"


def steps() -> Rows:
    yield "model, GPUs", "scheme", *COLUMNS
    for name, gpus, scheme in product(MODELS, GPUS, SCHEMES):
        x = best(name, scheme, gpus, TEXTS, T)
        where = f"{name}, {gpus}", scheme.name
        if isinstance(x, Cost):
            yield *where, *cells(name, x, TEXTS * T)
        elif x.startswith("needs"):
            yield *where, x, *[""] * 5


def long() -> Rows:
    yield "model, tokens a text", "GPUs", "GPUs a text", *COLUMNS
    for name, tokens, gpus in product(MODELS, (2**17, 2**20), GPUS):
        texts = TEXTS * T // tokens
        found = [best(name, Scheme("", sp=2**i), gpus, texts, tokens) for i in range(gpus.bit_length())]
        fitting = [(x.bounds[1], i) for i, x in enumerate(found) if isinstance(x, Cost)]
        where = f"{name}, {tokens}", gpus
        if fitting:
            _, i = min(fitting)
            yield *where, 2**i, *cells(name, found[i], TEXTS * T)  # type: ignore[arg-type]
        else:
            yield *where, "none", found[-1], *[""] * 5


def slices() -> Rows:
    yield "model", "GPUs a text", "messages", "MB each", "ms a block", "tokens of a slice that take as long"
    for name, sp in product(MODELS, (8, 64, 1024)):
        size, seconds = message(MODELS[name], sp)
        total = 2 * rounds(sp) * seconds
        tokens = total / (BLOCK[name, 1, False] + SLICE[name, False]) * 1e6
        yield name, sp, 2 * rounds(sp), f"{size / 1e6:.2f}", f"{total * 1e3:.2f}", f"{tokens:.0f}"


def limits() -> Rows:
    """With a text at a time for each GPU, or each group that shares blocks, and blocks recomputed."""
    columns = "fits from", f"{TEXTS} texts for up to", "exposed / compute", "hidden > rest from", "% of peak at 1024"
    yield "model", "scheme", *columns
    counts = [8 * 2**i for i in range(12)]
    for name, scheme in product(MODELS, SCHEMES):
        together = scheme.tp * scheme.sp
        costs = [cost(name, scheme, Run(x, tokens=T // scheme.sp)) for x in counts if x >= (scheme.shards or together)]
        fits = next((x.run.gpus for x in costs if x.memory <= BUDGET), "never")
        slow = next((x.run.gpus for x in costs if x.hidden > x.compute + x.exposed), f"above {counts[-1]}")
        at_end = next(x for x in costs if x.run.gpus == GPUS[-1])
        share = at_end.exposed / at_end.compute
        shown = cells(name, at_end, T * GPUS[-1] // together)[-1] if at_end.memory <= BUDGET else ""
        yield name, scheme.name, fits, TEXTS * together, f"{share:.2f}", slow, shown


SECTIONS: dict[str, Callable[[], Rows]] = {
    "models": models, "blocks": blocks, "peaks": peaks, "links": links, "check": check, "steps": steps, "long": long,
    "slices": slices, "limits": limits,
}  # fmt: skip


def table(rows: Rows) -> str:
    """As Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join((lines[0], "|" + "---|" * (lines[0].count("|") - 1), *lines[1:]))


def build_parser() -> argparse.ArgumentParser:
    parser = command_line("scaling", __doc__, EXAMPLES)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"Sections are {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}.")
    for name in args.sections or SECTIONS:
        print(f"\n{name}\n\n{table(SECTIONS[name]())}", flush=True)


if __name__ == "__main__":
    run(main)
