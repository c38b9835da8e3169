"""What the Triton kernels of the mLSTM need of a GPU: `python -m benchmarks.resources [--arch 90] [K V ...]`.

Compiles every kernel of a forward and a backward pass for a compute capability and prints registers, bytes of stack
(spilled registers), shared memory, and instructions for tensor cores. Needs triton, but no GPU, and `cuobjdump`, which
wheels of Triton bring.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from modeling_xlstm import mlstm_triton


CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}  # bytes that a program may have


def usage(kernel) -> str:
    """A line on a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    ptx = kernel.asm["ptx"]
    products = ptx.count("wgmma.mma_async") + ptx.count("mma.sync")
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    return f"{registers:>4} registers {stack:>5} stack {shared:>7} shared {warps:>3} warps {products:>4} products"


def compile_only(run: Callable) -> Callable:
    """In place of a launch."""

    def launch(function: JITFunction, *args, warmup: bool, **options) -> None:
        kernel = run(function, *args, warmup=True, **options)
        print(f"  {function.fn.__name__:32}{usage(kernel)}", flush=True)

    return launch


def report(K: int, V: int, dtype: torch.dtype) -> None:
    """Compiles the kernels for heads of K and V, for tensors that have no data."""
    print(f"heads of {K} and {V}, {str(dtype).removeprefix('torch.')}")
    q, k, v, h = (torch.empty(2, 300, 8, size, dtype=dtype, device="meta") for size in (K, K, V, V))
    igate, fgate = torch.empty(2, 2, 300, 8, device="meta").unbind()
    state, options = (None, None, None), (False, None, 1e-6)
    *_, tokens, source, chunks, C, n = mlstm_triton._forward(q, k, v, igate, fgate, *state, None, *options)
    kept = (h, tokens, source, chunks, C, n, False)
    mlstm_triton._backward_pass(h, *state, q, k, v, igate, fgate, None, *kept, *options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=[256, 512, 128, 256], help="pairs of head sizes K V")
    parser.add_argument("--arch", type=int, default=90, choices=SHARED_MEMORY, help="compute capability (default: 90)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    args = parser.parse_args()
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", args.arch, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    with (
        mock.patch.object(JITFunction, "run", compile_only(JITFunction.run)),
        mock.patch.object(mlstm_triton, "shared_memory", return_value=SHARED_MEMORY[args.arch]),
    ):
        for K, V in zip(args.sizes[::2], args.sizes[1::2], strict=True):
            report(K, V, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
