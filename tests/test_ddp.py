"""Rows shared by two processes with `DistributedDataParallel`, alone and in `Trainer`, one of which may be lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import ranks_data
from numerics import difference
from test_fsdp import assert_equal


WORLD = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("post_up", "pre_up_slstm", "tied"):
        ranks_data.save(folder, name)
    return folder


def run(function: Callable, folder: Path, *args: Any, world: int = WORLD, **options: Any) -> list[Any]:
    """In a folder of its own."""
    folder.mkdir()
    return ranks.run(function, world, folder, *args, **options)


@pytest.mark.parametrize("name", ["post_up", "pre_up_slstm", "tied"])
def test_steps_on_the_same_rows_are_those_of_one_process_to_the_bit(name, folder, tmp_path):
    (expected,) = run(ranks_data.ddp, tmp_path / "one", folder, 1, name, True, world=1)
    for actual in run(ranks_data.ddp, tmp_path / "two", folder, WORLD, name, True):
        assert_equal(actual, expected)


def test_steps_on_rows_of_each_process_are_those_of_one_process_on_all(folder, tmp_path):
    """Of a model whose every weight has a gradient in every step: DDP need not look for those without."""
    (expected,) = run(ranks_data.ddp, tmp_path / "one", folder, 1, "pre_up_slstm", False, world=1)
    for actual in run(ranks_data.ddp, tmp_path / "two", folder, WORLD, "pre_up_slstm", False):
        assert all(difference(actual["weights"][key], x) <= 1e-10 for key, x in expected["weights"].items())
        for mine, whole in zip(actual["gradients"], expected["gradients"], strict=True):
            assert mine.keys() == whole.keys() == expected["weights"].keys()
            assert all(difference(mine[key], x) <= 1e-10 for key, x in whole.items())


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory) -> dict:
    """A training in two processes."""
    path = tmp_path_factory.mktemp("undisturbed")
    first, second = ranks.run(ranks_data.trainer, WORLD, path, folder, WORLD, path / "run")
    assert_equal(first["weights"], second["weights"])
    return first


def test_a_trainer_in_two_processes_computes_what_it_does_in_one(folder, tmp_path, undisturbed):
    (expected,) = ranks.run(ranks_data.trainer, 1, tmp_path, folder, 1, tmp_path / "run")
    assert undisturbed["losses"] == pytest.approx(expected["losses"], rel=1e-6)  # which are added up in float32
    assert all(difference(undisturbed["weights"][key], x) <= 1e-10 for key, x in expected["weights"].items())


def test_a_training_that_loses_a_process_ends_and_resumes_as_if_nothing_had_been(folder, tmp_path, undisturbed):
    """In its fourth step, after a checkpoint of two."""
    timeout = 60.0
    left, gone = run(ranks_data.trainer, tmp_path / "lost", folder, WORLD, tmp_path / "run", 3, timeout=timeout)
    assert gone is None
    assert left["error"] and left["seconds"] < timeout
    for resumed in run(ranks_data.trainer, tmp_path / "resumed", folder, WORLD, tmp_path / "run", None, True):
        assert resumed["losses"] == undisturbed["losses"]
        assert_equal(resumed["weights"], undisturbed["weights"])


def test_the_command_of_the_page_trains(tmp_path):
    """In processes like those that torchrun starts."""
    line = next(line for line in ranks_data.page_commands("torchrun") if "runs/ddp" in line)
    output = ranks_data.run_command(line, tmp_path)
    ranks_data.assert_loads(output)


def test_torchrun_ends_when_a_process_is_killed_and_goes_on_when_started_again(tmp_path):
    source, steps = ranks_data.tiny_source(tmp_path), 100
    flags = ["--max_steps", str(steps), "--save_steps", "10", "--per_device_train_batch_size", "2"]
    script = [str(ranks_data.EXAMPLES / "train.py"), *ranks_data.flags_of(source, "killed", *flags)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORLD), *script]
    environment = {**os.environ, "PYTHONPATH": str(ranks_data.ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as torchrun:
        while not list((tmp_path / "killed").glob("checkpoint-*/trainer_state.json")):
            time.sleep(0.01)
            assert torchrun.poll() is None
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, printed = torchrun.communicate(timeout=120)
    assert torchrun.returncode and "exitcode: -9" in printed, printed
    assert not (tmp_path / "killed" / f"checkpoint-{steps}").exists()
    run(ranks_data.example, tmp_path / "again", tmp_path, script)
    run(ranks_data.example, tmp_path / "other", tmp_path, [script[0], *ranks_data.flags_of(source, "whole", *flags)])
    ranks_data.assert_same_training(tmp_path / "killed", tmp_path / "whole", steps)
