"""Ops on one GPU beside their peers: `python -m benchmarks.ops [--op NAME ...] [--shape NAME ...] [--peers NAME ...]`.

The tests of an op run first, and an op whose tests fail gets a sentence instead of numbers. Then the ceilings of this
GPU are measured: a device copy (bytes read and written) and a product of two 8192 x 8192 matrices in bfloat16. Times
are medians of `triton.testing.do_bench`, which empties the L2 cache before each call, on random inputs in bfloat16.
Layouts that a peer wants are made outside of what is timed, outputs are checked to be finite, and extra memory is the
peak of a call less what was there before and less the gradients, which a model has from step to step. Measurements run
in a process of their own, since some peers abort theirs. Steps are timed in a CUDA graph of 32 layers with a state
each, and divided by 32.

Bytes and FLOPs are formulas of the shape; a share is the time that an op would need at a ceiling over the time that it
took. Bytes: every input read once and every output written once, in forward and backward pass each; outputs are h, and
of a step the state too. FLOPs: products only, 2 for a multiply-add, in chunks of 256 tokens that see themselves and
those before them, without those of the normaliser; a backward pass has twice the products of a forward pass, as nothing
that is recomputed counts. A peer that computes something else, as its remark says, is there for scale, without shares.

`--csv FILE` keeps all columns, `--plot FILE` (svg or png) draws them, with `--from-csv FILE` on any machine.
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import cache, partial
from importlib import import_module, metadata
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from benchmarks.command import command_line, die_of_interrupts, new_file, run, show


OURS = "modeling_xlstm"
ROOT = Path(__file__).resolve().parents[1]
DEVICE, DTYPE = "cuda", torch.bfloat16
CHUNK, GRAPHED, EPS, CAP = 256, 32, 1e-6, 30.0
TEXTS = ("op", "shape", "implementation", "remark", "version", "gpu", "torch", "triton")  # columns without numbers
SHOWN = {"ms": "{:.4f}", "of ours": "{:.2f}", "extra GiB": "{:.2f}", "of copy": "{:.0%}", "of matmul": "{:.0%}"}
LONGEST_BAR = 6
EXAMPLES = """on a GPU:
  python -m benchmarks ops
  python -m benchmarks ops --op "mlstm forward" --shape 7B --peers mlstm_kernels
  python -m benchmarks ops --csv ops.csv --plot ops.svg

with the table that the last has written, on any machine:
  python -m benchmarks ops --from-csv ops.csv --plot ops.png
"""

Inputs = dict[str, Any]  # tensors by name; of an LSTM the module too


class Shape(NamedTuple):
    """Batch, time, heads and their sizes. What is optional runs only where it is named."""

    name: str
    B: int
    T: int
    H: int
    K: int
    V: int
    optional: bool = False


class Implementation(NamedTuple):
    """`load` imports a function that takes what `layout` makes of the inputs and returns h or y, alone or first."""

    name: str
    package: str
    load: Callable[[], Callable]
    layout: Callable[[Inputs], Inputs] = dict
    differs: str = ""  # from what the op computes


class Op(NamedTuple):
    """What is timed, and the arguments of pytest that must pass first. The first implementation is ours."""

    name: str
    computes: str
    tests: tuple[str, ...]
    shapes: tuple[Shape, ...]
    implementations: tuple[Implementation, ...]
    inputs: Callable[[Shape], Inputs]
    traffic: Callable[[Shape], int]  # in bytes
    flops: Callable[[Shape], int]
    backward: bool = False
    graphed: bool = False


# inputs and products: gates and states are float32


def normal(*size: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(size, device=DEVICE, dtype=dtype)


def mlstm_inputs(s: Shape, *time: int) -> Inputs:
    """q, k `[B, T, H, K]`, v `[B, T, H, V]`, gates `[B, T, H]`; a step has no axis T."""
    q, k, v = (normal(s.B, *time, s.H, width) for width in (s.K, s.K, s.V))
    igate, fgate = (normal(s.B, *time, s.H, dtype=torch.float32) + mean for mean in (-3, 4.5))
    return {"q": q, "k": k, "v": v, "igate": igate, "fgate": fgate}


def step_inputs(s: Shape) -> Inputs:
    sizes = {"C": (s.B, s.H, s.K, s.V), "n": (s.B, s.H, s.K), "m": (s.B, s.H)}
    return mlstm_inputs(s) | {name: normal(*size, dtype=torch.float32) for name, size in sizes.items()}


def gated_step_inputs(s: Shape) -> Inputs:
    return step_inputs(s) | {"ogate": normal(s.B, s.H * s.V), "weight": normal(s.H * s.V)}


def with_time(x: Inputs) -> Inputs:
    """Inputs of one step as those of a sequence of one; the state has no axis T."""
    return {name: t if name in ("C", "n", "m", "weight") else t.unsqueeze(1) for name, t in x.items()}


def chunkwise_traffic(s: Shape, backward: bool = False) -> int:
    """Forward q, k, v and gates are read and h is written; backward they and dh are read and gradients written."""
    inputs, h = s.B * s.T * s.H * (2 * (2 * s.K + s.V) + 2 * 4), s.B * s.T * s.H * s.V * 2
    return 3 * inputs + 2 * h if backward else inputs + h


def chunkwise_flops(s: Shape) -> int:
    """For each token and head k v^T and q C, and q k^T and (q k^T) v with, on average, half of a chunk."""
    return s.B * s.T * s.H * (4 * s.K * s.V + (CHUNK + 1) * (s.K + s.V))


def step_traffic(s: Shape) -> int:
    """C, n and m are read and written, q, k, v and gates read, h is written."""
    return s.B * s.H * (2 * 4 * (s.K * s.V + s.K + 1) + 2 * (2 * s.K + s.V) + 2 * 4 + 2 * s.V)


def slstm_inputs(s: Shape) -> Inputs:
    """Gates `[B, T, H, 4, D]` and recurrent weights; K and V of a shape are both D."""
    return {"gates": normal(s.B, s.T, s.H, 4, s.K), "R": normal(s.H, 4, s.K, s.K) / s.K**0.5}


def slstm_traffic(s: Shape, backward: bool = False) -> int:
    """Forward gates and R are read and h is written; backward they and dh are read and gradients written."""
    inputs, h = 2 * s.H * 4 * s.K * (s.B * s.T + s.K), 2 * s.B * s.T * s.H * s.K
    return 3 * inputs + 2 * h if backward else inputs + h


def slstm_flops(s: Shape) -> int:
    """R h of four gates for each token and head."""
    return s.B * s.T * s.H * 8 * s.K**2


def loss_inputs(s: Shape) -> Inputs:
    """Hidden states `[B T, K]` of a model with V words, the projection to these, and what comes next."""
    labels = torch.randint(s.V, (s.B * s.T,), device=DEVICE)
    return {"x": normal(s.B * s.T, s.K), "weight": normal(s.V, s.K) / s.K**0.5, "labels": labels}


def loss_traffic(s: Shape) -> int:
    """Hidden states, projection and labels are read, the gradients of the first two written."""
    return 2 * 2 * s.K * (s.B * s.T + s.V) + 8 * s.B * s.T


def gated_step_traffic(s: Shape) -> int:
    """As a step, and the output gate and the norm's weight are read."""
    return step_traffic(s) + 2 * (s.B + 1) * s.H * s.V


# ours and peers


def imported(module: str, name: str, **options: Any) -> Callable:
    return partial(getattr(import_module(module), name), **options)


def mlstm_kernels(name: str, kernel: str, chunk_size: int, differs: str = "") -> Implementation:
    options = {"chunk_size": chunk_size, "return_last_states": False, "autocast_kernel_dtype": DTYPE}
    return Implementation(
        name, "mlstm_kernels",
        lambda: partial(imported("mlstm_kernels.torch", "get_mlstm_kernel")(kernel), **options),
        lambda x: {n: t.transpose(1, 2).contiguous() for n, t in zip("qkvif", x.values(), strict=True)}, differs,
    )  # fmt: skip


def attention_inputs(x: Inputs) -> Inputs:
    B, T, H, V = x["v"].shape
    return {name: normal(B, H * V // 128, T, 128) for name in ("query", "key", "value")}


def head_norm(h: Tensor, o: Tensor, weight: Tensor) -> Tensor:
    return torch.sigmoid(o) * (F.layer_norm(h, h.shape[-1:], eps=EPS).flatten(-2) * weight)


def flashrnn(backend: str) -> Callable:
    scan = imported("flashrnn.flashrnn", "flashrnn")
    return lambda Wx, R, b: scan(Wx, R, b, function="slstm", backend=backend)[0][0]


def flashrnn_inputs(x: Inputs) -> Inputs:
    B, T, H, _, D = x["gates"].shape
    return {"Wx": normal(B, T, 4, H, D), "R": normal(4, H, D, D) / D**0.5, "b": normal(4, H, D)}


def lstm_inputs(x: Inputs) -> Inputs:
    B, T, H, _, D = x["gates"].shape
    width = H * D
    return {"x": normal(B, T, width), "lstm": torch.nn.LSTM(width, width, batch_first=True, device=DEVICE, dtype=DTYPE)}


def loss_of_logits(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from modeling_xlstm.logits_triton import cross_entropy

    return cross_entropy(x @ weight.t(), labels, CAP, -100)[0]


def loss_by_formula(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (x @ weight.t()).float()
    return F.cross_entropy(CAP * torch.tanh(logits / CAP), labels, reduction="sum")


def liger(**options: Any) -> Callable:
    loss = imported("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(
        reduction="sum", softcap=CAP, **options
    )
    return lambda x, weight, labels: loss(weight, x, labels)


STEP_OPTIONS = {"mask": None, "input_gate": "exp", "gate_soft_cap": None, "eps": EPS}
NORM_OPTIONS = STEP_OPTIONS | {"bias": None, "norm_eps": EPS, "offset": 0.0}
CHUNKWISE = (
    Implementation(OURS, OURS, lambda: imported(OURS, "mlstm_chunkwise", backend="triton")),
    mlstm_kernels("limit_chunk-64", "chunkwise--triton_limit_chunk", 64),
    mlstm_kernels("xl_chunk-128", "chunkwise--triton_xl_chunk", 128),
    mlstm_kernels("xl_chunk-256", "chunkwise--triton_xl_chunk", 256),
    mlstm_kernels("xl_siging-128", "chunkwise--triton_xl_chunk_siging", 128, "sigmoid input gate"),
    Implementation(
        "simple_gla", "fla", lambda: imported("fla.ops.simple_gla", "chunk_simple_gla"),
        lambda x: {name: x[name] for name in "qkv"} | {"g": F.logsigmoid(x["fgate"])}, "no normaliser, no input gate",
    ),
    Implementation(
        "sdpa", "torch", lambda: partial(F.scaled_dot_product_attention, is_causal=True),
        attention_inputs, "attention of the same width, heads of 128",
    ),
)  # fmt: skip
STEP = (
    Implementation(OURS, OURS, lambda: imported("modeling_xlstm.mlstm_triton_step", "mlstm_step", **STEP_OPTIONS)),
    Implementation(
        f"{OURS} in place", OURS, lambda: imported("modeling_xlstm.mlstm_triton_step", "mlstm_steps_", **STEP_OPTIONS),
        with_time,
    ),
    Implementation(
        "triton-step", "mlstm_kernels",
        lambda: imported("mlstm_kernels.torch.recurrent.triton_step", "mlstm_recurrent_step__triton"),
        lambda x: {n: t[..., None] if n in "ifm" else t for n, t in zip("qkvifcnm", x.values(), strict=True)},
    ),
)  # fmt: skip
GATED_STEP = (
    Implementation(
        OURS, OURS, lambda: imported("modeling_xlstm.mlstm_triton_step", "mlstm_steps_gated_", **NORM_OPTIONS),
        with_time,
    ),
)  # fmt: skip
HEAD_NORM = (
    Implementation(
        OURS, OURS,
        lambda: imported("modeling_xlstm.head_norm_triton", "gated_head_norm", bias=None, offset=0.0, eps=EPS),
    ),
    Implementation("formula", "torch", lambda: head_norm),
    Implementation("formula-compiled", "torch", lambda: torch.compile(head_norm, dynamic=False)),
)  # fmt: skip
SLSTM = (
    Implementation(OURS, OURS, lambda: imported(OURS, "slstm_scan", backend="triton")),
    Implementation("cuda", "flashrnn", lambda: flashrnn("cuda"), flashrnn_inputs),
    Implementation(
        "cuDNN LSTM", "torch", lambda: lambda x, lstm: lstm(x)[0], lstm_inputs,
        "dense, and with the product of its inputs; no gradients of weights",
    ),
)  # fmt: skip
LOSS = (
    Implementation(
        OURS, OURS, lambda: imported("modeling_xlstm.logits_triton", "linear_cross_entropy", cap=CAP),
    ),
    Implementation(f"{OURS}, all logits", OURS, lambda: loss_of_logits),
    Implementation("Liger", "liger_kernel", lambda: liger(accum_dtype=torch.float32)),
    Implementation("Liger as it is", "liger_kernel", liger, differs="adds parts of gradients in bfloat16"),
    Implementation("formula", "torch", lambda: loss_by_formula),
)  # fmt: skip
SHAPES = (
    Shape("7B", 4, 8192, 8, 256, 512),
    Shape("7B-2k", 16, 2048, 8, 256, 512),
    Shape("16-heads", 8, 8192, 16, 128, 256),
    Shape("small-400M", 16, 2048, 4, 128, 256),
)
LONG = (Shape("128k", 1, 131072, 8, 256, 512), Shape("1M", 1, 1048576, 8, 256, 512, optional=True))
TOKENS = (Shape("7B-1-token", 1, 1, 8, 256, 512), Shape("7B-32-tokens", 32, 1, 8, 256, 512))
SCANS = (
    Shape("4x192", 16, 1024, 4, 192, 192),
    Shape("4x256", 16, 1024, 4, 256, 256),
    Shape("4x128-2k", 16, 2048, 4, 128, 128),
    Shape("12x64", 8, 1024, 12, 64, 64),
    Shape("1x768", 16, 1024, 1, 768, 768),
    Shape("4x256-64", 64, 1024, 4, 256, 256),
)
VOCABULARIES = (Shape("400M-head", 8, 2048, 1, 1024, 50304), Shape("7B-head", 4, 2048, 1, 4096, 50304))
FORWARD = Op(
    "mlstm forward", "h of whole sequences", ("tests/test_mlstm_triton.py",), SHAPES + LONG, CHUNKWISE,
    lambda s: mlstm_inputs(s, s.T), chunkwise_traffic, chunkwise_flops,
)  # fmt: skip
TRAINING = FORWARD._replace(
    name="mlstm forward + backward",
    computes="h of whole sequences and the gradients of q, k, v and both gates",
    shapes=SHAPES,
    traffic=partial(chunkwise_traffic, backward=True),
    flops=lambda s: 3 * chunkwise_flops(s),
    backward=True,
)
SCAN = Op(
    "slstm forward", "h of whole sequences", ("tests/test_slstm_triton.py",), SCANS, SLSTM,
    slstm_inputs, slstm_traffic, slstm_flops,
)  # fmt: skip
OPS = (
    FORWARD,
    TRAINING,
    Op(
        "mlstm step", "h and the state after one token of each sequence", ("tests/test_mlstm_triton_step.py",), TOKENS,
        STEP, step_inputs, step_traffic, lambda s: s.B * s.H * 4 * s.K * s.V, graphed=True,  # k v^T and q C
    ),
    Op(
        "mlstm gated step", "sigmoid(o) * layer_norm(h) * weight and the state after one token of each sequence",
        ("tests/test_mlstm_triton_step.py",), TOKENS, GATED_STEP, gated_step_inputs, gated_step_traffic,
        lambda s: s.B * s.H * 4 * s.K * s.V, graphed=True,
    ),
    Op(
        "gated head norm", "sigmoid(o) * layer_norm(h) * weight, the norm over each head",
        ("tests/test_head_norm_triton.py",), SHAPES[:2], HEAD_NORM,
        lambda s: {"h": normal(s.B, s.T, s.H, s.V), "o": normal(s.B, s.T, s.H * s.V), "weight": normal(s.H * s.V)},
        lambda s: 2 * s.H * s.V * (3 * s.B * s.T + 1), lambda s: 0,  # h, o, y and weight
    ),
    SCAN,
    SCAN._replace(
        name="slstm forward + backward",
        computes="h of whole sequences and the gradients of gates and recurrent weights",
        traffic=partial(slstm_traffic, backward=True),
        flops=lambda s: 3 * slstm_flops(s),
        backward=True,
    ),
    Op(
        "loss forward + backward", "the loss of a language model and the gradients of hidden states and projection",
        ("tests/test_logits_triton.py",), VOCABULARIES, LOSS, loss_inputs, loss_traffic,
        lambda s: 3 * 2 * s.B * s.T * s.K * s.V, backward=True,
    ),
)  # fmt: skip


# measurements


@cache
def obstacle(tests: tuple[str, ...]) -> str:
    """Why the tests do not show that results are right; empty where they do."""
    command, said = [sys.executable, "-m", "pytest", "-q", "-x", *tests], []
    with (
        tempfile.TemporaryFile("w+") as errors,
        tqdm(desc="tests", total=100, unit="%", disable=None, leave=False) as bar,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True) as pytest,
    ):
        for line in pytest.stdout or ():
            said.append(line)
            if passed := re.search(r"\[ *(\d+)%\]$", line):
                bar.update(int(passed[1]) - bar.n)
        errors.seek(0)
        last = ("".join(said).strip() or errors.read().strip() or "nothing").splitlines()[-1]
    green = pytest.returncode == 0 and " passed" in last  # tests that are skipped show nothing
    return "" if green else f"`pytest -q -x {' '.join(tests)}` says: {last}"


class Worker:
    """A process that measures, and a new one after a failure, which may leave a GPU unusable or its memory taken."""

    pool: ProcessPoolExecutor | None = None

    def attempt(self, function: Callable, *args: Any) -> tuple[Any, str]:
        """What the function returns, or none and what went wrong."""
        self.pool = self.pool or ProcessPoolExecutor(1, get_context("spawn"), die_of_interrupts)
        future = self.pool.submit(function, *args)
        error = future.exception()
        if error is None:
            return future.result(), ""
        self.close()
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        self.pool = None


def median_ms(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=100, rep=300, return_mode="median")


def ceilings() -> tuple[float, float]:
    """GB/s of a copy and TFLOP/s of a product."""
    x = normal(1 << 30)
    y = torch.empty_like(x)
    a, b = normal(8192, 8192), normal(8192, 8192)
    return 2 * x.nbytes / median_ms(lambda: y.copy_(x)) / 1e6, 2 * 8192**3 / median_ms(lambda: a @ b) / 1e9


def prepared(op: Op, shape: Shape, implementation: Implementation) -> Callable[[], list[Tensor]]:
    """A call that returns all that it computes; its inputs are made already."""
    function, x = implementation.load(), implementation.layout(op.inputs(shape))

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [t for t in tree_leaves(function(**x)) if isinstance(t, Tensor)]

    if not op.backward:
        return forward
    dh = torch.randn_like(forward()[0])
    leaves = [t.requires_grad_() for t in x.values() if isinstance(t, Tensor) and t.is_floating_point()]

    def forward_and_backward() -> list[Tensor]:
        h = tree_leaves(function(**x))[0]
        return [h.detach(), *torch.autograd.grad(h, leaves, dh)]

    return forward_and_backward


def measure(op_name: str, shape: Shape, name: str) -> tuple[float, float]:
    """Milliseconds and extra GiB of an implementation. Names can go to another process, functions cannot."""
    op = next(op for op in OPS if op.name == op_name)
    implementation = next(i for i in op.implementations if i.name == name)
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    calls = [prepared(op, shape, implementation) for _ in range(GRAPHED if op.graphed else 1)]
    if op.graphed:
        calls[0]()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]  # so that no two share memory
        ms = median_ms(graph.replay) / len(kept)
    else:
        ms = median_ms(calls[0])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = calls[0]()
    gradients = sum(t.nbytes for t in outputs[1:]) if op.backward else 0
    extra = (torch.cuda.max_memory_allocated() - before - gradients) / 2**30
    if not all(bool(t.isfinite().all()) for t in outputs):
        raise ArithmeticError("an output is not finite.")
    return ms, extra


# tables


@cache
def version(package: str) -> str:
    distributions = metadata.packages_distributions().get(package)
    return metadata.version(distributions[0]) if distributions else "unknown"


def row_of(op: Op, shape: Shape, peer: Implementation, result: Any, error: str, ours: Any, machine: dict) -> dict:
    """All columns, none where there is no number. `result` and `ours` are of `measure`; `machine` has the ceilings."""
    ms, extra = result or (None, None)
    at_ceilings = (op.traffic(shape) / machine["copy GB/s"] / 1e6, op.flops(shape) / machine["matmul TFLOP/s"] / 1e9)
    copy, matmul = (t / ms if ms and t and not peer.differs else None for t in at_ceilings)
    sizes = dict(zip("BTHKV", shape[1:6], strict=True))
    row = {"op": op.name, "shape": shape.name, **sizes, "implementation": peer.name, "version": version(peer.package)}
    row |= {"ms": ms, "of ours": ms / ours[0] if ms and ours else None, "extra GiB": extra, "of copy": copy}
    row |= {"of matmul": matmul, "bytes": op.traffic(shape), "FLOPs": op.flops(shape), "chunk": CHUNK}
    return row | {"remark": error or peer.differs} | machine


def write(rows: list[dict], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict]:
    """Rows as `write` wrote them. Ends the process where they are others."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or not rows[0].keys() >= {*TEXTS, *SHOWN}:
            raise ValueError("it lacks rows or columns")
        return [{name: x if name in TEXTS else float(x) if x else None for name, x in row.items()} for row in rows]
    except (OSError, ValueError) as error:
        sys.exit(f"--from-csv must be a table of --csv, got {path}: {getattr(error, 'strerror', '') or error}.")


def draw(rows: list[dict], path: Path) -> None:
    """A panel for each op: bars of time, ours 1, in groups of a shape."""
    from matplotlib.figure import Figure

    panels: dict[str, list[dict]] = {}
    for row in rows:
        if row["of ours"]:
            panels.setdefault(row["op"], []).append(row)
    if not panels:
        sys.exit("There is nothing to draw: no row has a time beside ours.")
    heights = [0.18 * len(panel) + 0.6 for panel in panels.values()]
    figure = Figure(figsize=(7.5, sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (op, panel) in zip(axes, panels.items(), strict=True):
        shapes = list(dict.fromkeys(row["shape"] for row in panel))
        places = [i + 0.7 * shapes.index(row["shape"]) for i, row in enumerate(panel)]
        lengths = [min(row["of ours"], LONGEST_BAR) for row in panel]
        colours = ["0.25" if row["implementation"].startswith(OURS) else "0.75" for row in panel]
        hatches = ["////" if row["remark"] else "" for row in panel]
        bars = axis.barh(places, lengths, color=colours, hatch=hatches, edgecolor="black", linewidth=0.5)
        cut = [f" ({row['of ours']:.0f} x ours)" if row["of ours"] > LONGEST_BAR else "" for row in panel]
        labels = [f"{row['ms']:.3g} ms{c}" for row, c in zip(panel, cut, strict=True)]
        axis.bar_label(bars, labels, padding=2, fontsize=7, bbox={"color": "white", "pad": 0.2})
        axis.set_yticks(places, [f"{row['shape']}   {row['implementation']}" for row in panel])
        axis.set(xlim=(0, LONGEST_BAR + 1.5), ylim=(places[-1] + 0.7, -0.7))
        axis.set_title(op, loc="left", fontsize=9, fontweight="bold")
        axis.axvline(1, color="black", linewidth=0.6, zorder=0)
        axis.tick_params(labelsize=7)
    axes[-1].set_xlabel("time, ours = 1: shorter is faster. Hatched: computes something else", fontsize=8)
    figure.suptitle(f"{rows[0]['gpu']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}", fontsize=9)
    figure.savefig(path, dpi=200)


def build_parser() -> argparse.ArgumentParser:
    parser = command_line("ops", __doc__, EXAMPLES)
    peers = {name for op in OPS for i in op.implementations if i.package != OURS for name in (i.name, i.package)}
    shapes = dict.fromkeys(shape.name for op in OPS for shape in op.shapes)
    parser.add_argument("--op", nargs="+", choices=[op.name for op in OPS], help="default: all")
    parser.add_argument("--shape", nargs="+", choices=list(shapes), help="default: all but 1M")
    parser.add_argument("--peers", nargs="*", choices=sorted(peers), help="names or packages (default: all)")
    parser.add_argument("--csv", type=new_file, help="also write the table to this file")
    parser.add_argument("--plot", type=new_file, help="draw the table into this file, .svg or .png")
    parser.add_argument("--from-csv", type=Path, help="with --plot: draw the table in this file, and measure nothing")
    return parser


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(arguments)
    drawable = args.plot and args.plot.suffix in (".svg", ".png") and find_spec("matplotlib")
    if not drawable and (args.plot or args.from_csv):
        parser.error(f"Drawing needs matplotlib and --plot with a file that ends in .svg or .png, got {args.plot}.")
    return args


def table(op: Op, args: argparse.Namespace, worker: Worker, machine: dict) -> Iterator[dict]:
    """Prints a table, and yields each row as soon as it is there."""
    print(f"\n{op.name}: {op.computes}")
    if obstacle(op.tests):
        print(f"No speed without correct results: {obstacle(op.tests)}")
        return
    chosen = [i for i in op.implementations if args.peers is None or {i.name, i.package} & {OURS, *args.peers}]
    missing = {i.package for i in chosen if find_spec(i.package) is None}
    for package in sorted(missing):
        print(f"Not measured: {package}, which is not installed.")
    print(f"\n| shape | implementation | {' | '.join(SHOWN)} | remark |\n|{'---|' * (len(SHOWN) + 3)}")
    shapes = [s for s in op.shapes if (s.name in args.shape if args.shape else not s.optional)]
    runs, ours = [(s, i) for s in shapes for i in chosen if i.package not in missing], None
    for shape, peer in tqdm(runs, op.name, disable=None):
        result, error = worker.attempt(measure, op.name, shape, peer.name)
        ours = result if peer.name == OURS else ours
        row = row_of(op, shape, peer, result, error, ours, machine)
        cells = ["" if row[name] is None else text.format(row[name]) for name, text in SHOWN.items()]
        show("| " + " | ".join((shape.name, peer.name, *cells, row["remark"])) + " |")
        yield row


def measured(args: argparse.Namespace) -> list[dict]:
    ops, rows = [op for op in OPS if args.op is None or op.name in args.op], []
    for op in tqdm(ops, "tests of ops", disable=None):
        obstacle(op.tests)
    with closing(Worker()) as worker:
        roof, error = worker.attempt(ceilings)
        if error:
            sys.exit(f"The ceilings of this GPU could not be measured: {error}")
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": version("triton")}
        packages = sorted({i.package for op in ops for i in op.implementations} - {"torch"})
        print(machine["gpu"], *(f"{name} {version(name)}" for name in ("torch", "triton", *packages)), sep=", ")
        print(f"Ceilings: copy {roof[0]:.0f} GB/s, bfloat16 matmul {roof[1]:.0f} TFLOP/s")
        machine |= {"copy GB/s": roof[0], "matmul TFLOP/s": roof[1]}
        for op in ops:
            for row in table(op, args, worker, machine):
                rows.append(row)
                if args.csv:
                    write(rows, args.csv)
    return rows


def main(arguments: list[str] | None = None) -> None:
    args = parsed(arguments)
    if not args.from_csv and not torch.cuda.is_available():
        sys.exit("Ops are measured on a CUDA GPU, and PyTorch finds none here.")
    rows = read(args.from_csv) if args.from_csv else measured(args)
    if not rows:
        sys.exit("Nothing was measured.")
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    run(main)
