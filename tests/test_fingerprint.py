"""Fingerprints: equal for what reads a text into the same state or ids, different for all else."""

import copy
import dataclasses
import hashlib

import pytest
import torch
from models import KINDS, assert_near, random_ids, states, tiny_config, tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_generation import letters_tokenizer
from test_quantization import FORMS, load
from tokenizers import normalizers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM, XLSTMForSequenceClassification, XLSTMModel, fingerprint
from modeling_xlstm.fingerprint import model_fingerprint, tokenizer_fingerprint


DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def checksums(x):
    return fingerprint._checksums(x, {})


def as_bytes(x):
    """Little-endian, and zeros up to a whole number of words."""
    data = x.view(torch.uint8).numpy().tobytes()
    return data + bytes(-len(data) % 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numbers", [1, 5, 3 * fingerprint.WORDS + 7])
def test_a_checksum_is_the_sum_of_words_times_keys(numbers, dtype):
    x = (50 * torch.randn(numbers)).to(dtype)
    data = as_bytes(x)
    words = [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data), 4)]
    stream = hashlib.shake_256(b"modeling_xlstm").digest(8 * fingerprint.WORDS)
    keys = [int.from_bytes(stream[i : i + 8], "little") | 1 for i in range(0, len(stream), 8)]
    expected = [
        sum(word * key for word, key in zip(words[i : i + fingerprint.WORDS], keys, strict=False)) % 2**64
        for i in range(0, len(words), fingerprint.WORDS)
    ]
    assert [value % 2**64 for value in checksums(x).tolist()] == expected


@pytest.mark.parametrize("layout", ["transposed", "every second", "odd address"])
def test_a_checksum_is_of_the_numbers_wherever_they_are(layout):
    x = torch.randn(300, 200).bfloat16()
    views = {
        "transposed": x.t().contiguous().t(),
        "every second": torch.stack((x, x + 1), -1)[..., 0],
        "odd address": torch.cat((x[:1, :1].flatten(), x.flatten()))[1:],
    }
    assert torch.equal(checksums(views[layout]), checksums(x))


def test_a_checksum_does_not_depend_on_how_much_is_handled_at_once(monkeypatch):
    x = torch.randn(1000, 999)
    expected = checksums(x)
    for bytes_at_once in (4 * fingerprint.WORDS, 1 << 30):
        monkeypatch.setattr(fingerprint, "PIECE_ON_CPU", bytes_at_once)
        assert torch.equal(checksums(x), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checksum_is_the_same_on_a_gpu(dtype):
    x = (50 * torch.randn(3 * fingerprint.WORDS + 7)).to(dtype)
    assert torch.equal(checksums(x.cuda()).cpu(), checksums(x))


@torch.no_grad()
def numbered(model):
    """The same model in every version of PyTorch."""
    for i, weight in enumerate(model.parameters()):
        weight.copy_(torch.arange(weight.numel()).view_as(weight) / 128 - i)
    return model


def test_the_fingerprint_of_a_model_is_that_in_files_written_before():
    model = numbered(XLSTMForCausalLM(tiny_config("pre_up_slstm")))
    assert model_fingerprint(model) == "c84ba46643e26091b598f1f0a526f143d31ce8a5017ff1d34fbea4ad16635101"


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_is_that_of_the_stack_under_any_head_and_after_saving(kind, tmp_path):
    model = tiny_model(kind)
    expected = model_fingerprint(model)
    assert model_fingerprint(model.model) == model_fingerprint(tiny_model(kind)) == expected
    assert model_fingerprint(torch.compile(model, backend="eager")) == expected
    model.save_pretrained(tmp_path)
    for cls in (AutoModelForCausalLM, XLSTMModel):
        assert model_fingerprint(cls.from_pretrained(tmp_path)) == expected
    other_head = XLSTMForSequenceClassification(model.config)
    other_head.model.load_state_dict(model.model.state_dict())
    assert model_fingerprint(other_head) == expected
    assert model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)) != expected


@torch.no_grad()
def change(model, what):
    layer = model.model.layers[0]
    weight = layer.mixer.qkvo_proj.weight
    if what == "a bit of a number":
        weight.view(torch.int32)[3, 5] ^= 1
    elif what == "the sign of a zero":
        layer.ffn_norm.weight[0] = -0.0
    elif what == "two signs":
        weight[4, 1] *= -1
        weight[7, 9] *= -1
    elif what == "every sign":
        weight.neg_()
    elif what == "the order of two rows":
        weight[[0, 9]] = weight[[9, 0]]
    elif what == "the order of two columns":
        weight[:, [0, 9]] = weight[:, [9, 0]]
    elif what == "two layers' places":
        model.model.layers[0], model.model.layers[1] = model.model.layers[1], layer
    elif what == "the last embedding":
        model.model.embed_tokens.weight[-1, -1] += 1
    elif what == "the dtype of one weight":
        layer.mixer.out_proj.weight.data = layer.mixer.out_proj.weight.double()
    elif what == "a bias":
        layer.mixer.out_proj.bias = nn.Parameter(torch.zeros(32))


@pytest.mark.parametrize(
    "what",
    [
        "a bit of a number", "the sign of a zero", "two signs", "every sign", "the order of two rows",
        "the order of two columns", "two layers' places", "the last embedding", "the dtype of one weight", "a bias",
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_change_of_a_weight_changes_the_fingerprint(what, dtype):
    model = tiny_model().to(dtype)
    with torch.no_grad():
        model.model.layers[0].ffn_norm.weight[0] = 0.0
    before = model_fingerprint(model)
    if what == "a bit of a number" and dtype == torch.bfloat16:
        model.model.layers[0].mixer.qkvo_proj.weight.data.view(torch.int16)[3, 5] ^= 1
    else:
        change(model, what)
    assert model_fingerprint(model) != before


# a legal value of each field that differs from that of every tiny model
OTHER_VALUES = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_heads": 4,
    "block_types": ["slstm", "slstm", "mlstm"],
    "mlstm_block": {"post_up": "pre_up", "pre_up": "post_up"},
    "mlstm_input_gate": {"exp": "sigmoid", "sigmoid": "exp"},
    "qk_dim_factor": 1.0,
    "v_dim_factor": 2.0,
    "mlstm_proj_factor": 3.0,
    "mlstm_qkv_block_size": 8,
    "conv_kernel_size": 3,
    "ffn_proj_factor": 1.0,
    "ffn_round_up_to_multiple_of": 64,
    "slstm_num_heads": 4,
    "slstm_conv_kernel_size": 0,
    "slstm_ffn_proj_factor": 2.0,
    "norm_type": {"rms_norm": "layer_norm", "layer_norm": "rms_norm"},
    "norm_eps": 0.1,
    "eps": 0.1,
    "gate_soft_cap": 2.0,
    "use_bias": True,
    "add_out_norm": False,
    "keep_gates_in_fp32": False,
}
# fields that change no state, or only its rounding
NO_MATTER = {
    "slstm_bias_init": "zeros",
    "slstm_recurrent_init": "standard",
    "output_logit_soft_cap": 3.0,
    "dropout": 0.5,
    "chunk_size": 4,
    "backend": "torch",
    "context_length": 77,
    "tie_word_embeddings": True,
    "use_cache": False,
    "pad_token_id": 5,
    "bos_token_id": 6,
    "eos_token_id": 7,
}
FIELDS = [field for field in XLSTMConfig.__annotations__ if field in {f.name for f in dataclasses.fields(XLSTMConfig)}]


def test_each_field_of_a_configuration_is_judged():
    assert set(FIELDS) == OTHER_VALUES.keys() | NO_MATTER.keys()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["post_up_slstm", "pre_up_slstm"])
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_changes_states_changes_the_fingerprint(field, kind):
    model, ids = tiny_model(kind), random_ids(2, 20)
    value = (OTHER_VALUES | NO_MATTER)[field]
    if isinstance(value, dict):
        value = value[getattr(model.config, field)]
    fields = {field: value}
    if field in ("num_hidden_layers", "block_types"):
        fields = {"num_hidden_layers": 3, "block_types": ["slstm", "slstm", "mlstm"]}
    other = XLSTMForCausalLM(tiny_config(kind, **fields)).eval()
    weights = other.state_dict()
    ours = {name: x for name, x in model.model.state_dict(prefix="model.").items() if name in weights}
    ours = {name: x for name, x in ours.items() if x.shape == weights[name].shape}
    other.load_state_dict(ours, strict=False)
    same = model_fingerprint(other) == model_fingerprint(model)
    assert field in OTHER_VALUES or same
    if same:
        before, after = (states(m(ids, use_cache=True).past_key_values) for m in (model, other))
        assert before.keys() == after.keys()
        for name, state in before.items():
            assert_near(after[name], state)


def test_numbers_of_a_configuration_may_be_written_as_integers():
    model = tiny_model(eps=1.0)
    expected = model_fingerprint(model)
    model.config.eps = 1
    assert model_fingerprint(model) == expected


def adapted(**options):
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["qkvo_proj", "gate_proj"], **options)
    return get_peft_model(tiny_model(), lora)


def test_an_adapted_model_is_another_for_each_of_its_settings():
    model = adapted()
    assert model_fingerprint(adapted()) == model_fingerprint(model)
    with model.disable_adapter():
        disabled = model_fingerprint(model)
    found = [model_fingerprint(tiny_model()), model_fingerprint(model), disabled]
    found += [model_fingerprint(adapted(**options)) for options in ({"lora_alpha": 3}, {"r": 4}, {"use_dora": True})]
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.0.mixer.qkvo_proj.lora_B.default").weight[0, 0] = 1
    found.append(model_fingerprint(model))
    model.add_adapter("second", model.peft_config["default"])
    found.append(model_fingerprint(model))
    model.set_adapter("second")
    found.append(model_fingerprint(model))
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    found += [model_fingerprint(get_peft_model(tiny_model(), prompt)) for _ in range(2)]  # of random prompts
    assert len(set(found)) == len(found)


def test_an_adapted_head_is_a_head():
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    assert model_fingerprint(get_peft_model(tiny_model(), lora)) == model_fingerprint(tiny_model())


def test_a_buffer_that_is_not_saved_counts():
    """Such as the random projections that some adapters make from a seed."""
    model, others = tiny_model(), []
    for seed in (0, 1, 1):
        other = copy.deepcopy(model)
        projection = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        other.model.layers[0].mixer.register_buffer("projection", projection, persistent=False)
        others.append(model_fingerprint(other))
    assert len({model_fingerprint(model), *others}) == 3
    assert others[1] == others[2]


@pytest.mark.filterwarnings("ignore")  # of the quantisers
def test_a_quantised_model_is_another(tmp_path):
    plain = tiny_model(hidden_size=64, ffn_round_up_to_multiple_of=64)
    plain.save_pretrained(tmp_path)
    found = {model_fingerprint(plain)}
    for name in FORMS:
        quantized = [load(name, tmp_path) for _ in range(2)]
        first, again = map(model_fingerprint, quantized)
        assert first == again
        found.add(first)
        quantized[0](random_ids(1, 5))
        assert model_fingerprint(quantized[0]) == first
    assert len(found) == 1 + len(FORMS)


def test_weights_that_are_elsewhere_are_refused(tmp_path):
    sentence = r"must be in memory in full, not offloaded or sharded, got {} for {}\.$"
    with pytest.raises(ValueError, match=sentence.format("the meta device", "embed_tokens.weight")):
        model_fingerprint(tiny_model().to("meta"))
    model = tiny_model()
    model.model.layers[1].mixer.out_proj.weight.data = torch.empty(0)  # as where weights are gathered for each use
    with pytest.raises(ValueError, match=sentence.format(r"Tensor of shape \(0,\)", "layers.1.mixer.out_proj.weight")):
        model_fingerprint(model)


def test_weights_that_are_sharded_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = tiny_model()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="not offloaded or sharded, got DTensor .* for embed_tokens.weight"):
            model_fingerprint(model)
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_no_xlstm_or_no_tensor_has_no_fingerprint():
    for model, name in ((nn.Linear(2, 2), "Linear"), (tiny_config(), "XLSTMConfig"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"model must be an xLSTM of this package, got {name}"):
            model_fingerprint(model)

    class Packed(nn.Linear):
        def get_extra_state(self):
            return {"bits": 4}

        def set_extra_state(self, state):
            pass

    model = tiny_model()
    model.model.layers[0].mixer.out_proj = Packed(32, 32)
    with pytest.raises(TypeError, match=r"must be tensors, got dict for layers\.0\.mixer\.out_proj\._extra_state"):
        model_fingerprint(model)


def test_a_tokenizer_is_the_same_after_saving_and_whatever_it_was_called_with(tmp_path):
    tokenizer = letters_tokenizer()
    expected = tokenizer_fingerprint(tokenizer)
    tokenizer(["some", "texts"], padding=True, truncation=True, max_length=3)
    tokenizer.padding_side = "right"
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(tokenizer) == expected
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == expected


def test_a_tokenizer_with_another_token_or_step_is_another():
    tokenizers = [letters_tokenizer() for _ in range(3)]
    tokenizers[1].add_tokens(["word"])
    tokenizers[2].backend_tokenizer.normalizer = normalizers.Lowercase()
    slow = [ByT5Tokenizer(), ByT5Tokenizer(extra_ids=7), ByT5Tokenizer(pad_token="<none>")]
    found = [tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers + slow]
    assert len(set(found)) == 6
    assert tokenizer_fingerprint(ByT5Tokenizer()) == found[3]
    with pytest.raises(TypeError, match="tokenizer must be one of Transformers, got str"):
        tokenizer_fingerprint("xlstm")
