"""Weights quantised by bitsandbytes and torchao: which ones are, what is computed, saved, trained and refused."""

import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from models import TWO_KINDS, assert_near, random_ids, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    PreTrainedTokenizerFast,
    xLSTMConfig,
)
from transformers.models.xlstm.modeling_xlstm import xLSTMForCausalLM

from benchmarks import quantization
from convert.errors import ConversionError
from convert.source import open_source
from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM, count_parameters
from modeling_xlstm.__main__ import main
from modeling_xlstm.configuration_xlstm import PAPER_SIZES


DEMO = quantization.MODEL
FORMS = quantization.QUANTIZED
SAVED = [name for name in FORMS if "int4" not in name]  # torchao cannot save its int4 weights for a CPU
ADAPTERS = {"LoRA": {}, "DoRA": {"use_dora": True}}
# DoRA over bitsandbytes' 8 bits fails in PEFT 0.21, whatever the model.
ADAPTED = [(name, form) for name in SAVED for form in ADAPTERS if (name, form) != ("bitsandbytes 8-bit", "DoRA")]
PROJECTIONS = ("qkvo_proj", "out_proj", "up_proj", "down_proj")
KINDS_OF_BLOCK = ("post_up", "pre_up", "slstm", "pre_up_slstm")
WEIGHTS_ONLY = [name for name in FORMS if name != "bitsandbytes 8-bit"]  # which rounds the inputs of products too
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def exact_scales(monkeypatch):
    """Where a CPU multiplies bfloat16, bitsandbytes rounds inputs, and 4-bit weights for good, to that."""
    if find_spec("bitsandbytes"):
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)


def load(name, folder, device="cpu", changes=None, **options):
    """The model in `folder`, quantised, with `changes` of the quantiser's fields; skips where that is not installed."""
    pytest.importorskip(name.split()[0])
    config = FORMS[name](device)
    for field, value in (changes or {}).items():
        setattr(config, field, value)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=device, **options)


def is_quantized(weight):
    return type(weight) is not nn.Parameter or not weight.is_floating_point()


def wide_model(kind, hidden_size=64, **fields):
    """A tiny model whose projections can be quantised in groups of 64."""
    return tiny_model(kind, hidden_size=hidden_size, ffn_round_up_to_multiple_of=64, **fields)


@torch.no_grad()
def with_rounded_weights(quantized, model):
    """`model`, with the weights that the quantised projections multiply by."""
    for path, module in quantized.named_modules():
        if path.endswith(PROJECTIONS):
            plain = model.get_submodule(path)
            rows = module(torch.eye(plain.in_features))
            plain.weight.copy_((rows if plain.bias is None else rows - plain.bias).mT)
    return model


# what is quantised


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["post_up_slstm", "pre_up_slstm"])
def test_projections_are_quantised_and_all_else_is_as_saved(kind, keep, name, tmp_path):
    model = wide_model(kind, keep_gates_in_fp32=keep, use_bias=True, tie_word_embeddings=keep)
    model.save_pretrained(tmp_path)
    loaded = load(name, tmp_path, dtype="bfloat16")
    expected = {path for path, _ in model.named_parameters() if re.search(r"(qkvo|out|up|down)_proj\.weight$", path)}
    assert {path for path, weight in loaded.named_parameters() if is_quantized(weight)} == expected
    for path, weight in model.named_parameters():
        dtype = torch.float32 if keep and ".gate_" in path else torch.bfloat16
        if path not in expected:
            assert torch.equal(loaded.get_parameter(path), weight.to(dtype)), path
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is keep


@pytest.mark.parametrize("name", FORMS)
def test_modules_named_by_the_user_are_left_alone_besides_the_gates(name, tmp_path):
    wide_model("post_up").save_pretrained(tmp_path)
    field = "llm_int8_skip_modules" if name.startswith("bitsandbytes") else "modules_to_not_convert"
    loaded = load(name, tmp_path, changes={field: ["lm_head", ".*down_proj"]})
    found = {path.split(".")[-2] for path, weight in loaded.named_parameters() if is_quantized(weight)}
    assert found == {"qkvo_proj", "out_proj", "up_proj"}


def test_groups_of_64_divide_the_inputs_of_every_projection_of_published_sizes():
    widths = set()
    for size in ["xlstm-7b", *(f"xlstm-{size}-7:1" for size in PAPER_SIZES)]:
        with torch.device("meta"):
            model = XLSTMForCausalLM(XLSTMConfig.preset(size, num_hidden_layers=2, block_types=["mlstm", "slstm"]))
        widths |= {module.in_features for path, module in model.named_modules() if path.endswith(PROJECTIONS)}
    assert all(width % 64 == 0 for width in widths)


# what is computed


@torch.no_grad()
@pytest.mark.parametrize("name", WEIGHTS_ONLY)
@pytest.mark.parametrize("kind", KINDS_OF_BLOCK)
def test_logits_are_those_of_the_rounded_weights(kind, name, tmp_path):
    model, ids = wide_model(kind), random_ids(2, 20)
    model.save_pretrained(tmp_path)
    quantized = load(name, tmp_path)
    exact, logits = model(ids).logits, quantized(ids).logits
    assert_near(logits, with_rounded_weights(quantized, model)(ids).logits)
    assert not torch.allclose(logits, exact, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", KINDS_OF_BLOCK)
def test_quantised_steps_equal_one_pass(kind, name, tmp_path):
    wide_model(kind).save_pretrained(tmp_path)
    # bitsandbytes multiplies a channel in float16 where any token of a call is beyond a threshold
    changes = {"llm_int8_threshold": 0.0} if name == "bitsandbytes 8-bit" else {}
    model, ids = load(name, tmp_path, changes=changes), random_ids(2, 20)
    whole, cache, pieces = model(ids).logits, None, []
    for piece in ids.split([17, 1, 1, 1], 1):
        output = model(piece, past_key_values=cache)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert_near(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", FORMS)
def test_the_residual_stream_keeps_the_dtype_of_the_model(name, dtype, tmp_path):
    wide_model("pre_up_slstm").save_pretrained(tmp_path)
    with torch.no_grad():
        output = load(name, tmp_path, dtype=dtype)(random_ids(2, 20), output_hidden_states=True)
    assert {str(x.dtype) for x in (*output.hidden_states, output.logits)} == {f"torch.{dtype}"}
    assert torch.isfinite(output.logits).all()


@pytest.mark.parametrize("name", FORMS)
def test_the_trained_model_writes_the_same_text_with_and_without_cache(name):
    inputs = AutoTokenizer.from_pretrained(DEMO)("It is a truth universally acknowledged, that", return_tensors="pt")
    # by default bitsandbytes' 8 bits tell columns apart by the largest input of any token of a call
    changes = {"llm_int8_threshold": 0.0} if name == "bitsandbytes 8-bit" else {}
    model = load(name, DEMO, changes=changes, dtype="float32")
    texts = [model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert texts[0].shape[1] == inputs["input_ids"].shape[1] + 8
    assert torch.equal(*texts)


def test_generation_is_compiled_where_the_quantiser_allows_it(tmp_path):
    wide_model("post_up").save_pretrained(tmp_path)
    model, ids = load("torchao int8", tmp_path), random_ids(2, 20)
    torch._dynamo.reset()
    compilation = CompileConfig(fullgraph=True, mode="default", backend="eager")
    compilation._compile_all_devices = True
    text = model.generate(ids, max_new_tokens=6, do_sample=False, compile_config=compilation)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(text, model.generate(ids, max_new_tokens=6, do_sample=False, disable_compile=True))


# saved and loaded


@torch.no_grad()
@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_quantised_model_loads_as_it_was_saved(kind, name, tmp_path):
    wide_model(kind, tie_word_embeddings=True).save_pretrained(tmp_path / "plain")
    model, ids = load(name, tmp_path / "plain", dtype="bfloat16"), random_ids(2, 20)
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "quantised")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    assert [(path, type(w), w.dtype) for path, w in loaded.named_parameters()] == [
        (path, type(w), w.dtype) for path, w in model.named_parameters()
    ]
    assert torch.equal(loaded(ids).logits, logits)


@pytest.mark.parametrize("name", SAVED)
def test_a_quantised_checkpoint_has_one_dtype_or_is_refused(name, tmp_path):
    """Some versions of Transformers give the dtype asked for to only some weights beside those of bitsandbytes."""
    wide_model("pre_up_slstm").save_pretrained(tmp_path / "plain")
    load(name, tmp_path / "plain", dtype="bfloat16").save_pretrained(tmp_path / "quantised")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", dtype="float32", device_map="cpu")
        outcome = str(loaded(random_ids(2, 20)).logits.dtype)
    except ValueError as refusal:
        outcome = str(refusal)
    sentence = "must load in the dtype that it was saved in, torch.bfloat16, got dtype=torch.float32."
    assert outcome in ("torch.float32", f"A quantised checkpoint {sentence}")


def test_the_int4_weights_of_torchao_for_a_cpu_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="Unsupported tensor type: .*Int4OpaqueTensor"):
        load("torchao int4, groups of 64", DEMO).save_pretrained(tmp_path)


@pytest.mark.parametrize("name", SAVED)
def test_the_command_line_reads_a_quantised_checkpoint(name, tmp_path, capsys):
    load(name, DEMO).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    count = count_parameters(XLSTMConfig.from_pretrained(DEMO))
    assert f"parameters    {count:,}, of which" in capsys.readouterr().out
    text = ["generate", "--model", str(tmp_path), "--prompt", "My lord,", "--max-new-tokens", "3", "--device", "cpu"]
    assert main(text) == 0
    assert capsys.readouterr().out.startswith("My lord,")


# trained


deprecated = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft calls it


@deprecated
@pytest.mark.parametrize(("name", "form"), ADAPTED)
@pytest.mark.parametrize("kind", ["post_up_slstm", "pre_up_slstm"])
def test_adapters_train_over_quantised_weights_and_are_saved_and_loaded(kind, name, form, tmp_path):
    wide_model(kind).save_pretrained(tmp_path / "base")
    ids = random_ids(2, 20)
    model = train_lora(load(name, tmp_path / "base", dtype="bfloat16"), ids, **ADAPTERS[form]).eval()
    adapted = {path.split(".")[-1] for path, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"up_proj", "down_proj"} | ({"qkvo_proj", "out_proj"} if kind == "post_up_slstm" else set())
    model.save_pretrained(tmp_path / "adapters")
    base = prepare_model_for_kbit_training(load(name, tmp_path / "base", dtype="bfloat16"))
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    with torch.no_grad():
        logits = loaded(ids).logits
        assert torch.equal(logits, model(ids).logits)
        with loaded.disable_adapter():
            assert not torch.allclose(logits, loaded(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.fixture
def as_this_cpu_does(exact_scales, monkeypatch):
    monkeypatch.undo()
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    if not modules.has_avx512bf16():
        pytest.skip("needs a CPU with AVX512-BF16, where bitsandbytes changes the order of weights")


@pytest.mark.parametrize("kind", ["post_up_slstm", "pre_up_slstm"])
def test_gradients_through_4_bits_are_the_same_after_an_evaluation(kind, as_this_cpu_does, tmp_path):
    wide_model(kind).save_pretrained(tmp_path)
    base = load("bitsandbytes 4-bit (nf4)", tmp_path, dtype="float32")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    ids = random_ids(2, 20)

    def gradients():
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = gradients()
    with torch.no_grad():
        model.eval()(ids)
    assert all(map(torch.equal, gradients(), before))


def test_4_bits_that_are_in_another_order_are_not_trained(as_this_cpu_does, tmp_path):
    wide_model("post_up").save_pretrained(tmp_path)
    model = load("bitsandbytes 4-bit (nf4)", tmp_path, dtype="bfloat16")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    with torch.no_grad():
        adapted.eval()(random_ids(1, 5))
    with pytest.raises(RuntimeError, match="4-bit weights must be trained before .*qkvo_proj.* load the model again"):
        adapted.train()


def train_lora(quantized, ids, **options):
    """Three steps of adapters without settings: every gradient is finite, the loss falls, and what is below stays."""
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items() if type(tensor) is torch.Tensor}
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    prepared = prepare_model_for_kbit_training(quantized, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(prepared, lora).train()
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in trained)
        assert sum(p.grad is not None for p in model.parameters()) == len(trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.base_model.model.state_dict().items()}
    assert all(torch.equal(after[name].to(tensor.dtype), tensor) for name, tensor in before.items())
    return model


# refused


def test_groups_that_do_not_divide_a_projection_are_refused_unless_it_is_left_alone(tmp_path):
    pytest.importorskip("torchao")
    wide_model("post_up", hidden_size=128, ffn_proj_factor=2.5).save_pretrained(tmp_path)
    config = quantization.torchao_int4(128, "cpu")
    options = {"quantization_config": config, "device_map": "cpu"}
    sentence = "must divide the columns of model.layers.0.ffn.down_proj.weight, of shape (128, 320), got 128."
    with pytest.raises(ValueError, match=f"^group_size {re.escape(sentence)}$"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    config.modules_to_not_convert = [".*down_proj", "lm_head"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    quantized = {name for name, weight in model.named_parameters() if is_quantized(weight)}
    kinds = "mixer.qkvo_proj", "mixer.out_proj", "ffn.up_proj"
    assert quantized == {f"model.layers.{i}.{kind}.weight" for i in range(len(model.model.layers)) for kind in kinds}


@pytest.mark.parametrize("name", FORMS)
def test_a_quantised_model_is_not_saved_in_the_format_of_transformers(name, tmp_path):
    wide_model("post_up").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="needs a model that is not quantised, got one that is"):
        load(name, tmp_path / "plain").save_pretrained(tmp_path / "to", save_original_format=True)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("name", SAVED)
def test_a_quantised_checkpoint_of_transformers_is_refused(name, tmp_path):
    sizes = {"hidden_size": 64, "embedding_dim": 64, "num_hidden_layers": 1, "num_blocks": 1, "num_heads": 2}
    xLSTMForCausalLM(xLSTMConfig(vocab_size=99, **sizes)).save_pretrained(tmp_path / "plain")
    pytest.importorskip(name.split()[0])
    options = {"quantization_config": FORMS[name]("cpu"), "device_map": "cpu"}
    xLSTMForCausalLM.from_pretrained(tmp_path / "plain", **options).save_pretrained(tmp_path / "quantised")
    with pytest.raises(ValueError, match="of Transformers' own xLSTM must not be quantised, got one"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options)) is XLSTMForCausalLM


@pytest.mark.parametrize("name", SAVED)
def test_a_quantised_checkpoint_is_not_converted(name, tmp_path):
    wide_model("post_up").save_pretrained(tmp_path / "plain")
    load(name, tmp_path / "plain").save_pretrained(tmp_path / "quantised")
    with pytest.raises(ConversionError, match="The weights must not be quantised"):
        open_source(str(tmp_path / "quantised"))


# measured


def test_every_token_but_the_first_is_predicted_once():
    tokens = np.arange(2, 1500)
    ids, labels = quantization.windows(tokens, count=100)
    predicted = labels[:, 1:][labels[:, 1:] != quantization.IGNORED]
    assert predicted.tolist() == tokens[1:].tolist()
    assert all(torch.equal(ids[i][labels[i] >= 0], labels[i][labels[i] >= 0]) for i in range(len(ids)))
    assert quantization.windows(tokens, count=2)[0][:, 0].tolist() == [2, 2 + 2 * 511]


@pytest.fixture
def held_out(tmp_path):
    """A text as `checkpoints/prepare_data.py` writes it, in the tokens of another tokenizer: of single bytes."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(tmp_path)
    text = "<|endoftext|>It is a truth universally acknowledged.<|endoftext|>My lord, “no”.<|endoftext|>"
    np.save(tmp_path / "held_out.npy", np.array(fast(text)["input_ids"], dtype=np.uint16))
    return tmp_path, text


def test_held_out_text_is_read_in_tokens_of_the_model(held_out):
    folder, text = held_out
    tokens = quantization.read_tokens(folder)
    assert tokens.tolist() == AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"]
    assert tokens[0] == tokens[-1] == 0


def test_the_benchmark_prints_every_form(held_out, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantization, "obstacle", lambda tests: "")
    monkeypatch.setattr(quantization, "WINDOW", 16)
    quantization.main(["--data", str(held_out[0])])
    lines = capsys.readouterr().out.splitlines()
    rows = {name: cells for name, *cells in (line.strip("| ").split(" | ") for line in lines[3:])}
    assert list(rows) == ["bfloat16", "float32", *FORMS]
    sizes = {name: int(cells[0].replace(",", "")) for name, cells in rows.items()}
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    projections = sum(module.weight.nbytes for path, module in model.named_modules() if path.endswith(PROJECTIONS))
    rest = sum(weight.nbytes for weight in model.parameters()) - projections
    assert sizes["bfloat16"] == rest + projections
    for name, size in sizes.items():
        if name in FORMS:  # with scales
            bits = 9 if "8" in name else 5
            assert rest < size <= rest + projections * bits / 16


def test_the_benchmark_prints_nothing_if_a_test_fails(held_out, monkeypatch, capsys):
    monkeypatch.setattr(quantization, "obstacle", lambda tests: "1 failed")
    with pytest.raises(SystemExit, match="No numbers without correct results: 1 failed"):
        quantization.main(["--data", str(held_out[0])])
    assert not capsys.readouterr().out


# on a GPU


@pytest.mark.gpu
@needs_a_gpu
@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_the_trained_model_reads_and_writes_quantised_on_a_gpu(name):
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune must be in want."
    ids = tokenizer(text, return_tensors="pt")["input_ids"].cuda()
    plain, model = AutoModelForCausalLM.from_pretrained(DEMO, device_map="cuda"), load(name, DEMO, device="cuda")
    expected, loss = plain(ids, labels=ids).loss, model(ids, labels=ids).loss
    assert 0 < (loss - expected).abs() < 0.05 * expected
    cache, logits = None, []
    for token in ids.split(1, 1):
        output = model(token, past_key_values=cache)
        cache = output.past_key_values
        logits.append(output.logits)
    stepwise = nn.functional.cross_entropy(torch.cat(logits, 1)[0, :-1].float(), ids[0, 1:])
    assert (stepwise - loss).abs() < 0.02 * expected
    assert model.generate(ids, max_new_tokens=20, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.gpu
@needs_a_gpu
@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_a_model_quantised_on_a_gpu_loads_as_it_was_saved(name, tmp_path):
    model, ids = load(name, DEMO, device="cuda"), random_ids(2, 20).cuda()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.gpu
@needs_a_gpu
@deprecated
@pytest.mark.parametrize("name", SAVED)
def test_lora_trains_over_quantised_weights_on_a_gpu(name):
    train_lora(load(name, DEMO, device="cuda", dropout=0.0), random_ids(2, 20).cuda())
