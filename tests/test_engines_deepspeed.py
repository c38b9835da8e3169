"""ZeRO of DeepSpeed, with the settings of notebooks/many_gpus, in two processes on a CPU: `make test-engines`."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import ranks
import ranks_data
import torch
from models import tiny_model
from ranks_data import EXAMPLES


pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
WORLD = 2


def start(folder: Path, process: str, flags: list[str], world: int = WORLD) -> None:
    """train.py in some processes."""
    (folder / process).mkdir()
    ranks.run(ranks_data.example, world, folder / process, folder, [str(EXAMPLES / "train.py"), *flags], timeout=300)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_command_of_the_page_trains(stage, tmp_path):
    line = next(line for line in ranks_data.page_commands("torchrun") if f"zero{stage}.json" in line)
    ranks_data.assert_loads(ranks_data.run_command(line, tmp_path))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_training_that_is_resumed_goes_on_as_if_nothing_had_been(stage, tmp_path):
    source = ranks_data.tiny_source(tmp_path)
    settings = ["--deepspeed", str(EXAMPLES / f"deepspeed_zero{stage}.json"), "--per_device_train_batch_size", "2"]
    start(tmp_path, "first", ranks_data.flags_of(source, "whole", *settings))
    ranks_data.interrupt(tmp_path / "whole", tmp_path / "resumed")
    start(tmp_path, "second", ranks_data.flags_of(source, "resumed", *settings))
    ranks_data.assert_same_training(tmp_path / "resumed", tmp_path / "whole")
    start(tmp_path, "alone", ranks_data.flags_of(source, "alone", "--per_device_train_batch_size", "4"), world=1)
    assert ranks_data.curve(tmp_path / "whole") == pytest.approx(ranks_data.curve(tmp_path / "alone"), rel=1e-5)
    ranks_data.assert_loads(tmp_path / "whole")


@pytest.fixture(scope="module", params=["post_up", "pre_up_slstm", "tied"])
def zero3(request, tmp_path_factory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One process without it, and two with it."""
    folder, name = tmp_path_factory.mktemp("zero3"), request.param
    ranks_data.save(folder, name)
    broken: Any = ranks_data.load(folder / name)
    with torch.no_grad():
        broken.model.layers[1].mixer_norm.weight[-1] = torch.nan  # of the last process's part
    broken.save_pretrained(folder / "nan")
    odd: Any = tiny_model("post_up", hidden_size=33, num_heads=3, qk_dim_factor=1.0)
    odd.save_pretrained(folder / "odd")
    (folder / "one").mkdir()
    (one,) = ranks.run(ranks_data.zero3, 1, folder / "one", folder, 1, name)
    return one, ranks.run(ranks_data.zero3, WORLD, folder, folder, WORLD, name, timeout=300)


def test_no_process_of_zero3_has_a_weight_whole_after_loading(zero3):
    for result in zero3[1]:
        for name, (numel, part, whole) in result["parts"].items():
            assert numel == 0 and part == -(-whole // WORLD), name


def test_a_weight_that_is_not_finite_is_refused_in_every_process(zero3):
    for result in zero3[1]:
        assert result["odd"] == "nothing"
        assert result["refused"].endswith("must be finite, got NaN or infinity in model.layers.1.mixer_norm.weight.")


def test_losses_of_zero3_are_those_of_one_process(zero3):
    """In float32; measured: to 7e-5, as AdamW makes whole steps of the rounding of gradients that are nearly zero."""
    one, two = zero3
    for result in two:
        torch.testing.assert_close(torch.stack(result["losses"]), torch.stack(one["losses"]), rtol=3e-4, atol=0)


def test_texts_of_zero3_are_those_of_one_process(zero3):
    one, two = zero3
    assert all(torch.equal(result["tokens"], one["tokens"]) for result in two)
