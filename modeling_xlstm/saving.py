"""A model saved where there is another: whenever that is stopped, the folder holds the one, the other, or none that
loads."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


STAGE = ".saving-"


@contextmanager
def replaced(folder: str | os.PathLike, variant: str | None) -> Iterator[str]:
    """Where to save a model that is to be in a folder: in the folder itself if that holds none, else beside the other,
    whose place it takes at the end. An error before that leaves the other as it was.

    Transformers writes the configuration first, which would then be read with the weights from before.
    """
    to = Path(folder)
    found_by = [_of_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    if not any((to / name).is_file() for name in (CONFIG_NAME, *found_by)):
        yield str(folder)
        return
    for left in to.glob(f"{STAGE}*"):  # by a process that was killed
        shutil.rmtree(left)
    stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=to))
    try:
        yield str(stage)
        names = sorted((path.name for path in stage.iterdir()), key=lambda name: name in found_by)
        for name in found_by:  # without which nothing loads
            (to / name).unlink(missing_ok=True)
        for shard in to.glob(_of_variant(SAFE_WEIGHTS_NAME, variant).replace(".safetensors", "-*-of-*.safetensors")):
            if shard.name not in names:
                shard.unlink()
        for name in names:
            os.replace(stage / name, to / name)
    finally:
        shutil.rmtree(stage)


def _of_variant(name: str, variant: str | None) -> str:
    """What Transformers calls a file of weights, or their index, of a variant."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"
