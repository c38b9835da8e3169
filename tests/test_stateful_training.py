"""Training on a text longer than memory, and the weights that decay."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import KINDS, TWO_KINDS, assert_near, assert_same_gradients, gradients, random_ids, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments

from modeling_xlstm import XLSTMCache
from modeling_xlstm.training_xlstm import Windows, XLSTMTrainer, decaying


ROOT = Path(__file__).parents[1]
TEXT = random_ids(1, 400)[0]


def trainer(model, folder, length=8, rows=3, **arguments):
    """A trainer on windows of a text, and the list that every step's loss is added to."""
    settings = {
        "max_steps": 20, "save_steps": 8, "per_device_train_batch_size": rows, "learning_rate": 1e-2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_grad_norm": 1.0, "weight_decay": 0.1,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    losses: list[float] = []

    def keep(module, inputs, output):
        if output.loss is not None:
            losses.append(output.loss.item())

    model.register_forward_hook(keep)
    return XLSTMTrainer(model=model, args=args, train_dataset=Windows(TEXT, rows, length)), losses


def test_each_row_reads_its_part_of_the_text_in_order():
    data = Windows(TEXT, 3, 8)
    assert len(data) == 3 * ((133 - 1) // 8)
    for row in range(3):
        items = [data[i] for i in range(row, len(data), 3)]
        part = TEXT[133 * row : 133 * (row + 1)]
        assert [item["window"] for item in items] == list(range(16))
        assert torch.equal(torch.cat([item["input_ids"] for item in items]), part[:128])
        assert torch.equal(torch.cat([item["shift_labels"] for item in items]), part[1:129])
    with pytest.raises(IndexError, match="index must be from 0 to 47, got 48"):
        data[48]


@pytest.mark.parametrize(("rows", "length", "sentence"), [(0, 8, "at least 1, got 0"), (50, 8, "450 tokens, got 400")])
def test_a_text_that_is_too_short_is_refused(rows, length, sentence):
    with pytest.raises(ValueError, match=sentence):
        Windows(TEXT, rows, length)


@pytest.mark.parametrize("text", [torch.rand(400), TEXT[None], TEXT[None].expand(2, -1)])
def test_a_text_is_a_row_of_token_ids(text):
    with pytest.raises(ValueError, match="must be a row of token ids, got torch"):
        Windows(text, 3, 8)


def test_a_text_on_disk_is_read_a_window_at_a_time(tmp_path):
    np.save(tmp_path / "text.npy", TEXT.numpy().astype(np.uint16))
    data = Windows(np.load(tmp_path / "text.npy", mmap_mode="r+"), 3, 8)
    assert data.text.dtype == torch.uint16
    assert all(torch.equal(data[i]["shift_labels"], Windows(TEXT, 3, 8)[i]["shift_labels"]) for i in range(len(data)))


def test_a_loss_needs_no_logits(tmp_path):
    asked = []
    for smoothing in (0.0, 0.1):
        args = TrainingArguments(
            str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
            label_smoothing_factor=smoothing,
        )  # fmt: skip
        model = get_peft_model(tiny_model("post_up"), LoraConfig(task_type="CAUSAL_LM"))
        model.register_forward_pre_hook(lambda *x: asked.append(x[2].get("skip_logits")), with_kwargs=True)
        data = [{"input_ids": TEXT[:8], "labels": TEXT[:8]}] * 8
        XLSTMTrainer(model, args, train_dataset=data, eval_dataset=data).train()
    assert asked == [True, None]


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_steps_have_the_losses_of_the_whole_text_and_gradients_within_a_window(kind, tmp_path):
    """With a learning rate of zero."""
    model = tiny_model(kind)
    train, losses = trainer(model, tmp_path, max_steps=16, learning_rate=0.0, save_strategy="no")
    train.train()
    parts = TEXT[: 133 * 3].view(3, 133)
    with torch.no_grad():
        logits = model(parts[:, :128]).logits
    nats = nn.functional.cross_entropy(logits.mT, parts[:, 1:129], reduction="none")
    for loss, window in zip(losses, nats.split(8, 1), strict=False):
        assert_near(torch.tensor(loss), window.mean(), 1e-5)
    assert train.cache.get_seq_length() == 128
    assert not any(x.requires_grad for layer in train.cache.layers for x in layer.state.tensors().values())


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_detached_state_ends_the_gradient(kind):
    model, ids = tiny_model(kind).train().double(), random_ids(2, 40)
    cache, fixed = XLSTMCache(model.config), XLSTMCache(model.config)
    model(ids[:, :20], past_key_values=cache)
    with torch.no_grad():
        model.eval()(ids[:, :20], past_key_values=fixed)
    model.train()
    results = []
    for state in (cache.detach_(), fixed):
        model(ids[:, 20:], labels=ids[:, 20:], past_key_values=state).loss.backward()
        results.append(gradients(model))
    assert_same_gradients(*results, 1e-9)


def test_each_pass_over_the_text_starts_empty(tmp_path):
    model = tiny_model()
    train, losses = trainer(model, tmp_path, max_steps=32, learning_rate=0.0, save_strategy="no")
    train.train()
    assert losses[:16] == losses[16:32]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_what_is_resumed_goes_on_as_if_nothing_had_been(kind, accumulation, tmp_path):
    """From the middle of the second pass, and of the first."""
    model = tiny_model(kind, dropout=0.1)
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 20 // accumulation}
    options["save_steps"] = 4 // accumulation
    whole, losses = trainer(model, tmp_path / "whole", **options)
    whole.train()
    for steps in (12, 4):
        other = tiny_model(kind, dropout=0.1)
        resumed, resumed_losses = trainer(other, tmp_path / "resumed", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{steps // accumulation}"))
        assert resumed_losses == losses[steps:]
        for (name, expected), actual in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(actual, expected), name


def test_a_training_that_was_at_its_end_does_not_go_on(tmp_path):
    model, other = tiny_model(), tiny_model()
    trainer(model, tmp_path, max_steps=4, save_steps=4)[0].train()
    resumed, losses = trainer(other, tmp_path, max_steps=4, save_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert not losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


KILLED = """
import os, signal, sys
from models import tiny_model
from test_stateful_training import trainer

model = tiny_model("post_up_slstm")
train, losses = trainer(model, sys.argv[1], save_steps=4)
backward = train.accelerator.backward

def die_in_the_middle(loss, **kwargs):
    if train.state.global_step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    backward(loss, **kwargs)

train.accelerator.backward = die_in_the_middle
train.train()
"""


def test_a_training_that_is_killed_in_the_middle_of_a_step_goes_on(tmp_path):
    model = tiny_model("post_up_slstm")
    whole, losses = trainer(model, tmp_path / "whole", save_strategy="no")
    whole.train()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], env=environment, timeout=300)
    assert run.returncode == -signal.SIGKILL
    other = tiny_model("post_up_slstm")
    resumed, resumed_losses = trainer(other, tmp_path / "killed", save_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed_losses == losses[8:]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_windows_out_of_order_are_refused(tmp_path):
    train, _ = trainer(tiny_model(), tmp_path)
    item = {name: torch.stack([torch.as_tensor(x)] * 3) for name, x in train.train_dataset[6].items()}
    with pytest.raises(ValueError, match="Window 0 must come next in each row, got windows 2 to 2"):
        train.compute_loss(train.model.train(), item)
    with pytest.raises(ValueError, match="Windows of 3 rows need one device and batches of as many, got 1 of 2"):
        trainer(tiny_model(), tmp_path, per_device_train_batch_size=2)[0].train()


def test_evaluation_starts_from_an_empty_state_and_leaves_that_of_the_training(tmp_path):
    model = tiny_model()
    train, _ = trainer(model, tmp_path, max_steps=4, save_strategy="no")
    train.train()
    before = [x.clone() for layer in train.cache.layers for x in layer.state.tensors().values()]
    text = {"input_ids": TEXT[:30], "labels": TEXT[:30]}
    loss = train.evaluate([text])["eval_loss"]
    with torch.no_grad():
        assert_near(torch.tensor(loss), model(TEXT[None, :30], labels=TEXT[None, :30]).loss, 1e-5)
    after = [x for layer in train.cache.layers for x in layer.state.tensors().values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_linear_maps_decay_and_nothing_else(kind, tmp_path):
    model = tiny_model(kind, use_bias=True)
    names = set(decaying(model))
    for name, weight in model.named_parameters():
        ending = name.split(".")[-2:]
        is_map = ending[-1] in ("gate_weight", "recurrent_weight") or (
            (ending[-1] == "weight" and ending[0].endswith("_proj")) or name == "lm_head.weight"
        )
        assert (name in names) == is_map, name
        assert weight.dim() > 1 or name not in names
    train, _ = trainer(model, tmp_path)
    groups = train.create_optimizer().param_groups
    decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"]}
    assert decayed == {id(p) for name, p in model.named_parameters() if name in names}


def test_tied_embeddings_do_not_decay_and_adapters_do():
    model = tiny_model(tie_word_embeddings=True)
    assert "model.embed_tokens.weight" not in decaying(model)
    adapted = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM"))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained <= set(decaying(adapted))


def test_smoothed_labels_are_refused(tmp_path):
    train, _ = trainer(tiny_model("post_up"), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0 to train on Windows, got 0.1"):
        train.train()


def test_a_checkpoint_has_its_states_before_it_seems_complete(tmp_path):
    """`Trainer` takes one that has trainer_state.json, and deletes those before it."""

    class KilledError(Exception):
        pass

    train, _ = trainer(tiny_model("post_up"), tmp_path, save_steps=4)

    def kill(*args, **kwargs):
        raise KilledError

    train._save_rng_state = kill
    with pytest.raises(KilledError):
        train.train()
    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert "state.safetensors" in files and "trainer_state.json" not in files


PLACES = ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "_save_checkpoint")


@pytest.mark.parametrize("place", PLACES)
def test_a_training_that_is_killed_while_it_saves_goes_on_from_the_checkpoint_before(place, tmp_path):
    whole, losses = trainer(tiny_model("post_up"), tmp_path / "whole", save_strategy="no")
    whole.train()
    train, _ = trainer(tiny_model("post_up"), tmp_path / "killed", save_steps=4)
    method = getattr(train, place)

    def kill(*args, **kwargs):
        if train.state.global_step < 8:
            return method(*args, **kwargs)
        if place == "_save_checkpoint":  # while it writes the last file
            method(*args, **kwargs)
            path = tmp_path / "killed" / "checkpoint-8" / "trainer_state.json"
            path.write_text(path.read_text()[:100])
        raise KeyboardInterrupt

    setattr(train, place, kill)
    with pytest.raises(KeyboardInterrupt):
        train.train()
    assert (tmp_path / "killed" / "checkpoint-8").is_dir()
    resumed, resumed_losses = trainer(tiny_model("post_up"), tmp_path / "killed", save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert resumed_losses == losses[4:]


def test_a_training_does_not_go_on_from_nothing(tmp_path):
    train, _ = trainer(tiny_model("post_up"), tmp_path)
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(ValueError, match=f"goes on from a checkpoint that is complete, got none in {tmp_path}"):
        train.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_states_is_refused(tmp_path):
    train, _ = trainer(tiny_model("post_up"), tmp_path, save_steps=4, max_steps=4)
    train.train()
    (tmp_path / "checkpoint-4" / "state.safetensors").unlink()
    train, _ = trainer(tiny_model("post_up"), tmp_path)
    with pytest.raises(ValueError, match="must hold state.safetensors, got .*checkpoint-4 without it"):
        train.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_several_devices_are_refused(tmp_path, monkeypatch):
    train, _ = trainer(tiny_model("post_up"), tmp_path)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="need one device"):
        train._get_train_sampler()
