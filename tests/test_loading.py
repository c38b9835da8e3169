"""Saving and loading: exact, sharded, offloaded, by the Auto classes, tied, resized, and without Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from models import KINDS, TWO_KINDS, VOCAB, assert_near, random_ids, randomise, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from modeling_xlstm import (
    XLSTMConfig,
    XLSTMForCausalLM,
    XLSTMForSequenceClassification,
    XLSTMForTokenClassification,
    XLSTMModel,
)


ROOT = Path(__file__).parents[1]


def run_python(code, *arguments):
    """Runs `code` in a fresh interpreter that finds the package; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_loads_exactly(kind, tmp_path):
    model, ids = tiny_model(kind, use_bias=True), random_ids(2, 20)
    model.save_pretrained(tmp_path)
    loaded, info = XLSTMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_sharded_model_loads_exactly(kind, tmp_path):
    model, ids = tiny_model(kind), random_ids(2, 20)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(XLSTMForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


# Some versions of Transformers take the device of weights on disk for that of the computation.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
def test_a_file_from_before_is_not_read_in_place_of_new_shards(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = randomise(tiny_model(), 1)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = XLSTMForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in model.state_dict().items())


def is_whole(folder: Path, model: Any) -> bool:
    """Whether the model is what loads, and nothing else is there."""
    loaded = XLSTMForCausalLM.from_pretrained(folder)
    same = all(torch.equal(x, y) for x, y in zip(loaded.parameters(), model.parameters(), strict=True))
    return same and loaded.config.gate_soft_cap == model.config.gate_soft_cap and not any(folder.glob(".*"))


@pytest.mark.parametrize("original", [False, True])
def test_a_model_that_is_half_saved_over_another_leaves_that(original, tmp_path, monkeypatch):
    """Their configurations differ too, which are saved first."""
    options = {"max_shard_size": "20KB", "save_original_format": original}
    before, after = randomise(tiny_model(), 1), tiny_model(gate_soft_cap=3.0)
    before.save_pretrained(tmp_path, **options)
    save, left = transformers.modeling_utils.safe_save_file, [1]

    def stop(*args, **kwargs):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        save(*args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        after.save_pretrained(tmp_path, **options)
    assert is_whole(tmp_path, before)
    monkeypatch.undo()
    (tmp_path / ".saving-of-one-that-was-killed").mkdir()
    after.save_pretrained(tmp_path, **options)
    assert is_whole(tmp_path, after)


def test_a_model_that_is_not_saved_for_a_bad_option_leaves_the_one_before(tmp_path):
    before = randomise(tiny_model(), 1)
    before.save_pretrained(tmp_path, max_shard_size="20KB")
    with pytest.raises(ValueError, match="Unit .* not supported"):
        tiny_model().save_pretrained(tmp_path, max_shard_size="nonsense")
    assert is_whole(tmp_path, before)


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_a_variant_is_saved_beside_the_model(size, tmp_path):
    model, variant = randomise(tiny_model(), 1), tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    for _ in range(2):
        variant.save_pretrained(tmp_path, max_shard_size=size, variant="small")
    assert is_whole(tmp_path, model)
    loaded = XLSTMForCausalLM.from_pretrained(tmp_path, variant="small")
    assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), variant.parameters(), strict=True))
    assert len([*tmp_path.glob("model.small*")]) == len([*tmp_path.glob("*small*")]) - (size == "20KB")


def test_no_kernels_are_fetched_because_a_checkpoint_says_so(tmp_path, monkeypatch):
    """Transformers takes attention from the Hub by the name of a repository, if the package `kernels` is there."""
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    kinds = ("attn_implementation", "experts_implementation")
    names = [name for kind in kinds for name in (kind, f"_{kind}", f"_{kind}_internal")]
    fetched = dict.fromkeys(names, "kernels-community/x@0123456789abcdef0123456789abcdef01234567")
    path.write_text(json.dumps(json.loads(path.read_text()) | fetched))
    monkeypatch.setattr(transformers.integrations.hub_kernels, "is_kernels_available", lambda *_, **__: True)
    monkeypatch.setattr(transformers.integrations.hub_kernels, "get_kernel", None)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation in (None, "eager", "sdpa")
    assert "kernels-community" not in XLSTMConfig.from_pretrained(tmp_path).to_json_string()


def test_a_weight_of_another_shape_is_refused_before_all_others_take_memory(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["vocab_size"]
    path.write_text(json.dumps(fields))
    monkeypatch.setattr(XLSTMForCausalLM, "_finalize_model_loading", None)  # which makes the missing ones
    with pytest.raises(ValueError, match=r"must have shape \(50304, 32\) by the configuration, got \(99, 32\)\.$"):
        XLSTMForCausalLM.from_pretrained(tmp_path)


def test_weights_that_are_cut_off_are_refused_by_their_file(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"The weights in \S+model.safetensors cannot be read: "):
        XLSTMForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_model_offloaded_to_disk_computes_exactly(kind, tmp_path):
    model, ids = tiny_model(kind), random_ids(2, 20)
    model.save_pretrained(tmp_path / "model")
    options = {"device_map": "auto", "max_memory": {"cpu": "30KB"}, "offload_folder": tmp_path / "offload"}
    loaded = XLSTMForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert "disk" in loaded.hf_device_map.values()
    assert any(p.is_meta for p in loaded.parameters())
    output = loaded(ids)
    assert torch.equal(output.logits, model(ids).logits)
    next_ids = random_ids(2, 1, seed=1)
    decoded = loaded(next_ids, past_key_values=output.past_key_values).logits
    assert_near(decoded, model(torch.cat((ids, next_ids), 1)).logits[:, -1:])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=5, do_sample=False), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_on_disk_compute_the_same_with_gates_in_float32(dtype, tmp_path):
    kind, ids = "pre_up_slstm", random_ids(2, 20)
    tiny_model(kind).save_pretrained(tmp_path / "model")
    devices = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    options = {"device_map": devices, "offload_folder": tmp_path / "offload"}
    offloaded = XLSTMForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype, **options)
    loaded = XLSTMForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    assert torch.equal(offloaded(ids).logits, loaded(ids).logits)


@torch.no_grad()
def test_a_model_without_head_loads_from_one_with_head_and_back(tmp_path):
    model, ids = tiny_model("pre_up_slstm"), random_ids(2, 20)
    model.save_pretrained(tmp_path / "lm")
    base = XLSTMModel.from_pretrained(tmp_path / "lm")
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    restored, info = XLSTMForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert torch.equal(restored.model(ids).last_hidden_state, base(ids).last_hidden_state)


AUTO = """
import sys, torch, modeling_xlstm
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification,
    AutoModelForTokenClassification)
folder = sys.argv[1]
ids = torch.load(f"{folder}/ids.pt")
assert type(AutoConfig.from_pretrained(folder)) is modeling_xlstm.XLSTMConfig
classes = AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification
for cls in classes:
    model = cls.from_pretrained(folder)
    with torch.no_grad():
        output = model(ids)[0]
    print(type(model).__name__, tuple(output.shape))
    if cls is AutoModelForCausalLM:
        torch.save(output, f"{folder}/logits.pt")
"""


@torch.no_grad()
def test_auto_classes_load_a_saved_model_in_a_fresh_process(tmp_path):
    model, ids = tiny_model("pre_up_slstm", num_labels=3), random_ids(2, 20)
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "ids.pt")
    assert run_python(AUTO, tmp_path).split("\n")[:-1] == [
        "XLSTMModel (2, 20, 32)",
        f"XLSTMForCausalLM (2, 20, {VOCAB})",
        "XLSTMForSequenceClassification (2, 3)",
        "XLSTMForTokenClassification (2, 20, 3)",
    ]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(ids).logits)


def test_auto_classes_make_new_models():
    config = tiny_config("pre_up_slstm", num_labels=3)
    for auto, cls in (
        (AutoModel, XLSTMModel),
        (AutoModelForCausalLM, XLSTMForCausalLM),
        (AutoModelForSequenceClassification, XLSTMForSequenceClassification),
        (AutoModelForTokenClassification, XLSTMForTokenClassification),
    ):
        assert type(auto.from_config(config)) is cls
    assert type(AutoConfig.for_model("xlstm_lm", hidden_size=64)) is XLSTMConfig


WITHOUT_TRITON = """
import importlib.abc, sys

class NoTriton(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("triton is not here")

sys.meta_path.insert(0, NoTriton())
sys.modules["triton"] = None

import torch
from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM

for fields in ({}, {"mlstm_block": "pre_up", "block_types": ["mlstm", "slstm"]}):
    config = XLSTMConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_heads=2, eos_token_id=None, **fields)
    model = XLSTMForCausalLM(config)
    ids = torch.randint(0, 99, (2, 70))
    model(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    print(tuple(model.eval().generate(ids, max_new_tokens=3, do_sample=False).shape))
assert not any(name.split(".")[0] == "triton" and module for name, module in sys.modules.items())
"""


def test_everything_runs_where_triton_cannot_be_imported():
    assert run_python(WITHOUT_TRITON) == "(2, 73)\n(2, 73)\n"


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("keep", [True, False])
def test_gates_stay_float32_in_a_half_precision_model_when_asked_to(keep, dtype, tmp_path):
    model, ids = tiny_model("pre_up_slstm", keep_gates_in_fp32=keep), random_ids(2, 20)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    in_float32 = {name for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    gates = {f"model.layers.{i}.mixer.gate_proj.{which}" for i in (0, 2) for which in ("weight", "bias")}
    gates |= {f"model.layers.1.mixer.gate_{which}" for which in ("weight", "bias")}
    assert in_float32 == (gates if keep else set())
    assert loaded.dtype == getattr(torch, dtype)
    for name in in_float32:
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    assert loaded(ids).logits.dtype == getattr(torch, dtype)
    assert torch.isfinite(loaded(ids).logits).all()


@torch.no_grad()
def test_tied_embeddings_are_one_tensor_saved_once(tmp_path):
    model, ids = tiny_model("pre_up_slstm", tie_word_embeddings=True), random_ids(2, 20)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_untied_embeddings_are_two_tensors():
    model = tiny_model()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@torch.no_grad()
@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_resized_both_ways(tied, mean_resizing, tmp_path):
    model, ids = tiny_model("pre_up_slstm", tie_word_embeddings=tied), random_ids(2, 20)
    old = model(ids).logits
    model.resize_token_embeddings(VOCAB + 13, mean_resizing=mean_resizing)
    assert model.config.vocab_size == model.vocab_size == model.get_input_embeddings().num_embeddings == VOCAB + 13
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    larger = model(ids).logits
    assert larger.shape[-1] == VOCAB + 13
    assert torch.equal(larger[..., :VOCAB], old)
    new = model.get_input_embeddings().weight[VOCAB:]
    assert torch.isfinite(new).all()
    assert new.std() < 2 * model.get_input_embeddings().weight[:VOCAB].std()
    assert torch.isfinite(model(torch.full((1, 2), VOCAB + 12)).logits).all()
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, larger)
    model.resize_token_embeddings(VOCAB, mean_resizing=mean_resizing)
    assert torch.equal(model(ids).logits, old)
    with pytest.raises(IndexError, match=f"input_ids must be from 0 to {VOCAB - 1}"):
        model(torch.full((1, 2), VOCAB + 12))


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_sequence_classes_do_not_depend_on_the_side_of_padding(kind):
    model = tiny_model(kind, cls=XLSTMForSequenceClassification, num_labels=3)
    texts = [random_ids(1, length, seed=length)[0] for length in (4, 11, 1)]
    expected = torch.cat([model(text[None]).logits for text in texts])
    for side in ("left", "right"):
        ids = torch.ones(3, 11, dtype=torch.long)
        mask = torch.zeros(3, 11, dtype=torch.long)
        for i, text in enumerate(texts):
            where = slice(11 - len(text), 11) if side == "left" else slice(0, len(text))
            ids[i, where], mask[i, where] = text, 1
        assert_near(model(ids, attention_mask=mask).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("cls", [XLSTMForSequenceClassification, XLSTMForTokenClassification])
def test_a_classifier_compiles_to_one_graph(cls):
    model, ids = tiny_model(cls=cls), random_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_near(compiled(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_token_classes_are_a_projection_of_hidden_states(kind, tmp_path):
    model, ids = tiny_model(kind, cls=XLSTMForTokenClassification, num_labels=3), random_ids(2, 11)
    expected = model.score(model.model(ids).last_hidden_state)
    assert_near(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForTokenClassification.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"^labels must have shape \(2, 11\) like the logits, got \(11, 2\).$"):
        model(ids, labels=ids.T)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value, tmp_path):
    tiny_model("pre_up_slstm").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mixer.gate_weight"][0, 0, 0, 0] = value
    save_file(weights, path, metadata={"format": "pt"})
    message = "must be finite, got NaN or infinity in model.layers.1.mixer.gate_weight"
    for load in (XLSTMForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    with pytest.raises(ValueError, match=message):
        XLSTMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)


def test_weights_missing_from_a_checkpoint_start_as_in_a_new_model(tmp_path):
    tiny_model("post_up").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    missing = {f"model.layers.1.mixer.gate_proj.{which}" for which in ("weight", "bias")}
    missing |= {"model.layers.0.ffn.down_proj.weight", "model.layers.1.ffn_norm.weight"}
    save_file({k: v for k, v in weights.items() if k not in missing}, path, metadata={"format": "pt"})
    loaded, info = XLSTMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == missing
    mixer = loaded.model.layers[1].mixer
    assert torch.equal(mixer.gate_proj.bias, torch.tensor([-10.0, -10, 3, 6]))
    assert not mixer.gate_proj.weight.any()
    assert (loaded.model.layers[1].ffn_norm.weight == 1).all()
    assert 0.15 < loaded.model.layers[0].ffn.down_proj.weight.std() < 0.2  # 2 / (layers sqrt(hidden_size)) = 0.177
    for name, weight in loaded.named_parameters():
        assert name in missing or torch.equal(weight, weights[name])


def test_an_impossible_saved_configuration_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mlstm_block": "sideways"}))
    with pytest.raises(Exception, match="mlstm_block must be one of post_up, pre_up, got 'sideways'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
