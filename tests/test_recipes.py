"""The recipes of the papers: what is set, the learning rate at each step, and what is refused."""

import pytest
import torch
from models import random_ids, tiny_model
from transformers import Trainer

from modeling_xlstm.training_xlstm import Windows, XLSTMTrainer, recipe


PAPERS = ("xlstm", "xlstm-7b")


def trainer_of(folder, paper="xlstm-7b", cls=XLSTMTrainer, **options):
    settings = {
        "per_device_train_batch_size": 3, "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "no",
    }  # fmt: skip
    args = recipe(str(folder), paper, **{**settings, **options})
    return cls(model=tiny_model("post_up_slstm"), args=args, train_dataset=Windows(random_ids(1, 400)[0], 3, 8))


def schedule_of(folder, steps, paper="xlstm-7b", **options):
    """The learning rate as a function of the step, of which there are `steps`."""
    trainer = trainer_of(folder, paper, **options)
    trainer.create_optimizer_and_scheduler(steps)
    (peak, *_), (factor, *_) = trainer.lr_scheduler.base_lrs, trainer.lr_scheduler.lr_lambdas
    return lambda step: peak * factor(step)


# what is set


@pytest.mark.parametrize("paper", PAPERS)
def test_the_optimizer_is_that_of_the_papers(paper, tmp_path):
    trainer = trainer_of(tmp_path, paper)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert {group["lr"] for group in optimizer.param_groups} == {{"xlstm": 1e-3, "xlstm-7b": 5e-4}[paper]}
    assert trainer.args.max_grad_norm == 0.5


def test_options_are_other_values_and_change_no_other_recipe(tmp_path):
    args = recipe(str(tmp_path), learning_rate=1e-4, max_steps=7, bf16=False)
    assert (args.learning_rate, args.max_steps, args.bf16) == (1e-4, 7, False)
    args.lr_scheduler_kwargs["min_lr_ratio"] = 0.5
    assert recipe(str(tmp_path)).lr_scheduler_kwargs["min_lr_ratio"] == 0.1


@pytest.mark.parametrize(
    ("available", "native", "use_cpu"),
    [(True, True, False), (True, False, False), (False, True, False), (True, True, True)],
)
def test_bfloat16_is_on_where_the_gpu_that_trains_has_it(available, native, use_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    asked = {}
    monkeypatch.setattr(
        "modeling_xlstm.training_xlstm.TrainingArguments", lambda folder, **options: asked.update(options)
    )
    recipe(str(tmp_path), use_cpu=use_cpu)
    assert asked["bf16"] == (available and native and not use_cpu)
    recipe(str(tmp_path), fp16=True)
    assert not asked["bf16"]


# the schedule


def test_the_schedule_of_xlstm_7b_is_its_papers(tmp_path):
    rate = schedule_of(tmp_path, 550_000)
    steps = [0, 1_500, 3_000, 273_000, 543_000, 546_500, 549_999, 550_000]
    expected = [0, 2.5e-4, 5e-4, 5e-4 * 0.1**0.5, 5e-5, 2.5e-5, 5e-5 / 7000, 0]
    assert [rate(step) for step in steps] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps", [3, 20, 1_000, 12_345])
def test_a_shorter_training_has_a_schedule_of_the_same_shape(steps, tmp_path):
    """Within the step that shares are rounded up to."""
    rate = schedule_of(tmp_path, steps)
    warmup, cooldown = -(-steps * 3_000 // 550_000), -(-steps * 7_000 // 550_000)
    end = steps - cooldown
    assert rate(0) == rate(steps) == 0
    assert rate(warmup) == pytest.approx(5e-4)
    assert rate(end) == pytest.approx(5e-5)
    assert rate(steps - 1) == pytest.approx(5e-5 / cooldown)
    for k in range((end - warmup) // 2 + 1):
        assert rate(warmup + k) * rate(end - k) == pytest.approx(5e-4 * 5e-5)
    rates = [rate(step) for step in range(steps + 1)]
    assert rates[: warmup + 1] == sorted(set(rates[: warmup + 1]))
    assert rates[warmup:] == sorted(set(rates[warmup:]), reverse=True)


@pytest.mark.parametrize("cooldown", [0, 4, 0.2])
def test_warm_up_and_cool_down_are_numbers_or_shares(cooldown, tmp_path):
    options = {"decay_type": "exponential", "min_lr_ratio": 0.01, "num_cooldown_steps": cooldown}
    rate = schedule_of(tmp_path, 20, warmup_steps=6, lr_scheduler_kwargs=options, learning_rate=1.0)
    rates = [rate(step) for step in (0, 3, 6, 16, 18, 20)]
    expected = [0, 0.5, 1, 0.01, 0.005, 0] if cooldown else [0, 0.5, 1, 0.01 ** (10 / 14), 0.01 ** (12 / 14), 0.01]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1_000, 60_000])
def test_the_schedule_of_the_first_paper(steps, tmp_path):
    rate = schedule_of(tmp_path, steps, "xlstm")
    rates = [rate(step) for step in (0, 375, 750, 750 + (steps - 750) // 2, steps)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5.5e-4, 1e-4])


def test_other_schedules_are_those_of_transformers(tmp_path):
    options = {"decay_type": "linear", "num_decay_steps": 10}
    rate = schedule_of(tmp_path, 20, warmup_steps=4, lr_scheduler_kwargs=options)
    assert [rate(step) for step in (0, 4, 10, 15, 20)] == pytest.approx([0, 5e-4, 5e-4, 2.5e-4, 0])
    trainer = trainer_of(tmp_path)
    trainer.lr_scheduler = given = torch.optim.lr_scheduler.ConstantLR(trainer.create_optimizer())
    assert trainer.create_scheduler(20) is given


def test_single_settings_of_the_schedule_may_be_others(tmp_path):
    rate = schedule_of(tmp_path, 1_000, lr_scheduler_kwargs={"min_lr_ratio": 0.2})
    assert rate(1_000 - 13) == pytest.approx(0.2 * 5e-4)
    args = recipe(str(tmp_path), lr_scheduler_kwargs={"decay_type": "exponential"})
    assert args.lr_scheduler_kwargs == recipe(str(tmp_path)).lr_scheduler_kwargs


def test_another_schedule_has_none_of_these_settings(tmp_path):
    rate = schedule_of(tmp_path, 20, lr_scheduler_type="cosine", warmup_steps=4)
    assert [rate(step) for step in (0, 4, 12, 20)] == pytest.approx([0, 5e-4, 2.5e-4, 0])


# a training


@pytest.mark.parametrize("paper", PAPERS)
def test_each_step_logs_its_learning_rate_and_the_norm_of_its_gradient(paper, tmp_path):
    trainer = trainer_of(tmp_path, paper, max_steps=12)
    trainer.train()
    *steps, _ = trainer.state.log_history
    rate = schedule_of(tmp_path, 12, paper)
    assert [step["learning_rate"] for step in steps] == pytest.approx([rate(i) for i in range(12)])
    assert all(0 < step["grad_norm"] < float("inf") for step in steps)


def test_what_is_resumed_goes_on_with_the_schedule(tmp_path):
    """From the warm-up, the decay and the cool-down."""
    kwargs = {"decay_type": "exponential", "min_lr_ratio": 0.1, "num_cooldown_steps": 4}
    options = {"max_steps": 12, "warmup_steps": 4, "lr_scheduler_kwargs": kwargs, "save_strategy": "steps"}
    whole = trainer_of(tmp_path / "whole", save_steps=2, **options)
    whole.train()
    for step in (2, 6, 10):
        resumed = trainer_of(tmp_path / "resumed", save_steps=20, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.log_history[:-1] == whole.state.log_history[:-1]
        assert len(resumed.state.log_history) == 13


# refused


def test_a_plain_trainer_refuses_the_exponential_decay(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_cooldown_steps'"):
        trainer_of(tmp_path, cls=Trainer, max_steps=12).train()


def test_another_paper_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^paper must be one of xlstm, xlstm-7b, got 'lstm'.$"):
        recipe(str(tmp_path), "lstm")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_cooldown_steps": 6}, "must be at least 0 and leave a step of 10 for the decay, got 4 and 6 steps"),
        ({"num_cooldown_steps": 0.55}, "must be at least 0 and leave a step of 10 for the decay, got 4 and 6 steps"),
        ({"num_cooldown_steps": -1}, "must be at least 0 and leave a step of 10 for the decay, got 4 and -10 steps"),
        ({"min_lr_ratio": 0}, "min_lr_ratio must be above 0 and at most 1 for an exponential decay, got 0"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio must be above 0 and at most 1 for an exponential decay, got 1.5"),
    ],
)
def test_a_decay_without_steps_or_end_is_refused(options, sentence, tmp_path):
    kwargs = {"decay_type": "exponential", "min_lr_ratio": 0.1, **options}
    with pytest.raises(ValueError, match=sentence):
        schedule_of(tmp_path, 10, warmup_steps=4, lr_scheduler_kwargs=kwargs)


def test_two_steps_are_too_few_for_the_schedule_of_xlstm_7b(tmp_path):
    with pytest.raises(ValueError, match="must be at least 0 and leave a step of 2 for the decay, got 1 and 1 steps"):
        trainer_of(tmp_path, max_steps=2).train()
