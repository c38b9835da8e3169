"""Transformers' own format, such as that of NX-AI/xLSTM-7b: read by `from_pretrained` as it is, written on request."""

import itertools
import json

import pytest
import torch
from models import random_ids, tiny_model
from origins import ORIGINS, assert_same_logits, assert_same_weights, save, text, weights
from peers import in_transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments, xLSTMConfig

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM, XLSTMModel


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["transformers", "transformers_bias", "transformers_odd_width"])
def test_checkpoints_of_transformers_load_as_they_are(name, fused, tmp_path):
    build, fields = ORIGINS[name]
    origin = build(**fields)
    folder = save(origin, tmp_path / "origin")
    if fused:
        save_file(fuse(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    published = {
        "model_type": "xlstm", "architectures": ["xLSTMForCausalLM"], "vocab_size": 99, "torch_dtype": "float32",
        "embedding_dim": origin.config.hidden_size, "num_blocks": origin.config.num_hidden_layers,
        "num_heads": origin.config.num_heads, "use_bias": origin.config.use_bias,
        "chunkwise_kernel": "chunkwise--triton_xl_chunk", "sequence_kernel": "native_sequence__triton",
        "step_kernel": "triton", "mode": "inference", "weight_mode": "single", "add_qk_norm": False,
        "add_post_blocks_norm": True, "igate_bias_init_range": -10, "force_bos_token_insert": True,
        "mlstm_round_up_to_multiple_of": 64, "head_dim": 32, "cell_norm_eps": 1e-6,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(published), encoding="utf-8")
    ids = text()
    for loader in (AutoModelForCausalLM, XLSTMForCausalLM):
        model, info = loader.from_pretrained(folder, output_loading_info=True)
        assert type(model) is XLSTMForCausalLM and not any(info.values())
        assert_same_logits(model(ids).logits, origin.logits(ids))
        assert model.config.eos_token_id == 2
    bare = XLSTMModel.from_pretrained(folder)
    assert torch.equal(bare(ids).last_hidden_state, model.model(ids).last_hidden_state)


def fuse(single: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as `xLSTMLarge` fuses them."""
    fused = dict(single)
    groups = {
        "mlstm_layer.qkv_opreact": ["mlstm_layer.q", "mlstm_layer.k", "mlstm_layer.v", "mlstm_layer.ogate_preact"],
        "mlstm_layer.ifgate_preact": ["mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"],
        "ffn.proj_up_gate_z": ["ffn.proj_up_gate", "ffn.proj_up"],
    }
    blocks = {name.split(".")[2] for name in single if name.startswith("backbone.blocks.")}
    for block, (new, old), kind in itertools.product(blocks, groups.items(), ("weight", "bias")):
        names = [f"backbone.blocks.{block}.{part}.{kind}" for part in old]
        if names[0] in fused:
            fused[f"backbone.blocks.{block}.{new}.{kind}"] = torch.cat([fused.pop(part) for part in names])
    return fused


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformers", "transformers_bias", "transformers_odd_width"])
def test_save_pretrained_writes_the_format_of_transformers_when_asked_to(name, tmp_path):
    build, fields = ORIGINS[name]
    origin = build(**fields)
    folder = save(origin, tmp_path / "origin")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "theirs", save_original_format=True)
    assert_same_weights(weights(tmp_path / "theirs"), weights(folder))
    again = type(origin.model).from_pretrained(tmp_path / "theirs")
    ids = random_ids(2, 17)
    assert torch.equal(again(ids, use_cache=False).logits, origin.logits(ids))
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))["model_type"] == "xlstm_lm"
    assert_same_weights(weights(tmp_path / "ours"), model.state_dict())


@torch.no_grad()
def test_save_pretrained_writes_both_weights_of_a_tied_model_for_transformers(tmp_path):
    """Its own xLSTM does not tie, and would start from a random projection."""
    model = tiny_model("post_up", hidden_size=64, tie_word_embeddings=True)
    model.save_pretrained(tmp_path, save_original_format=True)
    written = weights(tmp_path)
    assert torch.equal(written["lm_head.weight"], written["backbone.embeddings.weight"])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: tiny_model("pre_up_slstm"), {}, "mlstm_block must be 'post_up' in the format transformers"),
        (lambda: tiny_model("post_up", mlstm_input_gate="sigmoid"), {}, "mlstm_input_gate must be 'exp' in the format"),
        (lambda: tiny_model("post_up", gate_soft_cap=None), {}, "gate_soft_cap must be a number in the format"),
        (lambda: tiny_model("post_up", cls=XLSTMModel), {}, "that of a language model, got XLSTMModel"),
        (lambda: tiny_model("post_up"), {"push_to_hub": True}, "to a directory only, got push_to_hub=True"),
    ],
)
def test_what_transformers_cannot_express_is_not_saved_for_it(make, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make().save_pretrained(tmp_path / "to", save_original_format=True, **options)
    assert not (tmp_path / "to").exists()


def test_an_adapted_configuration_of_transformers_keeps_what_is_not_about_kernels():
    fields = {"model_type": "xlstm", "embedding_dim": 64, "num_blocks": 2, "num_heads": 2, "vocab_size": 99}
    labels = {"0": "bad", "1": "fair", "2": "good"}
    config = XLSTMConfig.from_dict({**fields, "id2label": labels, "torch_dtype": "bfloat16", "author": "me"})
    assert (config.num_labels, config.id2label[2], config.dtype, config.author) == (3, "good", torch.bfloat16, "me")
    assert (config.hidden_size, config.num_hidden_layers, config.model_type) == (64, 2, "xlstm_lm")


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about the CPU
def test_a_quantised_model_is_the_same_from_either_format(bits, tmp_path):
    save(in_transformers("own", hidden=128), tmp_path / "theirs")
    AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    quantisation = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder, quantization_config=quantisation)
        for folder in ("theirs", "ours")
    )
    kinds = {name: type(module).__name__ for name, module in theirs.named_modules()}
    assert kinds["model.layers.0.mixer.qkvo_proj"] == f"Linear{bits}bit" + ("Lt" if bits == 8 else "")
    ids = random_ids(2, 17)
    assert torch.equal(theirs(ids).logits, ours(ids).logits)


@torch.no_grad()
def test_shards_and_half_precision_load_as_they_are(tmp_path):
    origin = in_transformers("own")
    origin.model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in whole.state_dict().items():
        loaded = model.state_dict()[name]
        assert torch.equal(loaded, weight if "gate_proj" in name else weight.bfloat16()), name


def test_a_training_of_such_a_model_resumes_bit_by_bit(tmp_path):
    """`Trainer` loads its checkpoints without conversion: they are in the format of the model in memory."""
    save(in_transformers("own"), tmp_path / "origin")
    data = [{"input_ids": random_ids(1, 16, i)[0], "labels": random_ids(1, 16, i)[0]} for i in range(16)]
    options = {"max_steps": 4, "save_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trained = []
    for checkpoint in (None, str(tmp_path / "run" / "checkpoint-2")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "origin")
        trainer = Trainer(model, TrainingArguments(str(tmp_path / "run"), **options), train_dataset=data)
        trainer.train(resume_from_checkpoint=checkpoint)
        trained.append(model.state_dict())
    assert_same_weights(trained[1], trained[0])


@torch.no_grad()
def test_embeddings_that_only_a_configuration_ties_stay_untied(tmp_path):
    """Transformers' own xLSTM writes such checkpoints, since it takes no notice of its own field."""
    origin = in_transformers("own", tie_word_embeddings=True)
    save(origin, tmp_path / "origin")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "origin")
    assert not model.config.tie_word_embeddings
    before = model.lm_head.weight.clone()
    model.tie_weights()
    model.resize_token_embeddings(120)
    assert torch.equal(model.lm_head.weight[:99], before)
    model.save_pretrained(tmp_path / "theirs", save_original_format=True)
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")(text()).logits, model(text()).logits)


def test_embeddings_whose_projection_is_missing_are_tied(tmp_path):
    folder = save(in_transformers("own", tie_word_embeddings=True), tmp_path / "origin")
    stored = load_file(folder / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


def test_a_configuration_of_transformers_itself_is_refused_with_the_way_to_ours():
    theirs = xLSTMConfig(hidden_size=64, num_hidden_layers=1, num_heads=2, vocab_size=9)
    with pytest.raises(TypeError, match=r"must be an XLSTMConfig, got xLSTMConfig; XLSTMConfig.from_dict\(config"):
        XLSTMForCausalLM(theirs)
    assert XLSTMForCausalLM(XLSTMConfig.from_dict(theirs.to_dict())).config.hidden_size == 64
    for name in ("embedding_dim", "num_blocks"):
        with pytest.raises(
            ValueError, match=f"{name} must be given as (hidden_size|num_hidden_layers), as it is called here"
        ):
            XLSTMConfig(**{name: 64})
