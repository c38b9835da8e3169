"""Weights of a model that processes share, whose matrices may be several each, from and to those of a checkpoint.

A checkpoint may be of this package, its matrices in one, or in parts if it was distributed, or in Transformers' format.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import Concatenate
from transformers.modeling_utils import load_state_dict

from .checkpoint_xlstm import FUSED, SINGLE
from .configuration_xlstm import XLSTMConfig
from .parallel_plan import parts_of


FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls the dtypes of weights


@contextmanager
def opened(
    weights: Mapping[str, Any] | None, files: Sequence[str] | None, ranks: int
) -> Iterator[Mapping[str, Any]]:  # fmt: skip
    """Weights by name, as they are given, or of safetensors files that are read when a weight is indexed.

    Raises ValueError if a file is of another format, all of which would have to be read, and processes share heads.
    """
    if weights is not None:
        yield weights
        return
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for path in files or ():
            if not str(path).endswith(".safetensors"):
                if ranks > 1:
                    raise ValueError(f"A checkpoint for tensor parallelism must be of safetensors files, got {path}.")
                found |= load_state_dict(path)
                continue
            file = stack.enter_context(safe_open(path, framework="pt"))
            found |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        yield found


def dtypes_of(files: Iterable[str]) -> dict[str, str]:
    """By name, the dtypes of the weights in safetensors files, in their words.

    Raises ValueError if a file is broken, or a weight is in two, of which Transformers would take the second; OSError
    if a file is none.
    """
    dtypes: dict[str, str] = {}
    for path in files:
        if not Path(path).is_file():
            raise OSError(f"The weights must be in files, got {path}, which is none.")
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, it is no dict
        except SafetensorError as error:
            raise ValueError(f"The weights in {path} cannot be read: {error}.") from error
        if twice := found.keys() & dtypes.keys():
            raise ValueError(f"Each weight must be in one file, got {min(twice)} in {path} and in another.")
        dtypes |= found
    return dtypes


def without_converters(load_config: Any) -> Any:
    """What `from_pretrained` is to do, but for what `split_weights` and `whole_weights` do in its place."""
    mapping = [x for x in load_config.weight_mapping or () if not _joins(x)]
    return dataclasses.replace(load_config, weight_mapping=mapping)


def _joins(transform: Any) -> bool:
    return any(isinstance(operation, Concatenate) for operation in getattr(transform, "operations", ()))


class _View:
    """A tensor that is read where it is indexed, and no more of it than that."""

    def get_shape(self) -> list[int]:
        raise NotImplementedError

    def read(self, ranges: list[slice]) -> Tensor:
        """Of `ranges`, one for each axis."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Tensor:
        ranges = [slice(0, size) for size in self.get_shape()]
        for i, given in enumerate(index if isinstance(index, tuple) else (index,)):
            if given is not Ellipsis:
                ranges[i] = slice(*given.indices(self.get_shape()[i])[:2])
        return self.read(ranges)


class _Piece(_View):
    """A part of a tensor along an axis."""

    def __init__(self, source: Any, dim: int, start: int, size: int):
        self.source, self.dim, self.start, self.size = source, dim, start, size

    def get_shape(self) -> list[int]:
        shape = _shape(self.source)
        shape[self.dim] = self.size
        return shape

    def read(self, ranges: list[slice]) -> Tensor:
        wanted = ranges[self.dim]
        ranges[self.dim] = slice(self.start + wanted.start, self.start + wanted.stop)
        return self.source[tuple(ranges)]


class _Joined(_View):
    """Tensors one after the other along an axis."""

    def __init__(self, sources: list[Any], dim: int):
        self.sources, self.dim = sources, dim

    def get_shape(self) -> list[int]:
        shape = _shape(self.sources[0])
        shape[self.dim] = sum(_shape(x)[self.dim] for x in self.sources)
        return shape

    def read(self, ranges: list[slice]) -> Tensor:
        wanted, end = ranges[self.dim], 0
        pieces: list[Tensor] = []
        for source in self.sources:
            start, end = end, end + _shape(source)[self.dim]
            inside = slice(max(wanted.start, start) - start, max(min(wanted.stop, end) - start, 0))
            if inside.start < inside.stop or not pieces:  # one at least, of which nothing may be wanted
                pieces.append(source[tuple(inside if i == self.dim else x for i, x in enumerate(ranges))])
        return torch.cat(pieces, self.dim)


def _shape(x: Any) -> list[int]:
    return list(x.shape if isinstance(x, Tensor) else x.get_shape())


def split_weights(weights: Mapping[str, Any], config: XLSTMConfig) -> dict[str, Any]:
    """Names and weights of a model whose projections are split, from those of a checkpoint, read when needed."""
    parts = parts_of(config)
    modules = {f".{module}.": module for module in parts}
    renamed = {}
    if config.mlstm_block == "post_up":  # of which Transformers' format is
        modules |= {f".{name}.": module for module, name in FUSED.items()}
        renamed = {
            f".{name}.": f".{module}.{part}."
            for module, entry in SINGLE.items()
            for name, part in zip(entry[1:], parts[module].names, strict=True)
        }
    result: dict[str, Any] = {}
    for name, x in weights.items():
        stem, kind = name[: name.rfind(".") + 1], name[name.rfind(".") + 1 :]
        prefix, module = next(
            ((stem[: -len(end)], to) for end, to in modules.items() if stem.endswith(end)), (None, "")
        )
        if single := next((end for end in renamed if stem.endswith(end)), None):
            result[stem[: -len(single)] + renamed[single] + kind] = x
        elif prefix is None or (kind == "bias" and parts[module].dim):
            result[name] = x
        else:
            dim, start = parts[module].dim, 0
            for part, size in zip(parts[module].names, parts[module].sizes(_shape(x)[dim]), strict=True):
                result[f"{prefix}.{module}.{part}.{kind}"] = _Piece(x, dim, start, size)
                start += size
    return result


def whole_weights(weights: Mapping[str, Any], config: XLSTMConfig) -> dict[str, Any]:
    """The same of a model whose projections are not split."""
    return _joined(split_weights(weights, config), config, _Joined)


def join_weights(weights: dict[str, Tensor], config: XLSTMConfig) -> dict[str, Tensor]:
    """The opposite of `split_weights`: matrices in one, as they are saved. `weights` is emptied of what is joined."""
    return _joined(weights, config, torch.cat)


def _joined(weights: dict[str, Any], config: XLSTMConfig, join: Callable[[list[Any], int], Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for module, parts in parts_of(config).items():
        first = f".{module}.{parts.names[0]}."
        for name in [name for name in weights if first in name]:
            prefix, _, kind = name.partition(first)
            names = [f"{prefix}.{module}.{part}.{kind}" for part in parts.names]
            if missing := [x for x in names if x not in weights]:
                raise ValueError(f"A checkpoint that holds {name} must hold {missing[0]} too, got none.")
            pieces = [weights.pop(x) for x in names]
            result[f"{prefix}.{module}.{kind}"] = join(pieces, parts.dim)
    return result | weights
