"""TRL's SFTTrainer without settings: whole models and LoRA, padded and packed."""

import pytest
import torch
from datasets import Dataset
from models import TWO_KINDS, assert_near, tiny_model
from peft import LoraConfig
from test_generation import letters_tokenizer
from trl import SFTConfig, SFTTrainer

from modeling_xlstm.training_xlstm import decaying


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of what TRL still calls by names of before
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TEXTS = [f"{chr(97 + i % 26)} sentence that says {i} times the same thing. " * (1 + i % 3) for i in range(32)]


@pytest.fixture
def tokenizer():
    tokenizer = letters_tokenizer()
    tokenizer.eos_token = "<s>"
    return tokenizer


def trainer_of(model, tokenizer, folder, peft_config=None, **options):
    config = SFTConfig(
        str(folder), per_device_train_batch_size=4, report_to="none", save_strategy="no", use_cpu=True, bf16=False,
        logging_steps=1, disable_tqdm=True, **options,
    )  # fmt: skip
    data = Dataset.from_dict({"text": TEXTS})
    return SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_the_loss_falls(kind, lora, packing, tokenizer, tmp_path):
    options = {"packing": True, "max_length": 128} if packing else {}
    rate = 1e-2 if lora else 5e-3
    peft_config = LoraConfig() if lora else None
    trainer = trainer_of(tiny_model(kind), tokenizer, tmp_path, peft_config, max_steps=8, learning_rate=rate, **options)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert all(0 < log["grad_norm"] < 1e4 for log in logs)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained) if lora else "model.embed_tokens.weight" in trained


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_loss_is_that_of_the_model_whose_logits_are_capped(packing, tokenizer, tmp_path):
    model = tiny_model("post_up", output_logit_soft_cap=2.0)
    model.lm_head.weight.data *= 10
    options = {"packing": True, "max_length": 128} if packing else {}
    trainer = trainer_of(model, tokenizer, tmp_path, max_steps=1, learning_rate=0.0, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        expected = model.eval()(**batch).loss
    trainer.train()
    assert_near(torch.tensor(trainer.state.log_history[0]["loss"]), expected, 1e-4)


def test_what_decays_is_said_by_a_method(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(SFTTrainer, "get_decay_parameter_names", lambda trainer, model: decaying(model))
    trainer = trainer_of(tiny_model("pre_up_slstm"), tokenizer, tmp_path, max_steps=1, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == set(decaying(trainer.model)) and decayed < set(names.values())


def test_a_model_is_loaded_by_its_path(tokenizer, tmp_path):
    tiny_model("post_up").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = trainer_of(str(tmp_path / "model"), tokenizer, tmp_path / "run", max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_packed_texts_have_the_loss_of_separate_ones(kind, tokenizer, tmp_path):
    model = tiny_model(kind)
    trainer = trainer_of(model, tokenizer, tmp_path, packing=True, max_length=256, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["input_ids"]) == 1 and "attention_mask" not in batch
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 4
    total = count = 0
    with torch.no_grad():
        model.eval()
        packed = model(**batch).loss
        for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
            labels = batch["labels"][:, start:end].clone()
            labels[:, 0] = -100  # which nothing comes before
            if (tokens := int((labels != -100).sum())) > 0:
                total += tokens * model(batch["input_ids"][:, start:end], labels=labels).loss
                count += tokens
    assert_near(packed, total / count, 1e-5)
