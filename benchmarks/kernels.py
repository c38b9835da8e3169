"""Single Triton kernels of the mLSTM: `python -m benchmarks.kernels [--shape B T H K V] [--set FIELD=A,B,...]`.

Prints for each kernel of a forward and a backward pass the median over runs in milliseconds, as PyTorch's profiler has
it, so without gaps between kernels, and their sums. `--set` changes how work is cut (a field of `mlstm_triton._Blocks`)
and may be given for several variants: each is one comma-separated list, and all combinations are timed. A variant whose
h or gradients, of 600 tokens, are not those of PyTorch in float32 gets a sentence instead of numbers.
"""

import argparse
import itertools
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.command import command_line, integer, run, show
from modeling_xlstm import mlstm_chunkwise


EXAMPLES = """on a GPU:
  python -m benchmarks kernels
  python -m benchmarks kernels --shape 1 131072 8 256 512 --set scores=64,4,3 --set scores=64,4,4
"""
RUNS = 12
MOST_ERROR = 0.02  # of the norm; rounding to bfloat16 is a few thousandths


def kernel_times(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each kernel that `run` launches, in order; those launched several times are numbered."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(RUNS):
            run()
        torch.cuda.synchronize()
    launches = defaultdict(list)
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            launches[event.name].append(event.device_time / 1e3)
    times = {}
    for name, each in launches.items():
        count = len(each) // RUNS
        for i in range(count):
            label = name.removesuffix("_kernel")[:40] + (f" {i + 1}" if count > 1 else "")
            times[label] = statistics.median(each[i::count])
    return times


def inputs(B: int, T: int, H: int, K: int, V: int) -> list[Tensor]:
    """q, k, v, both gates, and a gradient of h."""
    q, k, v, dh = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for D in (K, K, V, V))
    igate, fgate = torch.randn(2, B, T, H, device="cuda") + torch.tensor([-3, 4.5], device="cuda")[:, None, None, None]
    return [q, k, v, igate, fgate, dh]


def largest_error(H: int, K: int, V: int) -> float:
    """Of h and all gradients, by the norm. The inputs are always the same, with normalisers that do not cancel: where
    one does, or meets its bound to within rounding, errors have no limit."""
    torch.manual_seed(0)
    q, k, *x, dh = inputs(2, 600, H, K, V)
    x = [q.abs(), k.abs(), *x]
    results = []
    for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in x]
        q, k, v, igate, fgate = leaves
        h, _ = mlstm_chunkwise(q, k, v, igate, fgate, backend=backend)
        results.append([h, *torch.autograd.grad(h, leaves, dh.to(dtype))])
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))


def measure(B: int, T: int, H: int, K: int, V: int, cut: dict[str, Any]) -> dict[str, float]:
    from modeling_xlstm import mlstm_triton  # here, as it needs triton

    *x, dh = inputs(B, T, H, K, V)
    state, options = (None, None, None), (False, None, 1e-6)
    blocks = mlstm_triton._blocks(x[0], V)
    for field, value in cut.items():
        if np.size(value) != np.size(getattr(blocks, field)):
            raise ValueError(f"{field} must have values like {getattr(blocks, field)}, got {value}.")
    blocks = blocks._replace(**cut)
    if max(blocks.combine[3], blocks.d_combine[3]) > blocks.BS:
        raise ValueError(f"Products take at most a block of scores at once, {blocks.BS} tokens, got {cut}.")
    with mock.patch.object(mlstm_triton, "_blocks", return_value=blocks):
        error = largest_error(H, K, V)
        if not error <= MOST_ERROR:
            raise ArithmeticError(f"the largest relative error is {error:.3g}, more than {MOST_ERROR}.")

        def forward():
            return mlstm_triton._forward(*x, *state, None, *options)

        h, *_, tokens, source, chunks, C, n = forward()
        kept = (h, tokens, source, chunks, C, n, False)

        def backward():
            return mlstm_triton._backward_pass(dh, *state, *x, None, *kept, *options)

        return kernel_times(forward) | {f"{name} (backward)": ms for name, ms in kernel_times(backward).items()}


def cut_of(text: str) -> tuple[str, tuple[int, ...]]:
    """An argparse type: a field and its values."""
    field, _, values = text.partition("=")
    try:
        return field, tuple(map(int, values.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be FIELD=A,B,... with integers, got {text}") from None


def build_parser() -> argparse.ArgumentParser:
    parser = command_line("kernels", __doc__, EXAMPLES)
    shape: dict[str, Any] = {"type": integer(1), "default": [4, 8192, 8, 256, 512], "metavar": tuple("BTHKV")}
    parser.add_argument("--shape", nargs=5, **shape, help="batch, time, heads and their sizes (7B, 8192 tokens)")
    parser.add_argument("--set", action="append", type=cut_of, default=[], metavar="FIELD=A,B,...", help="a variant")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("Kernels are measured on a CUDA GPU, and PyTorch finds none here.")
    if find_spec("triton") is None:
        sys.exit("Kernels are compiled by triton, which is not installed.")
    from triton import OutOfResources

    from modeling_xlstm.mlstm_triton import _Blocks

    choices = defaultdict(list)
    for field, sizes in args.set:
        if field not in _Blocks._fields:
            parser.error(f"argument --set: fields are {', '.join(_Blocks._fields)}, got {field}")
        choices[field].append(sizes[0] if len(sizes) == 1 else sizes)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "shape", args.shape)
    for values in tqdm(list(itertools.product(*choices.values())), "variants", disable=None):
        cut: dict[str, Any] = dict(zip(choices, values, strict=True))
        try:
            B, T, H, K, V = args.shape
            times = measure(B, T, H, K, V, cut)
        except (ArithmeticError, ValueError, OutOfResources) as error:
            show(f"{cut or 'as it is'}: no speed without correct results: {error}")
            continue
        backward = sum(ms for name, ms in times.items() if name.endswith("(backward)"))
        show(f"{cut or 'as it is'} forward {sum(times.values()) - backward:.3f} backward {backward:.3f}")
        for name, ms in times.items():
            show(f"  {name:56}{ms:.3f}")


if __name__ == "__main__":
    run(main)
