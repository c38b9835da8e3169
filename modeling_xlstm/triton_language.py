"""Triton, or a sentence that says why the kernels cannot do without it, and what launchers of kernels share."""

import torch

from .backends import gpu_properties


try:  # in a `try`, so that Transformers does not ask for it when it downloads this file to a machine without a GPU
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError("the kernels need the package triton, version 3.6 or later.") from error

__all__ = [
    "TensorDescriptor",
    "blocks_of",
    "chain_options",
    "chains",
    "gdc_launch_dependents",
    "gdc_wait",
    "globaltimer",
    "power_of_2",
    "processors",
    "rows_of",
    "shared_memory",
    "tl",
    "triton",
]


# Triton's own `cdiv` and `next_power_of_2` cost five microseconds a call outside of kernels; a launch costs thirty.


def blocks_of(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (size - 1).bit_length()


def rows_of(x: torch.Tensor, width: int) -> torch.Tensor:
    """`[B, T, ...]` as `[R, width]` with the last axis contiguous: a view where there is one."""
    x = x.reshape(-1, width)
    return x if x.stride(-1) == 1 else x.contiguous()


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a CPU has none."""
    return gpu_properties(device).multi_processor_count if device.type == "cuda" else 0


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have on this device."""
    if device.type != "cuda":
        return 0
    return gpu_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def chains(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it has ended ("programmatic dependent launch")."""
    return device.type == "cuda" and gpu_properties(device).major >= 9


def chain_options(chained: bool) -> dict[str, bool]:
    """What a kernel is launched with that may start early, or may not."""
    return {"CHAINED": True, "launch_pdl": True} if chained else {"CHAINED": False}
