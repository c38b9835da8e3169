"""Weights shared by two processes, with FSDP2 of Transformers and of accelerate: what one process computes, to the
bit where both read the same rows."""

from pathlib import Path
from typing import Any

import pytest
import ranks
import ranks_data
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser  # type: ignore[import-untyped]
from accelerate.utils.launch import prepare_multi_gpu_env  # type: ignore[import-untyped]
from models import tiny_config
from numerics import difference
from ranks_data import MODELS
from safetensors.torch import load_file

from modeling_xlstm import XLSTMForCausalLM


pytest.importorskip("transformers.distributed.checkpoint", reason="needs a later version of Transformers")
WORLD = 2
MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of each model."""
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        ranks_data.save(folder, name)
    return folder


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory) -> dict[tuple[str, str], Any]:
    """All in one process."""
    return ranks.run(ranks_data.all_sharded, 1, tmp_path_factory.mktemp("one"), folder, 1)[0]


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory) -> list[dict[tuple[str, str], Any]]:
    """All in two processes."""
    return ranks.run(ranks_data.all_sharded, WORLD, tmp_path_factory.mktemp("two"), folder, WORLD)


def assert_equal(actual: Any, expected: Any) -> None:
    """To the bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_steps_on_the_same_rows_are_those_of_one_process_to_the_bit(name, one, two):
    expected = one["same", name]
    for results in two:
        assert_equal({key: results["same", name][key] for key in expected}, expected)


@pytest.mark.parametrize("name", ["post_up", "pre_up_slstm", "tied"])
def test_steps_on_rows_of_each_process_are_those_of_one_process_on_all(name, one, two):
    """In float64; measured: losses to 2e-16, gradients and weights to 7e-12."""
    expected = one["own", name]
    for results in two:
        actual = results["own", name]
        for loss, whole in zip(actual["losses"], expected["losses"], strict=True):
            assert difference(loss, whole) <= 1e-14
        for mine, whole in zip(actual["gradients"], expected["gradients"], strict=True):
            assert all(difference(mine[key], x) <= 1e-10 for key, x in whole.items())
        assert all(difference(actual["weights"][key], x) <= 1e-10 for key, x in expected["weights"].items())


@pytest.mark.parametrize("saved", ["gathered", "merged"])
@pytest.mark.parametrize("name", MODELS)
def test_one_process_loads_what_two_have_saved_to_the_bit(name, saved, two, folder):
    model = XLSTMForCausalLM.from_pretrained(folder / f"{name} {saved}", dtype=torch.float32)
    assert model.config.tie_word_embeddings is name.startswith("tied")
    expected = {key: x.float() for key, x in two[0]["same", name]["weights"].items()}
    assert_equal({key: x.detach() for key, x in model.named_parameters()}, expected)


def test_the_loss_may_be_computed_without_all_logits(two):
    """Which takes a projection that has no hooks."""
    assert not any(two[0]["same", name]["hooked"] for name in MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_processes_load_the_parts_that_each_has_saved_to_the_bit(name, two):
    for results in two:
        assert_equal(results["same", name]["reloaded"], results["same", name]["weights"])


@pytest.mark.parametrize("name", ["pre_up_slstm", "tied"])
def test_what_is_resumed_from_model_and_optimizer_goes_on_to_the_bit(name, two):
    for results in two:
        assert_equal(results["resumed", name]["again"], results["resumed", name]["on"])


@pytest.mark.parametrize("name", ["post_up", "pre_up_slstm"])
def test_texts_are_those_of_one_process(name, one, two):
    assert_equal(torch.cat([results["generated", name] for results in two]), one["generated", name])


def test_a_trainer_takes_a_model_that_shares_its_weights(folder, tmp_path):
    (tmp_path / "two").mkdir()
    (expected,) = ranks.run(ranks_data.sharded_trainer, 1, tmp_path, folder, 1)
    for actual in ranks.run(ranks_data.sharded_trainer, WORLD, tmp_path / "two", folder, WORLD):
        assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-6)  # which are added up in float32
        assert all(difference(actual["weights"][key], x) <= 1e-10 for key, x in expected["weights"].items())
        assert actual["refused"].startswith("Resuming is not supported for models sharded at load time")
    saved = XLSTMForCausalLM.from_pretrained(folder / "trainer of 2" / "checkpoint-4", dtype=torch.float64)
    assert_equal(dict(saved.named_parameters()), {key: x.requires_grad_() for key, x in actual["weights"].items()})


def test_loading_takes_a_process_the_memory_of_its_part_and_a_weight(folder, tmp_path):
    """Of one whose dtype is not that of the file: otherwise its weights are those of the file, mapped."""
    sizes = {"vocab_size": 8192, "hidden_size": 1024, "num_hidden_layers": 3, "num_heads": 4}
    model = XLSTMForCausalLM(tiny_config(**sizes))
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    model.save_pretrained(folder / "large")
    model.float()
    total, largest = (of(x.nbytes for x in model.parameters()) for of in (sum, max))
    del model
    assert total > 200 * MIB
    for result in ranks.run(ranks_data.loading, WORLD, tmp_path, folder, WORLD):
        assert result["part"] <= total / WORLD + MIB
        assert result["peak"] <= result["part"] + largest + 8 * MIB, {k: v / MIB for k, v in result.items()}


def test_the_command_of_the_page_trains(tmp_path):
    line = next(line for line in ranks_data.page_commands("torchrun") if "--fsdp_size" in line)
    ranks_data.assert_loads(ranks_data.run_command(line, tmp_path))


def test_the_loop_of_the_page_goes_on_to_the_bit(tmp_path):
    first, then = (line for line in ranks_data.page_commands("torchrun") if "runs/loop" in line)
    for line in (first, then, then.replace("runs/loop", "runs/whole").replace("--first 2", "")):
        output = ranks_data.run_command(line, tmp_path)
        ranks_data.assert_loads(output)
    mine, other = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in ("loop", "whole"))
    assert_equal(mine, other)


def test_fsdp_of_accelerate_takes_the_settings_of_the_example(folder, tmp_path, one):
    """accelerate has it for GPUs only, and distributes rows alone on a CPU without a word: it is told there is one."""
    config = ["--config_file", str(ranks_data.EXAMPLES / "accelerate_fsdp2.yaml"), "train.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(config))
    names = ("FSDP_", "ACCELERATE_")
    settings = {key: x for key, x in prepare_multi_gpu_env(args).items() if key.startswith(names)}
    for actual in ranks.run(ranks_data.accelerated, WORLD, tmp_path, folder, settings):
        assert actual["without"] == "MULTI_CPU"
        layers = [f"model.layers.{i}" for i in range(3)]
        assert actual["groups"] == ["", "model.embed_tokens", *layers, "model.norm", "lm_head"]
        expected = one["same", "pre_up_slstm"]
        assert_equal({key: actual[key] for key in expected}, expected)
