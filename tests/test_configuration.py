"""Configuration: what is refused and how, derived sizes, the papers' architectures, saving, counting parameters."""

import dataclasses
import json
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from models import KINDS, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM, count_parameters


OWN_FIELDS = {f.name for f in dataclasses.fields(XLSTMConfig)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}

# field: an impossible value, and what the message says of it
IMPOSSIBLE = [
    ("vocab_size", 0, "vocab_size must be positive and finite, got 0"),
    ("vocab_size", 2**63, "vocab_size must be less than 2 .. 63, got 9223372036854775808"),
    ("vocab_size", 99.5, "'vocab_size' expected int, got float"),
    ("hidden_size", -32, "hidden_size must be positive and finite, got -32"),
    ("hidden_size", 33, "hidden_size . v_dim_factor must be a multiple of num_heads = 2, got 33"),
    ("num_hidden_layers", 0, "num_hidden_layers must be positive and finite, got 0"),
    ("num_heads", 0, "num_heads must be positive and finite, got 0"),
    ("num_heads", 3, "hidden_size . qk_dim_factor must be a multiple of num_heads = 3, got 16"),
    ("block_types", ["mlstm"], "block_types must have num_hidden_layers = 2 entries, got 1"),
    ("block_types", ["mlstm", "lstm"], "block_types must hold 'mlstm' or 'slstm', got 'lstm' at position 1"),
    ("block_types", "mlstm", "'block_types' expected a list, got str"),
    ("mlstm_block", "post", "mlstm_block must be one of post_up, pre_up, got 'post'"),
    ("mlstm_input_gate", "softmax", "mlstm_input_gate must be one of exp, sigmoid, got 'softmax'"),
    ("qk_dim_factor", 0.01, "hidden_size . qk_dim_factor must be a multiple of num_heads = 2, got 0"),
    ("qk_dim_factor", math.nan, "qk_dim_factor must be positive and finite, got nan"),
    ("v_dim_factor", -1, "v_dim_factor must be positive and finite, got -1"),
    ("v_dim_factor", 0.66, "hidden_size . v_dim_factor must be a multiple of num_heads = 2, got 21"),
    ("mlstm_proj_factor", math.inf, "mlstm_proj_factor must be positive and finite, got inf"),
    ("mlstm_qkv_block_size", 0, "mlstm_qkv_block_size must be positive and finite, got 0"),
    ("conv_kernel_size", -1, "conv_kernel_size must be zero or positive and finite, got -1"),
    ("ffn_proj_factor", 0.0, "ffn_proj_factor must be positive and finite, got 0.0"),
    ("ffn_proj_factor", 0.01, "hidden_size . ffn_proj_factor must be at least 1, got 0.32"),
    ("ffn_round_up_to_multiple_of", 0, "ffn_round_up_to_multiple_of must be positive and finite, got 0"),
    ("slstm_num_heads", 0, "slstm_num_heads must be positive and finite, got 0"),
    ("slstm_conv_kernel_size", -4, "slstm_conv_kernel_size must be zero or positive and finite, got -4"),
    ("slstm_ffn_proj_factor", -1.3, "slstm_ffn_proj_factor must be zero or positive and finite, got -1.3"),
    (
        "slstm_bias_init",
        "powerlaw",
        "slstm_bias_init must be one of powerlaw_blockdependent, small_init, zeros, standard, got 'powerlaw'",
    ),
    ("slstm_recurrent_init", "ones", "slstm_recurrent_init must be one of zeros, standard, got 'ones'"),
    ("norm_type", "batch_norm", "norm_type must be one of rms_norm, layer_norm, got 'batch_norm'"),
    ("norm_eps", 0.0, "norm_eps must be positive and finite, got 0.0"),
    ("eps", -1e-6, "eps must be zero or positive and finite, got -1e-06"),
    ("gate_soft_cap", 0.0, "gate_soft_cap must be positive and finite, got 0.0"),
    ("gate_soft_cap", 1e-46, "gate_soft_cap must be at least 2 .. -126, got 1e-46"),
    ("output_logit_soft_cap", 1e-300, "output_logit_soft_cap must be at least 2 .. -126, got 1e-300"),
    ("output_logit_soft_cap", -30.0, "output_logit_soft_cap must be positive and finite, got -30.0"),
    ("use_bias", "yes", "'use_bias' expected bool, got str"),
    ("add_out_norm", 1, "'add_out_norm' expected bool, got int"),
    ("dropout", 1.0, "dropout must be at least 0 and less than 1, got 1.0"),
    ("dropout", -0.1, "dropout must be at least 0 and less than 1, got -0.1"),
    ("context_length", 0, "context_length must be positive and finite, got 0"),
    ("chunk_size", 0, "chunk_size must be positive and finite, got 0"),
    ("backend", "cuda", "backend must be one of auto, torch, triton, got 'cuda'"),
    ("keep_gates_in_fp32", None, "'keep_gates_in_fp32' expected bool, got NoneType"),
    ("use_cache", "no", "'use_cache' expected bool, got str"),
    ("tie_word_embeddings", None, "'tie_word_embeddings' expected bool, got NoneType"),
    ("pad_token_id", "<pad>", "'pad_token_id' expected int, got str"),
    ("pad_token_id", 2**63, "pad_token_id must be less than 2 .. 63, got 9223372036854775808"),
    ("eos_token_id", [0, -(2**70)], "eos_token_id must be less than 2 .. 63, got -1180591620717411303424"),
    ("bos_token_id", 0.5, "'bos_token_id' expected int, got float"),
    ("eos_token_id", ["</s>"], "'eos_token_id' expected int, got list"),
]


@pytest.mark.parametrize(("field", "value", "message"), IMPOSSIBLE, ids=lambda x: str(x)[:30])
def test_an_impossible_value_is_refused_with_field_value_and_legal_values(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**{field: value})


def test_every_field_of_its_own_has_an_impossible_value():
    assert OWN_FIELDS - {field for field, _, _ in IMPOSSIBLE} == set()


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("pre_up", {"num_heads": 3}, "the inner width .* must be a multiple of num_heads = 3, got 64"),
        ("pre_up", {"mlstm_qkv_block_size": 5}, "must be a multiple of mlstm_qkv_block_size = 5, got 64"),
        ("slstm", {"slstm_num_heads": 3}, "hidden_size must be a multiple of slstm_num_heads = 3, got 32"),
    ],
)
def test_widths_that_heads_or_blocks_do_not_divide_are_refused(kind, fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(kind, **fields)


def test_fields_of_blocks_that_are_not_there_are_not_checked():
    assert tiny_config("post_up", slstm_num_heads=3, mlstm_qkv_block_size=5).slstm_num_heads == 3
    assert tiny_config("slstm", num_heads=3, slstm_num_heads=2).num_heads == 3


def test_a_value_assigned_later_is_checked_before_it_is_saved(tmp_path):
    config = tiny_config()
    config.mlstm_block = "post"
    with pytest.raises(StrictDataclassError, match="mlstm_block must be one of post_up, pre_up, got 'post'"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("num_hidden_layers", 3), ("norm_type", "batch_norm")])
def test_a_value_assigned_later_is_checked_before_a_model_is_built(field, value):
    config = tiny_config()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=f"must have {field} = 3|{field} must be one of"):
        XLSTMForCausalLM(config)


@pytest.mark.parametrize("config", [None, "xlstm-7b", {}])
def test_a_model_is_built_from_a_configuration_only(config):
    with pytest.raises(TypeError, match=f"config must be an XLSTMConfig, got {type(config).__name__}"):
        XLSTMForCausalLM(config)


def test_fields_given_as_a_number_take_an_integer_as_well():
    floats = (
        "qk_dim_factor",
        "v_dim_factor",
        "mlstm_proj_factor",
        "ffn_proj_factor",
        "slstm_ffn_proj_factor",
        "norm_eps",
    )
    floats += ("eps", "gate_soft_cap", "output_logit_soft_cap")
    with_ints = tiny_config("post_up_slstm", dropout=0, **dict.fromkeys(floats, 1))
    with_floats = tiny_config("post_up_slstm", dropout=0.0, **dict.fromkeys(floats, 1.0))
    assert with_ints.to_dict() == with_floats.to_dict()
    assert with_ints.ffn_size == with_floats.ffn_size == 32
    XLSTMForCausalLM(with_ints)


def test_defaults_are_those_of_xlstm_7b():
    config = XLSTMConfig()
    assert (config.qk_size, config.inner_size, config.ffn_size) == (2048, 4096, 10944)
    assert config.block_types == ["mlstm"] * 32
    assert config.slstm_num_heads == config.num_heads == 8
    assert config.layer_types == ["linear_attention"] * 32


def test_an_slstm_block_may_have_no_feed_forward():
    config = tiny_config("slstm", slstm_ffn_proj_factor=0)
    assert config.slstm_ffn_size == 0
    assert XLSTMForCausalLM(config).model.layers[0].ffn is None


def test_from_ratio_places_the_slstm_blocks_at_the_end_of_each_period():
    config = XLSTMConfig.from_ratio("3:1", hidden_size=64, num_hidden_layers=8)
    assert config.ratio == "3:1"
    assert config.block_types == (["mlstm"] * 3 + ["slstm"]) * 2
    assert (config.mlstm_block, config.norm_type, config.norm_eps) == ("pre_up", "layer_norm", 1e-5)
    assert config.gate_soft_cap is config.output_logit_soft_cap is None
    assert XLSTMConfig.from_ratio("0:1", num_hidden_layers=2).block_types == ["slstm", "slstm"]
    assert XLSTMConfig.from_ratio("1:0", norm_type="rms_norm").norm_type == "rms_norm"
    assert len(XLSTMConfig.from_ratio("7:1").block_types) == 32


@pytest.mark.parametrize("ratio", ["7", "7:1:1", "0:0", "a:b", "-1:2", "", None])
def test_from_ratio_refuses_what_is_not_a_ratio(ratio):
    with pytest.raises(
        ValueError, match=f"ratio must be of the form 'mLSTM:sLSTM' such as '7:1' or '1:0', got {ratio!r}"
    ):
        XLSTMConfig.from_ratio(ratio)


@pytest.mark.parametrize("layers", [12, "8", 8.0])
def test_from_ratio_refuses_a_depth_that_is_not_whole_periods(layers):
    message = f"num_hidden_layers must be a multiple of 8 for the ratio 7:1, got {layers!r}"
    with pytest.raises(ValueError, match=message):
        XLSTMConfig.from_ratio("7:1", num_hidden_layers=layers)


def test_presets_have_the_papers_blocks_and_take_overrides():
    config = XLSTMConfig.preset("xlstm-125m-7:1", vocab_size=1000)
    assert (config.hidden_size, config.num_hidden_layers, config.num_heads, config.vocab_size) == (768, 24, 4, 1000)
    assert [i for i, kind in enumerate(config.block_types) if kind == "slstm"] == [3, 20]
    config = XLSTMConfig.preset("xlstm-1.3b-7:1")
    assert [i for i, kind in enumerate(config.block_types) if kind == "slstm"] == [3, 5, 7, 40, 42, 44]
    assert XLSTMConfig.preset("xlstm-7b").to_dict() == XLSTMConfig().to_dict()


@pytest.mark.parametrize("name", ["xlstm-7B", "xlstm-125m", "xlstm-125m-3:1", "xlstm-2b-1:0", 7])
def test_an_unknown_preset_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"preset must be one of xlstm-7b, xlstm-125m-1:0, .*, got {name!r}"):
        XLSTMConfig.preset(name)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("xlstm-7b", 6_865_424_896),
        ("xlstm-125m-1:0", 163_806_144),
        ("xlstm-350m-1:0", 409_290_112),
        ("xlstm-760m-1:0", 840_427_392),
        ("xlstm-1.3b-1:0", 1_422_559_616),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, parameters):
    # The first paper's table gives 163.8M, 409.3M, 840.4M and 1422.6M.
    assert count_parameters(XLSTMConfig.preset(name, vocab_size=50304)) == parameters


class _Allocations(TorchDispatchMode):
    """Counts the elements of tensors that operations return in real memory."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                self.elements += x.numel()
        return result


def test_counting_parameters_allocates_nothing():
    with _Allocations() as allocations:
        torch.zeros(3)
    assert allocations.elements == 3
    with _Allocations() as allocations:
        count_parameters(XLSTMConfig.preset("xlstm-7b"))
    assert allocations.elements == 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_counted_parameters_are_those_of_the_model(kind, tied):
    config = tiny_config(kind, tie_word_embeddings=tied, use_bias=tied)
    model = XLSTMForCausalLM(config)
    assert count_parameters(config) == model.num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_configuration_loads_as_it_was(kind, tmp_path):
    config = tiny_config(kind, dropout=0.25, eos_token_id=[3, 4])
    config.save_pretrained(tmp_path)
    loaded = XLSTMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "xlstm_lm"


def test_a_broken_config_file_is_refused_by_field(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_heads": 5}))
    with pytest.raises(
        StrictDataclassError, match="hidden_size . qk_dim_factor must be a multiple of num_heads = 5, got 16"
    ):
        XLSTMConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"vocab_size": 2**60}, "vocab_size"),
        ({"ffn_round_up_to_multiple_of": 2**62}, "hidden_size * ffn_proj_factor, rounded up,"),
        ({"mlstm_block": "pre_up", "conv_kernel_size": 2**60}, "conv_kernel_size"),
        (
            {"block_types": ["slstm"] * 2, "slstm_ffn_proj_factor": 1e17},
            "hidden_size * slstm_ffn_proj_factor, rounded up,",
        ),
    ],
)
def test_a_matrix_whose_bytes_cannot_be_counted_is_refused(fields, what):
    with pytest.raises(StrictDataclassError) as caught:
        XLSTMConfig(hidden_size=32, num_heads=2, num_hidden_layers=2, **fields)
    assert str(caught.value.__cause__).startswith(f"{what} must be at most 2 ** 28, got ")
