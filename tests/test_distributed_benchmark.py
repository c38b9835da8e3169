"""The benchmark of several GPUs, in two processes on a CPU: its table, what it refuses, and what it says then."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import distributed, distributed_checks
from benchmarks.distributed import Measured, Row
from benchmarks.distributed_checks import Error, largest_error
from benchmarks.ops import ROOT


ROWS = (
    "tensor parallelism, 7 B, one text, tokens/s",
    "tensor parallelism, 7 B, prompt of 64, ms",
    "FSDP2, 1.4 B, 2 x 32 a GPU, tokens/s",
    "FSDP2, 1.4 B, 2 x 32 a GPU, weights kept, tokens/s",
    "FSDP2, 7 B, checkpointing, 1 x 32 a GPU, tokens/s",
    "sequence parallelism, a layer of the 7 B, 1 x 128, ms",
)
WITHOUT_GPU = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def start(*arguments: str, before: str = "") -> subprocess.CompletedProcess:
    """The benchmark in two processes; `before` is run by each at first."""
    code = f"from benchmarks import distributed, distributed_checks\n{before}\ndistributed.main()"
    module = ["-m", "benchmarks.distributed"] if not before else ["--no-python", sys.executable, "-c", code]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, *module, *arguments], cwd=ROOT, env=WITHOUT_GPU, capture_output=True, text=True, timeout=200
    )


def test_small_models_are_compared_and_timed_by_two_processes():
    run = start("--tiny")
    assert run.returncode == 0, run.stderr
    versions, _, head, _, *lines = run.stdout.splitlines()[-4 - len(ROWS) :]
    assert versions.startswith("2 x ") and "torch" in versions and "transformers" in versions
    assert head == "| what | 1 GPU | 2 GPUs | ratio | goal | memory of a GPU, GiB (1, 2) |"
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert tuple(row[0] for row in cells) == ROWS
    for what, one, many, ratio, goal, memory in cells:
        large = what == ROWS[4]
        for number in (many,) if large else (one, many, ratio):
            assert 0 < float(number) < math.inf, what
        assert not large or (one, ratio, goal) == ("-", "-", "-")
        assert large or re.fullmatch(r">= 1\.\d+", goal)
        assert memory == "-, -"


def test_a_section_is_measured_alone():
    run = start("--tiny", "sequence")
    assert run.returncode == 0, run.stderr
    assert "tensor parallelism" not in run.stdout and "FSDP2" not in run.stdout
    assert run.stdout.splitlines()[-1].startswith(f"| {ROWS[-1]} |")


def test_wrong_gradients_of_one_process_end_all_before_anything_is_timed():
    wrong = "distributed_checks.own_slices = lambda place, *x, own=distributed_checks.own_slices: ["
    wrong += "y.detach().mul(1 + 0.1 * place.rank).requires_grad_(y.requires_grad) for y in own(place, *x)]"
    run = start("--tiny", "sequence", before=wrong)
    assert run.returncode == 1
    assert "a layer of xLSTM-7B" not in run.stdout and "process ..." not in run.stdout and "|---" not in run.stdout
    said = [line for line in run.stderr.splitlines() if line.startswith("No speed without correct results")]
    assert len(said) == 1
    assert re.fullmatch(
        r"No speed without correct results: sequence parallelism, a layer of xLSTM-7B, torch.float32: the gradient of "
        r"\S+ is off by \S+ of its norm, allowed are \S+\.",
        said[0],
    )


@pytest.mark.parametrize(
    "arguments, status, sentence",
    [
        (["--tiny", "speed"], 2, f"{distributed.COMMAND}: error: Sections are tp, fsdp, sequence, got speed."),
        (["--small"], 2, f"{distributed.COMMAND}: error: unrecognized arguments: --small"),
        ([], 1, "2 processes need a CUDA GPU each, and PyTorch finds 0 here; --tiny needs none."),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments, status, sentence):
    run = start(*arguments)
    assert run.stderr.splitlines().count(sentence) == 1
    assert f"(exitcode: {status})" in run.stderr and not run.stdout


def test_a_single_process_is_told_how_to_start_more():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.distributed", "--tiny"], cwd=ROOT, capture_output=True, text=True
    )
    sentence = f"Two processes or more are compared with one: start them by `{distributed.COMMAND}`."
    assert run.returncode == 1 and run.stderr.splitlines()[-1] == sentence


EXACT = {"a": torch.linspace(1, 2, 9, dtype=torch.float64), "b": torch.ones(3, dtype=torch.float64)}


def off(by: float, *names: str) -> dict[str, torch.Tensor]:
    return {name: x * (1 + by) if name in names else x for name, x in EXACT.items()}


def test_a_tensor_may_be_off_by_four_times_what_that_of_one_process_is_and_a_floor():
    error = largest_error([off(3.9e-3, "a"), off(1e-3, "a"), EXACT], 1e-9)
    assert error.name == "a" and error.used == pytest.approx(3.9 / 4, rel=1e-5)
    assert largest_error([off(4.1e-3, "a"), off(1e-3, "a"), EXACT], 1e-9).used > 1
    assert largest_error([off(4.1e-3, "a"), off(1e-3, "a"), EXACT], 1e-3).used < 1
    assert largest_error([off(4e-3, "b"), off(1e-3, "a"), EXACT], 1e-6) == Error("b", pytest.approx(4e-3), 1e-6)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_is_the_largest_error(wrong):
    for results in ([off(wrong, "b"), EXACT, EXACT], [EXACT, off(math.nan, "b"), EXACT]):
        error = largest_error(results, 1e-6)
        assert error.name == "b" and error.used > 1


def test_results_of_other_names_or_shapes_are_no_results():
    for wrong in ({"a": EXACT["a"]}, {**EXACT, "b": EXACT["a"]}):
        with pytest.raises(ValueError, match="must have the names and shapes"):
            largest_error([wrong, EXACT, EXACT], 1.0)


def test_a_ratio_is_of_speed_and_goals_are_those_of_two_gpus():
    one, many = Measured(0.3, 10.04), Measured(0.2, 5.0)
    assert Row("x", one, many, 1.8).line(2) == "| x, ms | 300.0 | 200.0 | 1.50 | >= 1.8 | 10.0, 5.0 |"
    assert Row("x", one, many, 1.8).line(4) == "| x, ms | 300.0 | 200.0 | 1.50 | - | 10.0, 5.0 |"
    rates = one._replace(tokens=300), many._replace(tokens=600)
    assert Row("x", *rates).line(2) == "| x, tokens/s | 1000.0 | 3000.0 | 3.00 | - | 10.0, 5.0 |"
    assert Row("x", None, rates[1]).line(2) == "| x, tokens/s | - | 3000.0 | - | - | -, 5.0 |"


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_processes_can_share_the_heads_of_all_models(world):
    from modeling_xlstm.parallel_plan import check_divisible

    for config in distributed_checks.configs(world, distributed_checks.FULL).values():
        check_divisible(config, world)
    for config in distributed_checks.configs(world, distributed_checks.tiny(world)).values():
        check_divisible(config, world)
