"""The file of a saved state: safetensors, with what the state is of in the metadata."""

import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checks import is_finite


FORMAT = "xlstm-state-1"
DTYPES = {torch.float32: "F32", torch.float64: "F64"}  # as safetensors calls them


def write_state(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes finite tensors in full or not at all: whenever it is stopped, what was at `path` before is still there.

    Raises ValueError if a tensor is not finite, OSError if the file cannot be written.
    """
    _check_finite(tensors, "the cache")
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        save_file(tensors, partial, metadata={"format": FORMAT, **metadata})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except SafetensorError as error:  # the disk is full, for one
        raise OSError(f"{path} cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a file that `write_state` wrote. Raises ValueError if it is no such file, or broken."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} must be a file written by XLSTMCache.save, got format {metadata.get('format')!r:.80}."
        )
    if not re.fullmatch("[0-9]{1,18}", metadata.get("seen_tokens", "")):
        raise ValueError(f"{path} must count the tokens of its text, got {metadata.get('seen_tokens')!r:.80}.")
    return metadata


def read_tensors(
    path: str | os.PathLike, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of the file, which are those in `shapes`, of `dtype`, with an axis of rows in front, and finite.

    Raises ValueError if they are not.
    """
    with _opened(path) as file:
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
        tensors = {name: file.get_tensor(name) for name in shapes}
    _check_finite(tensors, str(path))
    return tensors


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
