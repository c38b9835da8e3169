"""What the Triton kernels of the mLSTM need of a GPU: `python -m benchmarks.resources [--arch 90] [K V ...]`.

Compiles every kernel of a forward and a backward pass for a compute capability and prints registers, bytes of stack
(spilled registers), shared memory, and instructions for tensor cores. Needs triton, but no GPU, and `cuobjdump`, which
wheels of Triton bring.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from benchmarks.command import command_line, integer, run, show


EXAMPLES = """examples:
  python -m benchmarks resources 64 64 --arch 80
"""
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}  # bytes that a program may have


def cuobjdump() -> Path | None:
    """The program that says what a compiled kernel needs, if triton is here and has it."""
    spec = find_spec("triton")
    path = Path(spec.origin if spec and spec.origin else "").parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.is_file() else None


def usage(kernel) -> str:
    """A line on a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(cuobjdump()), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", report)[0]
    ptx = kernel.asm["ptx"]
    products = ptx.count("wgmma.mma_async") + ptx.count("mma.sync")
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    return f"{registers:>4} registers {stack:>5} stack {shared:>7} shared {warps:>3} warps {products:>4} products"


def compile_only(launch: Callable) -> Callable:
    """In place of a launch."""

    def compile_one(function: Any, *args, warmup: bool, **options) -> None:
        kernel = launch(function, *args, warmup=True, **options)
        show(f"  {function.fn.__name__:32}{usage(kernel)}")

    return compile_one


def report(K: int, V: int, dtype: torch.dtype) -> None:
    """Compiles the kernels for heads of K and V, for tensors that have no data."""
    from modeling_xlstm import mlstm_triton  # here, as it needs triton

    show(f"heads of {K} and {V}, {str(dtype).removeprefix('torch.')}")
    q, k, v, h = (torch.empty(2, 300, 8, size, dtype=dtype, device="meta") for size in (K, K, V, V))
    igate, fgate = torch.empty(2, 2, 300, 8, device="meta").unbind()
    state, options = (None, None, None), (False, None, 1e-6)
    *_, tokens, source, chunks, C, n = mlstm_triton._forward(q, k, v, igate, fgate, *state, None, *options)
    kept = (h, tokens, source, chunks, C, n, False)
    mlstm_triton._backward_pass(h, *state, q, k, v, igate, fgate, None, *kept, *options)


def build_parser() -> argparse.ArgumentParser:
    parser = command_line("resources", __doc__, EXAMPLES)
    add = parser.add_argument
    add("sizes", nargs="*", type=integer(1), default=[256, 512, 128, 256], metavar="K V", help="pairs of head sizes")
    add("--arch", type=int, default=90, choices=SHARED_MEMORY, help="compute capability (%(default)s)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the inputs (%(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if len(args.sizes) % 2:
        parser.error(f"argument K V: must be pairs of head sizes, got {len(args.sizes)} numbers")
    if cuobjdump() is None:
        sys.exit("Kernels are compiled by triton, with the cuobjdump of its wheels for Linux: one of them is not here.")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from modeling_xlstm import mlstm_triton

    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", args.arch, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    pairs = list(zip(args.sizes[::2], args.sizes[1::2], strict=True))
    with (
        mock.patch.object(JITFunction, "run", compile_only(JITFunction.run)),
        mock.patch.object(mlstm_triton, "shared_memory", return_value=SHARED_MEMORY[args.arch]),
    ):
        for K, V in tqdm(pairs, "heads", disable=None):
            report(K, V, getattr(torch, args.dtype))


if __name__ == "__main__":
    run(main)
