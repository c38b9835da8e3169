"""Writing a checkpoint that is either there in full or not at all."""

import contextlib
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .errors import ConversionError, one_line


LOCK = ".lock"


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `destination` if the block ends without an error, else is deleted.

    It stands beside the destination, and all that is in it reaches the disk before it gets its name. What a conversion
    that was killed left of its own is deleted first; one that is running keeps its folder by a lock.

    Raises ConversionError if the destination is not new or empty, before the block as after it.
    """
    check_new(destination)
    destination = Path(os.path.abspath(destination))
    parent = destination.parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.partial-"
    for left in parent.glob(f"{glob.escape(prefix)}*"):
        if left.is_dir() and not left.is_symlink():
            remove_abandoned(left, destination)
    folder = parent / f"{prefix}{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        with FileLock(folder / LOCK):
            yield folder
            check_new(destination)
            sync(folder)
            os.replace(folder, destination)
            (destination / LOCK).unlink()
        sync_folder(parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            check_new(destination)  # filled meanwhile
        raise
    finally:
        with contextlib.suppress(OSError):  # it has become the destination, for one
            remove(folder)


def check_new(destination: Path) -> None:
    """Raises ConversionError unless the destination is missing or an empty folder, and not the one worked in."""
    link, there = destination.is_symlink(), destination.exists()
    if link or (there and not (destination.is_dir() and not any(destination.iterdir()))):
        raise ConversionError(f"The destination must be new or an empty folder, got {destination}.")
    if there and destination.samefile(Path.cwd()):  # it would be replaced under the feet of whoever stands there
        raise ConversionError(f"The destination must not be the working directory, got {destination}.")


def remove_abandoned(folder: Path, destination: Path) -> None:
    """Deletes what is left of a conversion that was killed. Raises ConversionError if that conversion is running."""
    if not (folder / LOCK).is_file():  # being made or being deleted by another
        return
    try:
        with FileLock(folder / LOCK, timeout=0):
            remove(folder)
    except Timeout:
        raise ConversionError(f"Another conversion to {destination} is running; wait for its end.") from None


def remove(folder: Path) -> None:
    """Deletes a folder, and its lock last, which until then tells the next conversion that the rest may go."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    shutil.rmtree(folder)


def sync(folder: Path) -> None:
    """Waits until every file in the folder, and in those below it, is on the disk."""
    for path in folder.iterdir():
        if path.is_dir():
            sync(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Shards:
    """Which weight goes to which file."""

    def __init__(self, meta: Mapping[str, Tensor], fmt: str, max_shard_size: int | str):
        split = split_torch_state_dict_into_shards(dict(meta), max_shard_size=max_shard_size)
        files = list(split.filename_to_tensors)
        if fmt.startswith("xlstm-large") and len(files) > 1:  # its loader counts, and reads no index
            names = {file: f"model_{i}.safetensors" for i, file in enumerate(files)}
        else:
            names = {file: file for file in files}
        self.files = {names[file]: weights for file, weights in split.filename_to_tensors.items()}
        self.file_of = {weight: names[file] for weight, file in split.tensor_to_filename.items()}
        self.size: int = split.metadata["total_size"]
        self.parameters = sum(weight.numel() for weight in meta.values())

    @property
    def index(self) -> dict | None:
        """What `model.safetensors.index.json` must say, None where there is none."""
        if len(self.files) == 1 or "model_0.safetensors" in self.files:
            return None
        metadata = {"total_parameters": self.parameters, "total_size": self.size}
        return {"metadata": metadata, "weight_map": dict(sorted(self.file_of.items()))}

    def write(self, weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
        """Writes each file as soon as its last weight has come, and forgets it."""
        waiting: dict[str, dict[str, Tensor]] = {}
        with tqdm(total=self.size, unit="B", unit_scale=True, desc="Converting", disable=None) as bar:
            for name, weight in weights:
                file = self.file_of[name]
                shard = waiting.setdefault(file, {})
                shard[name] = weight
                if len(shard) == len(self.files[file]):
                    try:
                        save_file(waiting.pop(file), folder / file, metadata={"format": "pt"})
                    except SafetensorError as error:  # the disk is full, for one
                        raise ConversionError(f"{file} cannot be written: {one_line(error)}.") from error
                    with (folder / file).open("rb") as written:
                        os.fsync(written.fileno())
                bar.update(weight.nbytes)
