"""Several GPUs of one host beside one: `torchrun --nproc-per-node 2 -m benchmarks.distributed [--tiny] [SECTION ...]`.

Before anything is timed, small models of both families have to compute on all GPUs what they do on one: each tensor may
be off, by its norm and from a run in float64, by 4 times what one GPU is off in the same dtype, and a floor. If not,
the program ends. Then one table: in bfloat16, times are medians of 7 after 3, of the slowest process.

- `tp`, tensor parallelism: logits, also behind a long text, greedy tokens, and gradients, losses and changes of weights
  of three steps. Timed is the shape of xLSTM-7B with random weights: tokens of one text, by texts of 136 less those of
  8, and one forward pass that keeps the state and the last logits.
- `fsdp`, FSDP2, weights in float32 and products in bfloat16: three AdamW steps on rows of each process and of one on
  all. Timed are such steps of 1.4 B parameters, with weights gathered again for the backward pass or kept, and of the
  7 B, which one GPU has no room for, with gradient checkpointing.
- `sequence`, sequence parallelism: gradients of a model and of a layer, also of the long text that is timed, forward
  and backward pass of one layer of xLSTM-7B.

`--tiny` tries it with models and lengths of no meaning, on a CPU too.
"""

import argparse
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed import ProcessGroup

from benchmarks.command import Parser, run
from benchmarks.distributed_checks import (
    FLOOR,
    FULL,
    Error,
    Place,
    Sizes,
    check_fsdp,
    check_heads,
    check_slices,
    distance,
    layer_gradients,
    layer_pass,
    layer_with_input,
    load,
    own_slices,
    require,
    sharded,
    shared_folder,
    stop,
    tiny,
    write,
)
from benchmarks.ops import version
from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM
from modeling_xlstm.sequence_parallel import shard_sequence


COMMAND = "torchrun --nproc-per-node 2 -m benchmarks.distributed"


class Measured(NamedTuple):
    """Seconds of a call, how many tokens processes compute by it, and the peak of memory of a GPU in GiB."""

    seconds: float
    memory: float | None
    tokens: int | None = None  # if their rate is shown, and not the time

    @property
    def shown(self) -> float:
        return 1e3 * self.seconds if self.tokens is None else self.tokens / self.seconds


class Row(NamedTuple):
    """A line of the table: one GPU, if it has room for the call, and all."""

    what: str
    one: Measured | None
    many: Measured
    goal: float | None = None  # of two GPUs

    def line(self, world: int) -> str:
        ratio = 0.0
        if self.one is not None:
            ratio = self.many.shown / self.one.shown
            ratio = 1 / ratio if self.many.tokens is None else ratio
        memory = [f"{x.memory:.1f}" if x is not None and x.memory is not None else "-" for x in (self.one, self.many)]
        cells = [f"{self.what}, {'ms' if self.many.tokens is None else 'tokens/s'}"]
        cells += ["-" if x is None else f"{x.shown:.1f}" for x in (self.one, self.many)]
        cells += [f"{ratio:.2f}" if ratio else "-", f">= {self.goal}" if self.goal and world == 2 else "-"]
        return f"| {' | '.join([*cells, ', '.join(memory)])} |"


def measure(place: Place, call: Callable[[], object], group: ProcessGroup) -> Measured:
    """A call that the processes of a group begin together: the median of 7 after 3, of the slowest."""
    on_gpu, seconds = place.device == "cuda", list[float]()
    for i in range(10):
        if on_gpu and i == 3:
            torch.cuda.reset_peak_memory_stats()
        dist.barrier(group)
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(statistics.median(seconds[3:]), dtype=torch.float64, device=place.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
    return Measured(slowest.item(), torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None)


def on_all(place: Place, what: str, measured: Callable[[ProcessGroup], Any]) -> Any:
    place.say(f"{what}: {place.world} processes ...")
    result = measured(place.all)
    free()
    return result


def on_one(place: Place, what: str, measured: Callable[[ProcessGroup], Any]) -> Any:
    """In the first process, while the others wait; they have None."""
    place.say(f"{what}: one process ...")
    result = measured(place.alone) if place.rank == 0 else None
    free()
    dist.barrier()
    return result


def free() -> None:
    """The memory of models, which refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def new_model(place: Place, fields: dict[str, Any], dtype: torch.dtype) -> Any:
    """Of the shape of xLSTM-7B but for some fields, the same in all processes."""
    config = XLSTMConfig.preset("xlstm-7b", **{"eos_token_id": None, "pad_token_id": 1, **fields})
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(place.device):
        model = XLSTMForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def heads_seconds(place: Place, sizes: Sizes, path: Path, group: ProcessGroup) -> list[Measured]:
    """Of a token after others, and of a prompt."""
    model = load(place, path, torch.bfloat16, dist.get_world_size(group))
    ids = place.ids(1, sizes.prompt, model.config.vocab_size)
    few, many = (measure(place, partial(write, model, ids[:, :16], new), group) for new in sizes.written)
    token = (many.seconds - few.seconds) / (sizes.written[1] - sizes.written[0])
    with torch.no_grad():
        prompt = measure(place, partial(model, ids, logits_to_keep=1, use_cache=True), group)
    return [Measured(token, many.memory, 1), prompt]


def time_heads(place: Place, sizes: Sizes) -> list[Row]:
    what = "tensor parallelism, 7 B"
    with shared_folder(place, 16e9) as folder:
        if place.rank == 0:
            new_model(place, sizes.large, torch.bfloat16).save_pretrained(folder)
        free()
        dist.barrier()
        measured = partial(heads_seconds, place, sizes, folder)
        token, prompt = on_all(place, what, measured)
        token_of_one, prompt_of_one = on_one(place, what, measured) or (None, None)
    return [
        Row(f"{what}, one text", token_of_one, token, 1.5),
        Row(f"{what}, prompt of {sizes.prompt}", prompt_of_one, prompt, 1.7),
    ]


def step_seconds(
    place: Place, shape: dict[str, Any], ids: tuple[int, int], large: bool, keep: bool, group: ProcessGroup
) -> Measured:
    """Of training on so many rows in each process, and so long; a large model with gradient checkpointing."""
    model = new_model(place, shape, torch.float32)
    if large:
        model.gradient_checkpointing_enable()
    model = sharded(place, model, torch.bfloat16, keep, group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = place.ids(*ids, model.config.vocab_size)

    def step() -> None:
        model(input_ids=batch, labels=batch, skip_logits=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    measured = measure(place, step, group)
    return measured._replace(tokens=dist.get_world_size(group) * batch.numel())


def time_fsdp(place: Place, sizes: Sizes) -> list[Row]:
    few, fewer, length = sizes.rows
    what = f"FSDP2, 1.4 B, {few} x {length} a GPU"
    rows = []
    for keep, name in ((False, what), (True, f"{what}, weights kept")):
        middle = partial(step_seconds, place, sizes.middle, (few, length), False, keep)
        rows.append(Row(name, on_one(place, name, middle), on_all(place, name, middle), 1.85))
    what_large = f"FSDP2, 7 B, checkpointing, {fewer} x {length} a GPU"
    large = on_all(place, what_large, partial(step_seconds, place, sizes.large, (fewer, length), True, False))
    return [*rows, Row(what_large, None, large)]


def layer_error(place: Place, layer: Any, x: Tensor, dy: Tensor) -> Error:
    """Of slices from the whole, both in bfloat16: the largest of all gradients."""
    many, one = (layer_gradients(place, layer, x, dy, split) for split in (True, False))
    errors = [Error(name, distance(many[name], value), 4 * FLOOR[torch.bfloat16]) for name, value in one.items()]
    return max(errors, key=lambda error: error.used)


def time_slices(place: Place, sizes: Sizes) -> list[Row]:
    config = XLSTMConfig.preset("xlstm-7b", **sizes.large)
    layer, x, dy = layer_with_input(place, config, sizes.split, torch.bfloat16)
    what = f"sequence parallelism, a layer of the 7 B, 1 x {sizes.split}"
    place.say(f"{what}: gradients ...")
    require(place, what, layer_error(place, layer, x, dy))
    free()
    one = on_one(place, what, partial(measure, place, partial(layer_pass, layer, x, dy)))
    sharding = shard_sequence(layer)
    x, dy = own_slices(place, x, dy)  # alone, of which memory is to show
    many = on_all(place, what, partial(measure, place, partial(layer_pass, layer, x, dy)))
    sharding.remove()
    return [Row(what, one, many, 1.8)]


# command line

SECTIONS: dict[str, tuple[Callable[[Place, Sizes], None], Callable[[Place, Sizes], list[Row]]]] = {
    "tp": (check_heads, time_heads),
    "fsdp": (check_fsdp, time_fsdp),
    "sequence": (check_slices, time_slices),
}


class _Parser(Parser):
    def error(self, message: str) -> NoReturn:
        stop(f"{self.prog}: error: {message}", 2)


def build_parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog=COMMAND, description=__doc__, formatter_class=layout)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--tiny", action="store_true", help="small models and short texts, to try it")
    return parser


def start() -> Place:
    """On GPUs, if there is one for each process."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.device_count() >= world:
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    else:
        dist.init_process_group("gloo")
    alone, _ = dist.new_subgroups(1)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return Place(rank, world, device, alone, dist.group.WORLD)


def main() -> None:
    place = start() if "RANK" in os.environ else None
    parser = build_parser()
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"Sections are {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}.")
    if place is None or place.world < 2:
        stop(f"Two processes or more are compared with one: start them by `{COMMAND}`.")
    if not args.tiny and place.device == "cpu":
        found = torch.cuda.device_count()
        stop(f"{place.world} processes need a CUDA GPU each, and PyTorch finds {found} here; --tiny needs none.")
    names = [name for name in SECTIONS if name in (args.sections or SECTIONS)]
    heads = XLSTMConfig.preset("xlstm-7b").num_heads
    if not args.tiny and "tp" in names and heads % place.world:
        stop(f"The number of processes must divide the {heads} heads of xLSTM-7B, got {place.world}.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sizes = tiny(place.world) if args.tiny else FULL
    for name in names:
        SECTIONS[name][0](place, sizes)
    rows = [row for name in names for row in SECTIONS[name][1](place, sizes)]
    device = torch.cuda.get_device_name() if place.device == "cuda" else platform.machine()
    packages = [f"{x} {version(x)}" for x in ("torch", "triton", "transformers") if find_spec(x) is not None]
    N = place.world
    place.say(f"\n{N} x {device}, {', '.join(packages)}\n")
    place.say(f"| what | 1 GPU | {N} GPUs | ratio | goal | memory of a GPU, GiB (1, {N}) |\n|{'---|' * 6}")
    place.say("\n".join(row.line(place.world) for row in rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
