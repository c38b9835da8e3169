"""Faults at every point: what was there stays whole, what is half-written is never taken for whole, and the next run
ends as if nothing had been.

`faulty.py` says which faults there are. Of their points, `make test` takes a few, `make torture` all.
"""

import itertools
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from faulty import NOT_HERE, End, Faulty, Operations, digests, no_memory
from hub import FINE, HALF, NO_ANSWER, STALLED, Hub
from models import TWO_KINDS, random_ids, randomise, tiny_model
from test_generation import letters_tokenizer
from torch import Tensor, nn
from torture import TORTURE, tried, tries

import modeling_xlstm
from modeling_xlstm import XLSTMCache, XLSTMForCausalLM


ROOT = Path(__file__).parents[1]
DEMO = ROOT / "checkpoints" / "xlstm-demo"
PACKAGE = Path(modeling_xlstm.__file__).parent
CACHES = {f"{PACKAGE}/{name}_xlstm.py" for name in ("cache", "generation", "modeling")}  # the code that handles them
SHARDS = "--to", "transformers", "--max-shard-size", "60KB"
DISKS = {"pages": 60, "files": 15, "nothing": 1}  # that are left for a conversion, which is done with fewer
LASTING = ("full", "read-only", "broken")
TIMEOUTS = "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"
HOW = ("kill", "cut", "interrupt", *LASTING) if TORTURE else ("kill", "full")


def some(count: int, few: int, many: int = sys.maxsize) -> list[int]:
    """So many of the points from 0 to `count`, among them the last."""
    points = min(tries(few, many), count)
    return sorted({*random.Random(count).sample(range(count), points - 1), count - 1})


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module", autouse=True)
def faulty(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """Starts, which takes seconds, while the first tests run."""
    environment = {**hub.environment(tmp_path_factory.mktemp("cache")), **dict.fromkeys(TIMEOUTS, "1")}
    with Faulty(tmp_path_factory.mktemp("jobs"), environment) as faulty:
        yield faulty


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)  # type: ignore[operator]
    return folder


# Passes that are stopped: at an operation of PyTorch for want of memory, at a line of the package by Ctrl-C.


class Lines:
    """Counts the lines in the files of `CACHES` that are run inside; before number `at` it raises KeyboardInterrupt."""

    def __init__(self, at: int = -1):
        self.at, self.count = at, 0

    def __enter__(self) -> "Lines":
        self.before = sys.gettrace()
        sys.settrace(self.enters)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def enters(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self.line if frame.f_code.co_filename in CACHES else None

    def line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            count, self.count = self.count, self.count + 1
            if count == self.at:
                raise KeyboardInterrupt
        return self.line


STOPS: dict[str, tuple[Callable[[int], Any], type[BaseException]]] = {
    "for want of memory": (lambda at: Operations(at, no_memory()), torch.OutOfMemoryError),
    "by Ctrl-C": (Lines, KeyboardInterrupt),
}


class Watched(XLSTMCache):
    """A cache that knows all that it has been when it said that it was whole."""

    def __init__(self, *args: Any):
        self.past: list[dict[str, Any]] = []
        super().__init__(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "is_broken" and not value and hasattr(self, "seen_tokens"):
            self.past.append(snapshot(self))


def snapshot(cache: XLSTMCache) -> dict[str, Any]:
    """All that a pass starts from, and what can be taken back."""
    states = [layer.state for layer in cache.layers]
    return {
        "seen": cache.get_seq_length(),
        "recorded": [record.tokens for record in cache.records],
        "empty": [layer.is_empty for layer in cache.layers],
        **{
            f"{i}.{name}": x.detach().clone()
            for i, state in enumerate(states)
            if state is not None
            for name, x in state.tensors().items()
        },
    }


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(x, other[name]) if isinstance(x, Tensor) else x == other[name] for name, x in one.items()
    )


TEXT = random_ids(2, 9)
MORE = random_ids(2, 12, seed=1)
WHOLE = torch.cat((TEXT, MORE), 1)
Use = Callable[[Any, XLSTMCache, Path], object]
USES: dict[str, Use] = {
    "reads": lambda model, cache, _: model(MORE[:, :5], past_key_values=cache),
    "reads a token": lambda model, cache, _: model(MORE[:, :1], past_key_values=cache),
    "reads in pieces": lambda model, cache, _: model(MORE, past_key_values=cache, logits_to_keep=1),
    "generates": lambda model, cache, _: model.generate(WHOLE, past_key_values=cache, max_new_tokens=2),
    "takes back": lambda model, cache, _: cache.crop(-3),
    "reorders": lambda model, cache, _: cache.reorder_cache(torch.tensor([1, 0])),
    "repeats": lambda model, cache, _: cache.batch_repeat_interleave(2),
    "selects": lambda model, cache, _: cache.batch_select_indices(torch.tensor([1])),
    "resets": lambda model, cache, _: cache.reset(),
    "forks": lambda model, cache, _: cache.fork(2),
    "saves": lambda model, cache, folder: cache.save(folder / "state", model),
}


def cache_of(model: nn.Module) -> Watched:
    """Has read `TEXT`, of which the last 4 tokens can be taken back."""
    cache = Watched(model.config)
    model(TEXT[:, :5], past_key_values=cache)
    cache.activate_past_recording()
    model(TEXT[:, 5:], past_key_values=cache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_KINDS)
@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize("use", USES)
def test_a_cache_whose_use_is_stopped_anywhere_is_whole_or_says_that_it_is_not(use, how, kind, tmp_path, monkeypatch):
    """A whole one is as it was, or as it was at some time without the stop; a reset makes one of any other."""
    monkeypatch.setattr("modeling_xlstm.modeling_xlstm.PIECE", 8)
    model, (stop, error) = tiny_model(kind), STOPS[how]
    undisturbed, expected = cache_of(model), model(WHOLE, use_cache=False).logits
    USES[use](model, undisturbed, tmp_path)
    legal = [*undisturbed.past[1:], snapshot(undisturbed)]
    with stop(-1) as counted:
        USES[use](model, cache_of(model), tmp_path)
    with stop(-1) as before:
        cache_of(model)
    for at in some(counted.count - before.count, 3, 100):
        cache = cache_of(model)
        with pytest.raises(error), stop(at):
            USES[use](model, cache, tmp_path)
        where = f"{use}, stopped {how} at {at}"
        if cache.is_broken:
            with pytest.raises(ValueError, match="failed half-way; reset"):
                cache.fork(1)
            with pytest.raises(ValueError, match=r"^past_key_values must "):
                model(MORE, past_key_values=cache)
        else:
            assert any(is_same(snapshot(cache), state) for state in legal), where
        cache.reset()
        assert torch.equal(model(WHOLE, past_key_values=cache).logits, expected), where
        tried("faults: stops in the use of a cache")


def test_a_generation_that_is_interrupted_has_printed_what_is_right_so_far(faulty, checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    letters_tokenizer().save_pretrained(model)
    argv = "--model", model, "--prompt", "To be,", "--greedy", "--max-new-tokens", 100
    whole = faulty.run("generate", tmp_path, *argv)
    assert whole.code == 0
    for printed in some(len(whole.out.encode()), 2, 25):
        end = faulty.run("generate", tmp_path, *argv, how="interrupt", printed=printed)
        assert end.code in (0, 130) and not end.err.count("Traceback"), end
        assert whole.out.startswith(end.out.rstrip("\N{REPLACEMENT CHARACTER}")), end  # half of a character
        assert faulty.run("generate", tmp_path, *argv).out == whole.out
        tried("faults: interrupted generations")


# A folder that is written.


def left(folder: Path) -> dict[str, str]:
    """What is below a folder, but for what hides itself: the beginnings of files, and locks."""
    return {path: digest for path, digest in digests(folder).items() if not Path(path).name.startswith(".")}


def points(operations: list[str], how: str, few: int, many: int = sys.maxsize) -> list[tuple[int, int]]:
    """Where a fault is to come, and at which size of a file."""
    sizes = (0, 1, 4096) if how == "cut" else (0,)
    every = [(at, size) for at in range(len(operations)) for size in sizes]
    return [every[i] for i in some(len(every), few, many)]


@pytest.mark.parametrize("to", ["transformers", *(["native"] if TORTURE else [])])
@pytest.mark.parametrize("how", HOW)
def test_a_conversion_leaves_all_or_nothing_and_can_be_started_again(how, to, faulty, checkpoint, tmp_path):
    argv = checkpoint, "to", *SHARDS, "--to", to
    whole = faulty.run("convert", tmp_path / "whole", *argv)
    expected = digests(tmp_path / "whole")
    assert whole.code == 0
    for at, size in points(whole.operations, how, 3, 30 if to == "transformers" else 8):
        folder = tmp_path / f"{at}-{size}"
        end = faulty.run("convert", folder, *argv, how=how, at=at, size=size)
        if how in LASTING and end.code:
            end.sentence()
        assert end.code in {"kill": [-9], "cut": [-25, 0], "interrupt": [130]}.get(how, [0, 1]), end
        made = left(folder) if (folder / "to").exists() else {}
        assert {path: made[path] for path in made if path.startswith("to/")} in ({}, expected), end
        if made:
            shutil.rmtree(folder / "to")
        assert faulty.run("convert", folder, *argv).code == 0
        assert digests(folder) == expected, end
        shutil.rmtree(folder)
        tried("faults: conversions")


@pytest.mark.parametrize("how", ["kill", "interrupt"] if TORTURE else ["interrupt"])
def test_a_conversion_at_a_random_time_is_whole_or_not_there(how, faulty, checkpoint, tmp_path):
    assert faulty.run("convert", tmp_path / "first", checkpoint, "to", *SHARDS).code == 0
    start = time.monotonic()
    assert faulty.run("convert", tmp_path / "whole", checkpoint, "to", *SHARDS).code == 0
    length = time.monotonic() - start
    expected, times = digests(tmp_path / "whole"), random.Random(0)
    for i in range(tries(2, 25)):
        folder = tmp_path / str(i)
        faulty.run("convert", folder, checkpoint, "to", *SHARDS, how=how, after=times.uniform(0, length))
        assert {path: digest for path, digest in left(folder).items() if path.startswith("to/")} in ({}, expected)
        shutil.rmtree(folder / "to", ignore_errors=True)
        assert faulty.run("convert", folder, checkpoint, "to", *SHARDS).code == 0
        assert digests(folder) == expected
        tried("faults: conversions")


def test_a_conversion_that_is_killed_once_more_while_it_cleans_up_leaves_nothing_for_good(faulty, checkpoint, tmp_path):
    argv = checkpoint, "to", *SHARDS
    whole = faulty.run("convert", tmp_path / "whole", *argv)
    expected = digests(tmp_path / "whole")
    before = next(i for i, what in enumerate(whole.operations) if what.startswith("os.rename "))
    end = faulty.run("convert", tmp_path / "cleaned", *argv, how="full", at=before)
    for at in [before + 1 + i for i in some(len(end.operations) - before - 1, 2)]:
        folder = tmp_path / str(at)
        assert faulty.run("convert", folder, *argv, how="full", at=before, killed=at).code == -9
        assert faulty.run("convert", folder, *argv).code == 0
        assert digests(folder) == expected, end.operations[at]
        tried("faults: conversions")


@pytest.mark.parametrize("what", DISKS)
def test_a_conversion_to_a_disk_that_is_too_small_leaves_nothing_and_succeeds_on_a_larger_one(
    what, faulty, checkpoint, tmp_path
):
    argv = checkpoint, "to", *SHARDS
    assert faulty.run("convert", tmp_path / "whole", *argv).code == 0
    expected = digests(tmp_path / "whole")
    for size in some(DISKS[what], 2):
        code, first, again, second = on_a_disk(faulty, tmp_path / str(size), what, 1 + size, "convert", *argv)
        assert (code, first) in ((1, {}), (0, expected)), size
        assert (again, second) == (1 if first else 0, expected)


def on_a_disk(faulty: Faulty, folder: Path, what: str, size: int, *job: object) -> list:
    """Exit codes and contents, where this system can make such a disk."""
    end = faulty.run("on_a_small_disk", folder, what, size, *job)
    if end.code == NOT_HERE:
        pytest.skip("the system lets nobody mount a disk here")
    assert end.code == 0 and "Traceback" not in end.err, end
    tried("faults: small disks")
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("abandoned", [False, True])
def test_of_two_conversions_to_one_destination_one_makes_it_and_the_other_says_a_sentence(
    abandoned, faulty, checkpoint, tmp_path
):
    """The second runs while the first is stopped, at any point; there may be what a third has left that was killed."""
    first, second = (checkpoint, "to", *SHARDS), (checkpoint, "to", "--to", "transformers")
    whole = [faulty.run("convert", tmp_path / str(i), *argv) for i, argv in enumerate((first, second))]
    expected = [digests(tmp_path / str(i)) for i in range(2)]
    middle = len(whole[0].operations) // 2
    count = len(whole[0].operations)
    if abandoned:
        faulty.run("convert", tmp_path / "before", *first, how="kill", at=middle)
        shutil.copytree(tmp_path / "before", tmp_path / "cleaned")
        count = len(faulty.run("convert", tmp_path / "cleaned", *first).operations)
    for at in some(count, 2):
        folder = tmp_path / f"at {at}"
        if abandoned:
            shutil.copytree(tmp_path / "before", folder)
        stopped = faulty.run("convert", folder, *first, how="stop", at=at)
        assert stopped.code is None
        ends = [faulty.run("convert", folder, *second), faulty.go_on(stopped)]
        where = f"{stopped.operations[-1]}: {ends}"
        assert sorted(end.code for end in ends) == [0, 1], where
        next(end for end in ends if end.code).sentence()
        assert digests(folder) == expected[1 if ends[0].code == 0 else 0], where
        tried("faults: conversions beside each other")


def test_conversions_that_stop_each_other_at_any_two_points_make_one_destination(faulty, checkpoint, tmp_path):
    argv = [(checkpoint, "to", *SHARDS), (checkpoint, "to", "--to", "transformers")]
    whole = [faulty.run("convert", tmp_path / str(i), *argv[i]) for i in range(2)]
    expected = [digests(tmp_path / str(i)) for i in range(2)]
    choose = random.Random(0)
    for i in range(tries(2, 60)):
        folder, points = tmp_path / f"try {i}", [choose.randrange(len(end.operations)) for end in whole]
        ends = [faulty.run("convert", folder, *argv[j], how="stop", at=points[j]) for j in range(2)]
        ends = [faulty.go_on(end) if end.code is None else end for end in ends]
        assert sorted(end.code for end in ends) == [0, 1], (points, ends)
        next(end for end in ends if end.code).sentence()
        assert digests(folder) == expected[1 if ends[1].code == 0 else 0], (points, ends)
        tried("faults: conversions beside each other")


# A file that is replaced.


@pytest.mark.parametrize("how", HOW)
def test_a_state_file_is_the_one_before_or_the_new_one(how, faulty, checkpoint, tmp_path):
    for tokens, name in ((5, "before"), (9, "whole")):
        whole = faulty.run("keep", tmp_path / name, checkpoint, tokens, "state.safetensors")
        assert whole.code == 0
    before, expected = (digests(tmp_path / name) for name in ("before", "whole"))
    for at, size in points(whole.operations, how, 2):
        folder = tmp_path / f"{at}-{size}"
        shutil.copytree(tmp_path / "before", folder)
        end = faulty.run("keep", folder, checkpoint, 9, "state.safetensors", how=how, at=at, size=size)
        if how in LASTING and end.code:
            assert "state.safetensors cannot be written: " in end.sentence()
        assert left(folder) in (before, expected), end
        if how in ("interrupt", "full"):
            assert len(digests(folder)) == 1, end
        assert faulty.run("keep", folder, checkpoint, 9, "state.safetensors").code == 0
        assert left(folder) == expected
        tried("faults: state files")


@pytest.mark.parametrize("what", DISKS)
def test_a_state_file_on_a_disk_that_is_too_small_is_the_one_before(what, faulty, checkpoint, tmp_path):
    for tokens, name in ((5, "before"), (9, "whole")):
        assert faulty.run("keep", tmp_path / name, checkpoint, tokens, "state.safetensors").code == 0
    before, expected = (digests(tmp_path / name) for name in ("before", "whole"))
    for size in range(min(DISKS[what], tries(1, 4))):
        folder = tmp_path / f"{size}"
        folder.mkdir()
        shutil.copytree(tmp_path / "before", folder / "before")
        ends = on_a_disk(faulty, folder, what, size, "keep", checkpoint, 9, "state.safetensors")
        assert ends in ([1, before, 0, expected], [0, expected, 0, expected]), size


# A checkpoint that is saved.


def parts(model: Any) -> dict[str, Tensor]:
    """The weights of a model, and a field of its configuration, which is in another file."""
    return {**model.state_dict(), "norm_eps": torch.tensor(model.config.norm_eps)}


def load(folder: Path) -> dict[str, Tensor] | None:
    """What a checkpoint gives, if it gives anything."""
    try:
        return parts(XLSTMForCausalLM.from_pretrained(folder))
    except (OSError, ValueError):
        return None


SAVES = [
    *[("kill", False, before, "60KB") for before in ("nothing", "60KB", "5GB")],
    ("cut", True, "60KB", "60KB"),
]
ALL_SAVES = [
    *itertools.product(("kill", "cut", "full", "read-only"), (False, True), ("nothing", "60KB", "5GB"), ("60KB", "5GB"))
]


@pytest.mark.parametrize(("how", "original", "before", "size"), ALL_SAVES if TORTURE else SAVES)
def test_a_model_that_was_not_saved_to_its_end_loads_as_a_whole_one_or_not_at_all(
    how, original, before, size, faulty, checkpoint, tmp_path
):
    """In a new folder, or in one that holds another model."""
    other = randomise(tiny_model(norm_eps=1e-3), 1)
    old, new = parts(other), parts(XLSTMForCausalLM.from_pretrained(checkpoint))
    if before != "nothing":
        other.save_pretrained(tmp_path / "before" / "to", max_shard_size=before, save_original_format=original)
    else:
        (tmp_path / "before").mkdir()
    argv = checkpoint, "to", size, original
    shutil.copytree(tmp_path / "before", tmp_path / "whole")
    whole = faulty.run("save", tmp_path / "whole", *argv)
    for at, bytes_ in points(whole.operations, how, 1, 5):
        folder = tmp_path / f"{at}-{bytes_}"
        shutil.copytree(tmp_path / "before", folder)
        end = faulty.run("save", folder, *argv, how=how, at=at, size=bytes_)
        loaded = load(folder / "to")
        expected = [x for x in (old, new) if loaded is not None and is_same(loaded, x)]
        assert expected or loaded is None, end
        assert faulty.run("save", folder, *argv).code == 0
        loaded = load(folder / "to")
        assert loaded is not None and is_same(loaded, new), end
        shutil.rmtree(folder)
        tried("faults: saved models")


# A training that is resumed.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `checkpoints/train.py` reads: numbers, with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    described: dict[str, Any] = {"recipe": "-", "sources": []}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    for part, size in (("train", 400), ("held_out", 40)):
        np.save(folder / f"{part}.npy", random_ids(1, size)[0].numpy().astype(np.uint16))
        described[part] = {"documents": 1, "bytes": 3 * size, "tokens": size, "xz_bits_per_byte": 1.0}
    (folder / "data.json").write_text(json.dumps(described))
    return folder


TOY = "--width 32 --blocks 2 --heads 1 --batch-size 4 --window 16 --dropout 0.1 --stack 1:1 --steps 3".split()
TIMED = ("README.md", "plan.json", "trainer_state.json")  # files that say how long something took


def trained(folder: Path) -> dict[str, str]:
    """All that a training leaves and that does not depend on the time it took."""
    return {path: digest for path, digest in left(folder).items() if not path.endswith(TIMED)}


def assert_trained(folder: Path, expected: dict[str, str], end: End) -> None:
    """All is as expected, but for the rest of a checkpoint that was being deleted."""
    found = trained(folder)
    assert {path: found.get(path) for path in expected} == expected, end
    assert all("/checkpoint-" in path for path in found.keys() - expected.keys()), end


def assert_goes_on(faulty: Faulty, folder: Path, argv: tuple, expected: dict[str, str], end: End) -> None:
    """The training that came to this end does, as if nothing had been; from its start if it had not begun."""
    resume = ["--resume"] if (folder / "runs/out/plan.json").exists() else []
    again = faulty.run("train", folder, *argv, *resume)
    assert again.code == 0, (end, again)
    assert_trained(folder, expected, end)
    assert (folder / "out/README.md").stat().st_size


@pytest.mark.parametrize("how", [*HOW, "memory"])
def test_a_training_goes_on_as_if_nothing_had_been(how, faulty, data, tmp_path):
    argv = "--data", data, "--out", "out", *TOY
    whole = faulty.run("train", tmp_path / "whole", *argv)
    expected = trained(tmp_path / "whole")
    assert whole.code == 0 and {"out/model.safetensors", "out/loss.csv"} <= expected.keys()
    operations = range(20_000) if how == "memory" else whole.operations
    for at, size in points(operations, how, 1, 12 if how == "kill" else 4):
        folder = tmp_path / f"{at}-{size}"
        end = faulty.run("train", folder, *argv, how=how, at=at, size=size)
        if how in ("memory", *LASTING) and end.code:
            end.sentence()
        assert end.code in {"kill": [-9], "cut": [-25, 0], "interrupt": [130]}.get(how, [0, 1, 2]), end
        assert_goes_on(faulty, folder, argv, expected, end)
        shutil.rmtree(folder)
        tried("faults: trainings")


@pytest.mark.parametrize("how", ["kill", "interrupt", "memory"] if TORTURE else ["kill"])
def test_a_training_on_windows_goes_on_as_if_nothing_had_been(how, faulty, checkpoint, tmp_path):
    whole = faulty.run("windows", tmp_path / "whole", checkpoint, False, 0)
    expected = trained(tmp_path / "whole")
    assert whole.code == 0 and {"out/model.safetensors", "state.safetensors"} <= expected.keys()
    operations = range(5000) if how == "memory" else whole.operations
    for at, _ in points(operations, how, 1, 8 if how == "kill" else 4):
        folder = tmp_path / str(at)
        end = faulty.run("windows", folder, checkpoint, False, 0, how=how, at=at)
        again = faulty.run("windows", folder, checkpoint, True, 0)
        if "got none in run" in again.err:
            again = faulty.run("windows", folder, checkpoint, False, 0)
        assert again.code == 0, (end, again)
        assert_trained(folder, expected, end)
        tried("faults: trainings")


def test_what_an_earlier_training_left_is_not_gone_on_with(faulty, data, tmp_path):
    """Of other settings, though further on."""
    argv = "--data", data, "--out", "out", *TOY
    assert faulty.run("train", tmp_path / "whole", *argv).code == 0
    expected = trained(tmp_path / "whole")
    assert (
        faulty.run("train", tmp_path / "before", *argv[:-1], 9, "--learning-rate", 0.1, how="kill", at=150).code == -9
    )
    assert list(tmp_path.glob("before/runs/out/checkpoint-[5-8]"))
    for at in some(10, 1, 5):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", folder)
        end = faulty.run("train", folder, *argv, how="kill", at=at)
        plan = json.loads((folder / "runs/out/plan.json").read_text())
        resume = ["--resume"] if plan["steps"] == 3 else []
        again = faulty.run("train", folder, *argv, *resume)
        assert again.code == 0, (end, again)
        assert_trained(folder, expected, end)
        tried("faults: trainings")


@pytest.mark.skipif(not TORTURE, reason="takes long: workers look every five seconds whether they are wanted")
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_training_that_ends_early_leaves_no_process_that_read_its_data(how, faulty, checkpoint, tmp_path):
    """`Faulty.ask` sees to it."""
    whole = faulty.run("windows", tmp_path / "whole", checkpoint, False, 2)
    end = faulty.run("windows", tmp_path / how, checkpoint, False, 2, how=how, at=len(whole.operations) // 2)
    assert whole.code == 0 and end.code
    tried("faults: trainings")


# A Hub that fails.

HUB_FAULTS = {"500": 500, "no answer": NO_ANSWER, "half an answer": HALF, "a stall": STALLED}


@pytest.fixture
def source(hub: Hub) -> str:
    """A model on the Hub, in shards and with a tokenizer."""
    folder = hub.folder / "me" / "source"
    if not folder.exists():
        tiny_model(vocab_size=4096).save_pretrained(folder, max_shard_size="300KB")  # type: ignore[operator]
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DEMO / name, folder / name)
    return "me/source"


def disturbed(hub: Hub, at: int, fault: int, times: int) -> dict[str, list[int]]:
    """The faults of a Hub at request `at` and after it."""
    hub.requests.clear()
    return {"": [FINE] * at + [fault] * times}


@pytest.mark.parametrize("times", [1, *([99] if TORTURE else [])])
@pytest.mark.parametrize("name", HUB_FAULTS)
def test_what_the_hub_does_not_give_whole_is_no_source(name, times, hub, source, faulty, tmp_path):
    argv = source, "to", "--to", "transformers"
    hub.faults = disturbed(hub, 0, FINE, 0)
    assert faulty.run("convert", tmp_path / "whole", *argv).code == 0
    expected, count = digests(tmp_path / "whole" / "to"), len(hub.requests)
    for at in some(count, 1, 6 if times > 1 else 12):
        folder = tmp_path / str(at)
        hub.faults = disturbed(hub, at, HUB_FAULTS[name], times)
        end = faulty.run("convert", folder, *argv)
        hub.faults = {}
        if end.code:
            assert "The source must be a folder or a repository on the Hub, got me/source" in end.sentence()
            assert not (folder / "to").exists()
            assert faulty.run("convert", folder, *argv).code == 0
        assert digests(folder / "to") == expected, (at, end)
        tried("faults: of a Hub")


BEFORE = {"config.json": b"{}", "README.md": b"Before."}


def reset(hub: Hub) -> None:
    """The repository that is pushed to holds something else."""
    folder = hub.folder / "me" / "pushed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in BEFORE.items():
        (folder / name).write_bytes(content)
    hub.blobs.clear()


def push(faulty: Faulty, hub: Hub, folder: Path, to: str = "to", **fault: object) -> End:
    argv = hub.folder / "me" / "source", to, "--to", "transformers", "--push-to-hub", "me/pushed"
    return faulty.run("convert", folder, *argv, **fault)


def assert_pushed_or_not(faulty: Faulty, hub: Hub, folder: Path, end: End) -> None:
    """What is on the Hub is what was there before or all that is to be there; the next push ends well."""
    hub.faults = {}
    made = {path.name: path.read_bytes() for path in (folder / "to").glob("*")}
    assert hub.files("me/pushed") in ((made,) if end.code == 0 else (BEFORE, made)), end
    assert push(faulty, hub, folder, "again").code == 0
    again = {path.name: path.read_bytes() for path in (folder / "again").iterdir()}
    assert hub.files("me/pushed") == again and made in ({}, again), end
    tried("faults: of a Hub")


@pytest.mark.parametrize("times", [1, *([99] if TORTURE else [])])
@pytest.mark.parametrize("name", HUB_FAULTS)
def test_a_push_to_a_hub_that_fails_leaves_all_or_nothing_there(name, times, hub, source, faulty, tmp_path):
    reset(hub)
    hub.faults = disturbed(hub, 0, FINE, 0)
    assert push(faulty, hub, tmp_path / "whole").code == 0
    for at in some(len(hub.requests), 1, 6 if times > 1 else 12):
        reset(hub)
        hub.faults = disturbed(hub, at, HUB_FAULTS[name], times)
        end = push(faulty, hub, tmp_path / str(at))
        if end.code:
            end.sentence()
        assert_pushed_or_not(faulty, hub, tmp_path / str(at), end)


def test_a_push_that_is_killed_leaves_all_or_nothing_on_the_hub(hub, source, faulty, tmp_path):
    reset(hub)
    operations = push(faulty, hub, tmp_path / "whole").operations
    sends = [at for at, what in enumerate(operations) if what.startswith("sen")]
    for i in some(len(sends), 2, 25):
        reset(hub)
        end = push(faulty, hub, tmp_path / str(i), how="kill", at=sends[i])
        assert end.code == -9
        assert_pushed_or_not(faulty, hub, tmp_path / str(i), end)


def test_a_download_that_is_killed_is_gone_on_with(hub, source, faulty, tmp_path):
    argv = source, "to", "--to", "transformers"
    whole = faulty.run("convert", tmp_path / "whole", *argv)
    expected = digests(tmp_path / "whole" / "to")
    for at, _ in points(whole.operations, "kill", 2, 25):
        folder = tmp_path / str(at)
        faulty.run("convert", folder, *argv, how="kill", at=at)  # which may come later in another order of threads
        shutil.rmtree(folder / "to", ignore_errors=True)
        assert faulty.run("convert", folder, *argv).code == 0
        assert digests(folder / "to") == expected, at
        tried("faults: of a Hub")
