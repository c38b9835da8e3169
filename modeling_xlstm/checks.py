"""Input validation shared by the public ops: a sentence with what, got and expected. Kernels need no asserts."""

import contextlib
from itertools import pairwise

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .custom_op import is_compiling


AS_IT_IS = contextlib.nullcontext()
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHECKED = WeakIdKeyDictionary()  # boundaries of packed sequences: their version, and the number of tokens


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states and accumulation for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(gates: torch.Tensor, R: torch.Tensor) -> torch.dtype:
    """In which Triton's kernels multiply recurrent weights R and h: of gates and R the dtype of fewer bits, of half
    precisions that of gates."""
    return R.dtype if gates.dtype == torch.float32 and R.dtype.itemsize == 2 else gates.dtype


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on there. PyTorch has none of the meta device, and raises."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """A context without autocast: what is computed inside keeps the dtypes that it is written in."""
    if autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return AS_IT_IS


def is_finite(x: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite. Forty times faster for bfloat16 on a CPU than asking each element."""
    low, high = torch.aminmax(x)  # NaN if there is one
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_float(name: str, x: torch.Tensor, dims: str) -> None:
    """`x` is a floating point tensor whose axes are `dims`, a string such as `"B T H K"`; axes are not empty."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor [{dims}], got {type(x).__name__}.")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}.")
    if x.dim() != len(dims.split()):
        raise ValueError(f"{name} must have the {len(dims.split())} axes [{dims}], got shape {tuple(x.shape)}.")
    if 0 in x.shape:
        raise ValueError(f"{name} [{dims}] must not have an empty axis, got shape {tuple(x.shape)}.")


def check_like(name: str, x: torch.Tensor, shape: tuple, device: torch.device, dtypes: tuple = FLOATS) -> None:
    """`x` is a tensor of exactly `shape`, on `device`, with one of `dtypes`."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of shape {tuple(shape)}, got {type(x).__name__}.")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}.")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(str(d) for d in dtypes)}, got {x.dtype}.")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like the other inputs, got {x.device}.")


def check_same_dtype(**tensors: torch.Tensor) -> None:
    """All tensors share one dtype."""
    dtypes = {name: x.dtype for name, x in tensors.items()}
    if len(set(dtypes.values())) > 1:
        got = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"{', '.join(tensors)} must have one dtype, got {got}.")


def check_sequence(batch: int, time: int, device: torch.device, mask, cu_seqlens) -> int:
    """Padding mask and packed boundaries fit a `[batch, time]` input. Returns how many sequences that is."""
    if mask is not None:
        check_like("mask", mask, (batch, time), device, (torch.bool,))
    if cu_seqlens is None:
        return batch
    if mask is not None:
        raise ValueError("mask and cu_seqlens exclude each other: packed sequences have no padding.")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs packed inputs with a batch of 1, got a batch of {batch}.")
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 tensor [N + 1], got {got}.")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must have shape [N + 1] with N >= 1, got {tuple(cu_seqlens.shape)}.")
    if not is_compiling():
        _check_bounds(cu_seqlens, time)
    return cu_seqlens.numel() - 1


def _check_bounds(cu_seqlens: torch.Tensor, time: int) -> None:
    """Each tensor once for all layers, as a GPU is waited for."""
    checked = None if cu_seqlens.is_inference() else (cu_seqlens._version, time)
    if checked is not None and _CHECKED.get(cu_seqlens) == checked:
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != time or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {time}, got {bounds}.")
    if checked is not None:
        _CHECKED[cu_seqlens] = checked


def as_int32(cu_seqlens: torch.Tensor, time: int) -> torch.Tensor:
    """Boundaries that `check_sequence` has checked, so that no layer looks at them again."""
    bounds = cu_seqlens.to(torch.int32)
    if not is_compiling() and not bounds.is_inference():
        _CHECKED[bounds] = (bounds._version, time)
    return bounds


def rising(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Boundaries in int64 that rise within the tokens, which a compiled caller has not checked."""
    bounds, _ = cu_seqlens.to(torch.int64).clamp(0, tokens).cummax(0)
    return bounds
