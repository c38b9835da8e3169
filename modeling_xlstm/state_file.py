"""The file of a saved state: safetensors, with what the state is of in the metadata."""

import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checks import is_finite


FORMAT = "xlstm-state-1"
DTYPES = {torch.float32: "F32", torch.float64: "F64"}  # as safetensors calls them


def write_state(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes finite tensors in full or not at all: whenever it is stopped, what was at `path` before is still there.

    Where `path` is a link, what it points to is replaced.

    Raises ValueError if a tensor is not finite, OSError if the file cannot be written.
    """
    _check_finite(tensors, "the cache")
    try:
        _replace(Path(os.path.realpath(path)), tensors, {"format": FORMAT, **metadata})
    except (OSError, SafetensorError) as error:  # the disk is full, for one
        raise OSError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.") from error


def _replace(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    exists = target.exists()
    if exists and not target.is_file():
        raise OSError("it is a folder or a device")
    partial = target.with_name(f".xlstm-state-{secrets.token_hex(8)}")
    partial.touch(exist_ok=False)
    try:
        mode = (target if exists else partial).stat().st_mode
        save_file(tensors, partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(mode)  # safetensors lets nobody else read
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read_state(
    path: str | os.PathLike,
    check: Callable[[dict[str, str]], None],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file that `write_state` wrote, opened once: what was checked is what is read.

    Args:
        check: Is given the metadata before anything else is read, and raises if they do not fit.
        shapes: By name, all that the file has to hold, without the axis of rows in front.

    Raises ValueError if the file is none that `write_state` wrote, broken, or holds something else than finite tensors
    of these `shapes` and `dtype`.
    """
    with _opened(path) as file:
        metadata = _metadata(file, path)
        check(metadata)
        tensors = _tensors(file, path, shapes, dtype)
    _check_finite(tensors, str(path))
    return metadata, tensors


def _metadata(file: Any, path: str | os.PathLike) -> dict[str, str]:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} must be a file written by XLSTMCache.save, got format {metadata.get('format')!r:.80}."
        )
    if not re.fullmatch("[0-9]{1,18}", metadata.get("seen_tokens", "")):
        raise ValueError(f"{path} must count the tokens of its text, got {metadata.get('seen_tokens')!r:.80}.")
    return metadata


def _tensors(
    file: Any, path: str | os.PathLike, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Tensor]:
    names = set(file.keys())
    if odd := sorted(names ^ shapes.keys()):
        got = odd[0] if odd[0] in names else f"no {odd[0]}"
        raise ValueError(f"{path} must hold the states of the model's layers and nothing else, got {got:.80}.")
    rows = None
    for name, shape in shapes.items():
        header = file.get_slice(name)
        got_shape = header.get_shape()
        rows = max(1, got_shape[0]) if rows is None and got_shape else rows
        if header.get_dtype() != DTYPES[dtype] or got_shape != [rows, *shape]:
            raise ValueError(
                f"{path} must hold {name} as {DTYPES[dtype]} of shape {[rows or 'rows', *shape]}, "
                f"got {header.get_dtype()} of shape {got_shape}."
            )
    # copies: what it gives out is the file itself, whatever becomes of that
    return {name: file.get_tensor(name).clone() for name in shapes}


def _opened(path: str | os.PathLike):
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} must be a file written by XLSTMCache.save, got a folder or a device.")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a file written by XLSTMCache.save, got one that is broken: {error}."
        ) from error


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, x in tensors.items():
        if x.numel() and not is_finite(x):
            raise ValueError(f"All states must be finite, got NaN or infinity in {name} of {where}.")
