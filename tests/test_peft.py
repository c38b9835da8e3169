"""PEFT over every kind of block: LoRA without settings, saved, loaded, merged, and trained with checkpointing."""

import pytest
import torch
from models import KINDS, TWO_KINDS, assert_near, gradients, random_ids, tiny_model, use_checkpointing
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import nn

from modeling_xlstm import XLSTMForCausalLM, XLSTMForSequenceClassification
from modeling_xlstm.configuration_xlstm import LORA_TARGETS


FORMS = {"LoRA": {}, "DoRA": {"use_dora": True}, "rsLoRA": {"use_rslora": True}}


def adapted(kind="post_up", model=None, **options):
    """A model with LoRA whose adapters change what it computes."""
    torch.manual_seed(0)
    options = {"init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(tiny_model(kind) if model is None else model, LoraConfig(**options)).eval()
    for name, weight in model.named_parameters():
        if "magnitude" in name:  # of DoRA, which starts as that of the sum, and changes nothing
            weight.data *= torch.rand_like(weight) + 0.5
    return model


@torch.no_grad()
def logits_of(model, ids):
    return model(ids).logits


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_settings_all_projections_are_adapted_and_nothing_else(kind, options):
    model = adapted(kind, **options)
    names = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    plain = tiny_model(kind).named_modules()
    expected = {name for name, module in plain if type(module) is nn.Linear and name.split(".")[-1] in LORA_TARGETS}
    assert names == expected
    assert any(name.endswith("down_proj") for name in names)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_saved_loaded_and_merged(kind, options, tmp_path):
    ids, base = random_ids(2, 20), tiny_model(kind)
    base.save_pretrained(tmp_path / "base")
    expected = logits_of(base, ids)
    model = adapted(kind, model=type(base).from_pretrained(tmp_path / "base"), **options)
    logits = logits_of(model, ids)
    assert (logits - expected).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapters")
    loaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path / "adapters").eval()
    assert torch.equal(logits_of(loaded, ids), logits)
    assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters").eval(), ids), logits)
    with loaded.disable_adapter():
        assert torch.equal(logits_of(loaded, ids), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(base)
    assert_near(logits_of(merged, ids), logits, 5e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(type(base).from_pretrained(tmp_path / "merged"), ids), logits_of(merged, ids))
    assert torch.equal(logits_of(model.unload(), ids), expected)


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_an_adapted_model_generates_with_a_cache_what_it_generates_without(kind):
    model, ids = adapted(kind), random_ids(2, 9)
    options = {"max_new_tokens": 20, "do_sample": False}
    text = model.generate(input_ids=ids, **options)
    assert torch.equal(text, model.generate(input_ids=ids, use_cache=False, **options))
    assert not torch.equal(text, tiny_model(kind).generate(ids, **options))


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_checkpointing_changes_no_gradient_of_an_adapter(kind):
    ids, results = random_ids(2, 40), []
    for checkpointing in (False, True):
        model = adapted(kind).train()
        if checkpointing:
            use_checkpointing(model.base_model.model)
        model(input_ids=ids, labels=ids).loss.backward()
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys()
    assert all("lora_" in name for name in results[0])
    for name, gradient in results[0].items():
        assert gradient.any()
        assert_near(results[1][name], gradient, 1e-5)


def test_other_modules_are_trained_and_saved_whole(tmp_path):
    model, ids = adapted(modules_to_save=["embed_tokens", "lm_head", "gate_proj"]), random_ids(2, 20)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    logits = logits_of(model.eval(), ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(logits_of(loaded, ids), logits)
    merged, before = loaded.merge_and_unload(), tiny_model()
    for name in ("model.embed_tokens", "lm_head", "model.layers.1.mixer.gate_proj"):
        assert not torch.equal(merged.get_submodule(name).weight, before.get_submodule(name).weight)


def test_a_classifier_is_adapted_and_keeps_its_head(tmp_path):
    model = adapted(model=tiny_model(cls=XLSTMForSequenceClassification, num_labels=3), task_type="SEQ_CLS")
    ids = random_ids(2, 20)
    model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 2])).loss.backward()
    assert {name.split(".")[-2] for name in gradients(model) if "lora_" not in name} == {"default"}
    model.save_pretrained(tmp_path)
    base = tiny_model(cls=XLSTMForSequenceClassification, num_labels=3)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded.base_model.model.score.weight, model.base_model.model.score.weight)


def test_a_module_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"Target modules .*attention.* not found in the base model"):
        adapted(target_modules=["attention"])


def test_transformers_loads_an_adapter_that_it_has_saved(tmp_path):
    tiny_model("post_up").save_pretrained(tmp_path / "model")
    model = XLSTMForCausalLM.from_pretrained(tmp_path / "model")
    model.add_adapter(LoraConfig(init_lora_weights=False, target_modules=["qkvo_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    expected = model(random_ids(1, 7)).logits
    for source in ("model", "adapter"):
        other = XLSTMForCausalLM.from_pretrained(tmp_path / source)
        if source == "model":
            other.load_adapter(tmp_path / "adapter")
        torch.testing.assert_close(other(random_ids(1, 7)).logits, expected, atol=0, rtol=0)
