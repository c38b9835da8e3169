"""Converted checkpoints give what the code they come from gives, and come back to it bit by bit.

Every parameter of every peer is random, which `peers.randomise` checks.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from peers import VOCAB, Peer, in_transformers, large, paper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM
from modeling_xlstm.checkpoint_xlstm import config_from, from_native, to_native
from modeling_xlstm.modeling_xlstm import weight_shapes


pytestmark = pytest.mark.usefixtures("one_thread")

# Length of a text: its seed. Where the normaliser of a head nearly vanishes, the norm after it magnifies the rounding
# of both sides, in some texts by 100. Of these texts, both sides compute every case to 5e-6. In float64 any will do.
TEXTS = {1: 39, 17: 70, 64: 51, 100: 54}

CASES: dict[str, tuple[Callable[..., Peer], dict[str, Any]]] = {
    "paper_mlstm": (paper, {}),
    "paper_slstm": (paper, {"slstm_at": "all"}),
    "paper_mixed": (paper, {"blocks": 3, "slstm_at": [1]}),
    "paper_one_head": (paper, {"heads": 1, "slstm_at": [0]}),
    "paper_odd_width": (paper, {"hidden": 72, "heads": 3, "slstm_heads": 6, "blocks": 3, "slstm_at": [1]}),
    "paper_bias": (paper, {"slstm_at": [1], "bias": True, "ffn": {"bias": True}}),
    "paper_bias_in_mlstm_only": (paper, {"slstm_at": [1], "bias": True}),
    "paper_bias_in_ffn_only": (paper, {"slstm_at": [1], "ffn": {"bias": True}}),
    "paper_tied": (paper, {"slstm_at": [1], "tie_weights": True}),
    "paper_no_slstm_conv": (paper, {"slstm_at": [1], "slstm": {"conv1d_kernel_size": 0}}),
    "paper_no_ffn_no_norm": (paper, {"slstm_at": [1], "ffn": None, "add_post_blocks_norm": False}),
    "paper_other_sizes": (
        paper,
        {
            "slstm_at": [-1],
            "mlstm": {"qkv_proj_blocksize": 8, "conv1d_kernel_size": 3, "proj_factor": 1.5},
            "ffn": {"proj_factor": 2.5},
        },
    ),
    "large": (large, {}),
    "large_bias": (large, {"use_bias": True}),
    "large_fused": (large, {"weight_mode": "fused"}),
    "large_fused_bias": (large, {"weight_mode": "fused", "use_bias": True}),
    "large_odd_width": (
        large,
        {"hidden": 96, "heads": 3, "blocks": 3, "qk_dim_factor": 1.0, "v_dim_factor": 2.0, "chunk_size": 16},
    ),
    "large_no_caps_no_norm": (
        large,
        {"heads": 4, "add_out_norm": False, "gate_soft_cap": None, "output_logit_soft_cap": None, "norm_eps": 1e-5},
    ),
    "large_sigmoid": (
        large,
        {"chunkwise_kernel": "parallel--native_siging_autograd", "mode": "train", "return_last_states": False},
    ),
    "transformers_own": (in_transformers, {"which": "own"}),
    "transformers_own_bias": (in_transformers, {"which": "own", "use_bias": True}),
    "transformers_own_odd_width": (
        in_transformers,
        {"which": "own", "hidden": 96, "heads": 3, "blocks": 3, "add_out_norm": False},
    ),
    "transformers_swapped": (in_transformers, {"which": "swapped"}),
    "transformers_swapped_bias": (in_transformers, {"which": "swapped", "hidden": 96, "heads": 3, "use_bias": True}),
}
NEEDS_KERNELS = pytest.mark.skipif(sys.version_info < (3, 11), reason="mlstm_kernels needs Python 3.11")
# These lack the biases of one kind of block, which come back as zeros.
PARTIAL_BIAS = ("paper_bias_in_mlstm_only", "paper_bias_in_ffn_only")


def runnable(*names: str) -> list:
    """Cases by name, skipped where what they need cannot be installed."""
    needs = ("large", "transformers_swapped")
    return [pytest.param(name, marks=NEEDS_KERNELS if name.startswith(needs) else ()) for name in names]


@functools.cache
def peer(name: str, **extra) -> Peer:
    build, fields = CASES[name]
    return build(**fields, **extra)


def converted(origin: Peer, **overrides) -> XLSTMForCausalLM:
    config = config_from(origin.config, origin.fmt, **overrides)
    model = XLSTMForCausalLM(config).eval()
    model.load_state_dict(to_native(origin.model.state_dict(), config, origin.fmt, weight_shapes(config)), strict=True)
    return model


@functools.cache
def native(name: str) -> XLSTMForCausalLM:
    return converted(peer(name))


def text(length: int, seed: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(TEXTS[length] if seed is None else seed)
    return torch.randint(0, VOCAB, (2, length), generator=generator)


def assert_same(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= bound, f"differs by {error:.1e} of the largest value, allowed {bound:.0e}"


@pytest.mark.parametrize("length", TEXTS)
@pytest.mark.parametrize("name", runnable(*CASES))
@torch.no_grad()
def test_logits(name, length):
    ids = text(length)
    assert_same(native(name)(ids).logits, peer(name).logits(ids), bound=1e-5)


@pytest.mark.parametrize("name", runnable(*(name for name in CASES if not name.startswith("transformers"))))
@torch.no_grad()
def test_logits_in_float64(name):
    """The same function, up to rounding. Transformers' model is left out: it computes parts in float32 always."""
    double_state = {} if name.startswith("paper") else {"inference_state_dtype": "float64"}
    origin, model = peer(name, **double_state), copy.deepcopy(native(name)).double()
    origin = origin._replace(model=copy.deepcopy(origin.model).double())
    for module in origin.model.modules():
        if type(module).__name__ in ("RMSNorm", "MultiHeadLayerNorm"):
            module.force_float32_reductions = False
        if type(module).__name__ == "mLSTMCell":
            # The paper's parallel form stabilises by another maximum than its steps, which scales its epsilon.
            module.backend_fn = functools.partial(module.backend_fn, eps=0.0)
            model.config.eps = 0.0
    for length in TEXTS:
        ids = torch.cat([text(length, seed) for seed in range(4)])
        assert_same(model(ids).logits, origin.logits(ids), bound=1e-12)


@pytest.mark.parametrize("name", runnable("paper_mixed", "large", "transformers_own"))
@torch.no_grad()
def test_hidden_states_after_each_block(name):
    origin, model, ids = peer(name), native(name), text(100)
    theirs = block_outputs(origin.blocks, lambda: origin.logits(ids))
    ours = block_outputs(model.model.layers, lambda: model(ids))
    assert len(ours) == len(theirs) == model.config.num_hidden_layers
    for y, expected in zip(ours, theirs, strict=True):
        assert_same(y, expected, bound=1e-5)
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == len(ours) + 1
    assert all(torch.equal(state, y) for state, y in zip(states[1:-1], ours[:-1], strict=True))
    if origin.fmt == "transformers":
        origin_states = origin.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        for state, expected in zip(states, origin_states, strict=True):
            assert_same(state, expected, bound=1e-5)


def block_outputs(blocks: Iterable[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    outputs: list[Tensor] = []

    def keep(_block, _inputs, y):
        outputs.append(y[0] if isinstance(y, tuple) else y)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    run()
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("name", runnable("transformers_own", "transformers_swapped"))
def test_greedy_generation(name):
    origin = peer(name, hidden=128, heads=4)  # its cache takes widths in multiples of 128 only
    model = converted(origin)
    ids = text(70, seed=0)
    options = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    generated = model.generate(ids, **options)
    assert generated.shape == (2, 110)
    assert generated[:, 70:].unique().numel() > 5
    assert torch.equal(generated, origin.model.generate(ids, **options))


@pytest.mark.parametrize("name", runnable(*CASES))
def test_round_trip_is_exact(name, tmp_path):
    origin, config = peer(name), native(name).config
    weights = origin.model.state_dict()
    back = from_native(native(name).state_dict(), config, origin.fmt, weight_shapes(config))
    if name in PARTIAL_BIAS:
        added = back.keys() - weights.keys()
        assert added
        assert all(key.endswith("bias") and not back.pop(key).any() for key in added)
    assert back.keys() == weights.keys()
    for key, weight in weights.items():
        assert torch.equal(back[key], weight), key
        assert back[key].is_contiguous(), key
    origin.model.load_state_dict(back, strict=True)
    if not config.tie_word_embeddings:
        save_file(back, tmp_path / "origin.safetensors")
        again = to_native(load_file(tmp_path / "origin.safetensors"), config, origin.fmt, weight_shapes(config))
        assert all(torch.equal(again[key], weight) for key, weight in native(name).state_dict().items())


@torch.no_grad()
def test_layout_of_the_cuda_backend():
    """A state dict of the CUDA backend, and the package's own way to give the same weights to the vanilla backend."""
    cuda, vanilla = (paper(slstm_at=[1], slstm_heads=2, backend=backend) for backend in ("cuda", "vanilla"))
    weights = cuda.model.state_dict()
    rest = {key: weight for key, weight in weights.items() if ".slstm_cell." not in key}
    vanilla.model.load_state_dict(rest, strict=False)
    cell = "xlstm_block_stack.blocks.1.xlstm.slstm_cell"
    source, target = (origin.model.get_submodule(cell) for origin in (cuda, vanilla))
    kernel = source._recurrent_kernel_int2ext(source._recurrent_kernel_)
    target._recurrent_kernel_.copy_(target._recurrent_kernel_ext2int(kernel))
    target._bias_.copy_(target._bias_ext2int(source._bias_int2ext(source._bias_)))
    assert target._recurrent_kernel_.shape != source._recurrent_kernel_.shape
    assert not torch.equal(target._bias_, source._bias_)

    model = converted(cuda)
    assert_same(model(text(64)).logits, vanilla.logits(text(64)), bound=1e-5)
    for fmt in ("xlstm-paper", "xlstm-paper-cuda"):  # the weights themselves tell
        for origin in (cuda, vanilla):
            again = to_native(origin.model.state_dict(), model.config, fmt, weight_shapes(model.config))
            assert all(torch.equal(again[key], weight) for key, weight in model.state_dict().items())
    for origin in (cuda, vanilla):
        back = from_native(model.state_dict(), model.config, origin.fmt, weight_shapes(model.config))
        assert all(torch.equal(back[key], weight) for key, weight in origin.model.state_dict().items())
        origin.model.load_state_dict(back, strict=True)


@pytest.mark.parametrize("fmt", ["transformers", "transformers-fused", "xlstm-large", "xlstm-large-fused"])
def test_every_weight_of_xlstm_7b_has_a_place(fmt):
    config = XLSTMConfig.preset("xlstm-7b")
    with torch.device("meta"):
        weights = XLSTMForCausalLM(config).state_dict()
    shapes = weight_shapes(config)
    origin = from_native(weights, config, fmt, shapes)
    assert sum(weight.numel() for weight in origin.values()) == 6_865_424_896
    again = to_native(origin, config, fmt, shapes)
    assert {key: weight.shape for key, weight in again.items()} == {key: x.shape for key, x in weights.items()}


def test_output_projection_of_a_tied_checkpoint():
    origin = in_transformers("own", tie_word_embeddings=True)
    config = config_from(origin.config, "transformers")
    weights = origin.model.state_dict()
    embedding = weights["backbone.embeddings.weight"]
    assert config.tie_word_embeddings
    shapes = weight_shapes(config)
    # that model does not tie what its configuration says is tied
    with pytest.raises(ValueError, match="lm_head.weight must equal backbone.embeddings.weight with tie_word_embedd"):
        to_native(weights, config, "transformers", shapes)
    del weights["lm_head.weight"]
    assert torch.equal(to_native(weights, config, "transformers", shapes)["lm_head.weight"], embedding)
    weights["lm_head.weight"] = embedding.clone()
    assert torch.equal(to_native(weights, config, "transformers", shapes)["lm_head.weight"], embedding)


def test_configurations_as_files_have_them():
    """Dicts, with only the fields that the published configuration files have."""
    seven_b = {"embedding_dim": 4096, "num_blocks": 32, "num_heads": 8, "vocab_size": 50304}
    published = {
        **seven_b,
        "model_type": "xlstm",
        "chunkwise_kernel": "chunkwise--triton_xl_chunk",
        "add_qk_norm": False,
    }
    tokens = {"pad_token_id": 1, "bos_token_id": 0}
    expected = XLSTMConfig.preset("xlstm-7b", **tokens, eos_token_id=2)
    assert config_from(published, "transformers").to_dict() == expected.to_dict()
    assert config_from(published, "transformers", eos_token_id=0).to_dict() == XLSTMConfig.preset("xlstm-7b").to_dict()
    assert config_from({**published, "num_hidden_layers": 2}, "transformers").num_hidden_layers == 32
    siging = {**seven_b, "chunkwise_kernel": "chunkwise--triton_xl_chunk_siging"}
    config = config_from(siging, "xlstm-large-fused")
    assert (config.mlstm_input_gate, config.ffn_size, config.eos_token_id) == ("sigmoid", 10944, None)
    assert config_from(stack(num_blocks=4), "xlstm-paper-cuda").block_types == ["mlstm", "slstm", "mlstm", "mlstm"]
    assert config_from(stack(num_blocks=4, slstm_at=[-1]), "xlstm-paper-cuda").block_types == ["mlstm"] * 3 + ["slstm"]
    assert config_from(stack(mlstm_block=None), "xlstm-paper-cuda").block_types == ["slstm"] * 2
    unused = {"feedforward": {"act_fn": "relu"}}  # of a stack without sLSTM
    assert config_from(stack(slstm_at=[], slstm_block=unused), "xlstm-paper").block_types == ["mlstm"] * 2


def stack(ffn: dict | None = None, slstm: dict | None = None, **fields) -> dict:
    """A configuration of the paper's package, as a file would have it."""
    block = {"feedforward": ffn or {}, "slstm": slstm or {}}
    return {"vocab_size": 9, "num_blocks": 2, "slstm_at": [1], "mlstm_block": {}, "slstm_block": block, **fields}


@pytest.mark.parametrize(
    ("origin", "fmt", "message"),
    [
        ("xlstm-7b", "xlstm-large", "origin must be a configuration or a dict of one, got str"),
        ({}, "native", "The format must be one of transformers, transformers-fused, xlstm-large"),
        ({"embedding_dim": 64, "hidden_size": 4096}, "transformers", "hidden_size and embedding_dim must be equal"),
        ({"embedding_dim": 64}, "xlstm-large", "must have num_blocks, num_heads, vocab_size"),
        (stack(slstm_block=None), "xlstm-paper-cuda", "slstm_block must be given"),
        (stack(slstm_at=[2]), "xlstm-paper-cuda", "slstm_at must hold positions among 2 blocks"),
        (stack(ffn={"act_fn": "relu^2"}), "xlstm-paper-cuda", "act_fn .* must be 'gelu', got 'relu\\^2'"),
        (stack(slstm={"function": "lstm"}), "xlstm-paper-cuda", "function .* must be 'slstm', got 'lstm'"),
        (stack(slstm={"group_norm_weight": False}), "xlstm-paper-cuda", "group_norm_weight .* must be True, got False"),
        (stack(ffn={"round_proj_up_dim_up": False}), "xlstm-paper-cuda", "round_proj_up_dim_up must be True"),
        (
            stack(ffn={"round_proj_up_to_multiple_of": 32}),
            "xlstm-paper-cuda",
            "round_proj_up_to_multiple_of must be the same",
        ),
    ],
)
def test_refused_configurations(origin, fmt, message):
    with pytest.raises((ValueError, TypeError), match=message):
        config_from(origin, fmt)


@NEEDS_KERNELS
def test_refused_weights():
    origin, model = peer("large"), native("large")
    weights, config = origin.model.state_dict(), model.config
    shapes = weight_shapes(config)
    with pytest.raises(ValueError, match=r"got no backbone\.blocks\.1\.ffn\.proj_up\.weight\.$"):
        to_native(
            {key: x for key, x in weights.items() if key != "backbone.blocks.1.ffn.proj_up.weight"},
            config,
            "xlstm-large",
            shapes,
        )
    with pytest.raises(
        ValueError, match=r"format xlstm-large-fused .* got no .* and 2 more and an unexpected .* and 14 more"
    ):
        to_native(weights, config, "xlstm-large-fused", shapes)
    wrong = {**weights, "lm_head.weight": torch.zeros(3, 64)}
    with pytest.raises(ValueError, match=r"lm_head.weight must have shape \[99, 64\], got lm_head.weight \[3, 64\]"):
        to_native(wrong, config, "xlstm-large", shapes)
    q, v = "backbone.blocks.0.mlstm_layer.q.weight", "backbone.blocks.0.mlstm_layer.v.weight"
    with pytest.raises(ValueError, match=r"qkvo_proj.weight must have shape .*q.weight \[64, 64\], "):
        to_native(
            {**weights, q: weights[v], v: weights[q]}, config, "xlstm-large", shapes
        )  # as many rows, but not the same
    state = model.state_dict()
    state["score.weight"] = state.pop("model.norm.weight")
    with pytest.raises(ValueError, match="got no model.norm.weight and an unexpected score.weight"):
        from_native(state, config, "xlstm-large", shapes)
    with pytest.raises(ValueError, match=r"model.norm.weight must have shape \[64\], got \[3\]"):
        from_native({**model.state_dict(), "model.norm.weight": torch.zeros(3)}, config, "xlstm-large", shapes)
    with pytest.raises(ValueError, match="mlstm_block must be 'pre_up' in the format xlstm-paper-cuda, got 'post_up'"):
        from_native(model.state_dict(), config, "xlstm-paper-cuda", shapes)
    with pytest.raises(ValueError, match="block_types must hold 'mlstm' only in the format xlstm-large, got 'slstm'"):
        from_native(
            {},
            XLSTMConfig(hidden_size=64, num_hidden_layers=1, vocab_size=9, block_types=["slstm"]),
            "xlstm-large",
            shapes,
        )
    biased = native("transformers_own_bias")
    state = {**biased.state_dict(), "model.norm.bias": torch.ones(64)}
    with pytest.raises(ValueError, match="model.norm.bias must be zero: the origin has no bias in its final norm"):
        from_native(state, biased.config, "transformers", weight_shapes(biased.config))
