"""Bad input is refused in a sentence: what, got, expected. Nothing wrong comes out as a number."""

from itertools import combinations, pairwise

import pytest
import torch
from models import TWO_KINDS, random_ids, tiny_config, tiny_model
from transformers import DynamicCache

from modeling_xlstm import (
    MLSTMLayer,
    SLSTMLayer,
    XLSTMBlock,
    XLSTMCache,
    XLSTMForCausalLM,
    XLSTMForTokenClassification,
    checks,
    inputs_xlstm,
)


IDS = random_ids(2, 20)
ONE = IDS[:1]
EMBEDS = torch.zeros(2, 20, 32)

# name: error, sentence, input
INPUTS = {
    "list of positions": (
        TypeError,
        r"position_ids must be a tensor \[B, T\], got list",
        {"input_ids": IDS, "position_ids": list(range(20))},
    ),
    "nothing but padding": (
        ValueError,
        "attention_mask must have a 1 where there are labels to predict, got only 0",
        {"input_ids": IDS, "labels": IDS, "attention_mask": torch.zeros_like(IDS)},
    ),
    "shifted labels that are too short": (
        ValueError,
        r"shift_labels must have shape \(2, 20\) like the logits, got \(2, 19\)",
        {"input_ids": IDS, "labels": IDS, "shift_labels": IDS[:, 1:]},
    ),
    "float ids": (TypeError, "input_ids must be int64 or int32, got torch.float32", {"input_ids": IDS.float()}),
    "bool ids": (TypeError, "input_ids must be int64 or int32, got torch.bool", {"input_ids": IDS > 5}),
    "int8 ids": (TypeError, "input_ids must be int64 or int32, got torch.int8", {"input_ids": IDS.to(torch.int8)}),
    "list of ids": (TypeError, r"input_ids must be a tensor \[B, T\], got list", {"input_ids": IDS.tolist()}),
    "ids without batch": (ValueError, r"input_ids must have shape \[B, T\].*, got \(20,\)", {"input_ids": IDS[0]}),
    "ids with three axes": (ValueError, r"must have shape \[B, T\].*, got \(1, 2, 20\)", {"input_ids": IDS[None]}),
    "no tokens": (ValueError, r"with at least one token, got \(2, 0\)", {"input_ids": IDS[:, :0]}),
    "no rows": (ValueError, r"with at least one token, got \(0, 20\)", {"input_ids": IDS[:0]}),
    "id too large": (
        IndexError,
        "input_ids must be from 0 to 98, got values from 10 to 99",
        {"input_ids": torch.tensor([[10, 99]])},
    ),
    "negative id": (
        IndexError,
        "input_ids must be from 0 to 98, got values from -1 to 10",
        {"input_ids": torch.tensor([[10, -1]])},
    ),
    "neither": (ValueError, "Exactly one of input_ids and inputs_embeds must be given, got neither", {}),
    "both": (ValueError, "Exactly one of input_ids .*, got both", {"input_ids": IDS, "inputs_embeds": EMBEDS}),
    "embeds of another width": (
        ValueError,
        r"must have shape \[B, T, 32\], got \(2, 20, 31\)",
        {"inputs_embeds": EMBEDS[..., 1:]},
    ),
    "embeds of two axes": (
        ValueError,
        r"inputs_embeds must have the 3 axes \[B T D\], got shape \(20, 32\)",
        {"inputs_embeds": EMBEDS[0]},
    ),
    "integer embeds": (
        TypeError,
        "inputs_embeds must be float16, .*, got torch.int64",
        {"inputs_embeds": EMBEDS.long()},
    ),
    "embeds in double precision": (
        TypeError,
        "inputs_embeds must be torch.float32 like the weights, got torch.float64",
        {"inputs_embeds": EMBEDS.double()},
    ),
    "a label out of range": (
        IndexError,
        "labels must be from 0 to 98, or -100 for none, got 99",
        {"input_ids": IDS, "labels": torch.full_like(IDS, 99)},
    ),
    "a negative label": (
        IndexError,
        "labels must be from 0 to 98, or -100 for none, got -1",
        {"input_ids": IDS, "labels": torch.full_like(IDS, -1)},
    ),
    "labels between tokens": (
        TypeError,
        "labels must be int64, got torch.float32",
        {"input_ids": IDS, "labels": IDS.float()},
    ),
    "labels that are truth values": (
        TypeError,
        "labels must be int64, got torch.bool",
        {"input_ids": IDS, "labels": IDS > 5},
    ),
    "a mask of logits": (
        TypeError,
        r"logits_to_keep must be an integer or an int64 tensor of positions \[N\], got torch.bool",
        {"input_ids": IDS, "logits_to_keep": torch.ones(20, dtype=torch.bool)},
    ),
    "a negative number of logits": (
        ValueError,
        "logits_to_keep must be at least 0, got -1",
        {"input_ids": IDS, "logits_to_keep": -1},
    ),
    "a list of positions of logits": (
        TypeError,
        r"logits_to_keep must be an integer or an int64 tensor of positions \[N\], got list",
        {"input_ids": IDS, "logits_to_keep": [3]},
    ),
    "positions of logits between tokens": (
        TypeError,
        r"logits_to_keep must be an integer or .*, got torch.float32",
        {"input_ids": IDS, "logits_to_keep": torch.tensor([0.5])},
    ),
    "positions of logits with two axes": (
        ValueError,
        r"logits_to_keep must be an integer or have shape \[N\], got \(1, 1\)",
        {"input_ids": IDS, "logits_to_keep": torch.tensor([[3]])},
    ),
    "a position of logits after the last": (
        IndexError,
        "logits_to_keep must hold positions of 20 tokens, got 20",
        {"input_ids": IDS, "logits_to_keep": torch.tensor([19, 20])},
    ),
    "a position of logits before the first": (
        IndexError,
        "logits_to_keep must hold positions of 20 tokens, got -21",
        {"input_ids": IDS, "logits_to_keep": torch.tensor([-20, -21], dtype=torch.int32)},
    ),
    "empty embeds": (
        ValueError,
        r"inputs_embeds .* must not have an empty axis, got shape \(2, 0, 32\)",
        {"inputs_embeds": EMBEDS[:, :0]},
    ),
    "mask of another length": (
        ValueError,
        r"attention_mask must be 20 long, got 19",
        {"input_ids": IDS, "attention_mask": torch.ones(2, 19)},
    ),
    "mask that numbers sequences": (
        ValueError,
        r"attention_mask must hold 0 \(padding\) and 1, got 2",
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS).index_fill(1, torch.arange(7, 20), 2)},
    ),
    "list of labels": (
        TypeError,
        r"labels must be a tensor \[B, T\], got list",
        {"input_ids": IDS, "labels": IDS.tolist()},
    ),
    "mask of another batch": (
        ValueError,
        r"attention_mask must have shape \[2, 20\] or \[2, past \+ 20\], got \(1, 20\)",
        {"input_ids": IDS, "attention_mask": torch.ones(1, 20)},
    ),
    "mask of four axes": (
        ValueError,
        r"attention_mask must have shape .*, got \(2, 1, 20, 20\)",
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 20, 20)},
    ),
    "list as a mask": (
        ValueError,
        r"attention_mask must have shape .*, got list",
        {"input_ids": IDS, "attention_mask": [[1] * 20] * 2},
    ),
    "attention cache": (
        TypeError,
        "past_key_values must be an XLSTMCache, got DynamicCache",
        {"input_ids": IDS, "past_key_values": DynamicCache()},
    ),
    "tuple as a cache": (
        TypeError,
        "past_key_values must be an XLSTMCache, got tuple",
        {"input_ids": IDS, "past_key_values": ()},
    ),
    "boundaries of a batch": (
        ValueError,
        "needs packed inputs with a batch of 1, got a batch of 2",
        {"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 20])},
    ),
    "boundaries that end early": (
        ValueError,
        r"must rise from 0 to the number of tokens, 20, got \[0, 5, 10\]",
        {"input_ids": ONE, "cu_seq_lens_q": torch.tensor([0, 5, 10])},
    ),
    "boundaries that end late": (
        ValueError,
        r"must rise from 0 to the number of tokens, 20, got \[0, 30\]",
        {"input_ids": ONE, "cu_seq_lens_q": torch.tensor([0, 30])},
    ),
    "boundaries that start late": (
        ValueError,
        r"must rise from 0 .*, got \[3, 20\]",
        {"input_ids": ONE, "cu_seq_lens_q": torch.tensor([3, 20])},
    ),
    "boundaries beyond the range of int32": (
        ValueError,
        r"must rise from 0 .*, got \[0, 4294967316\]",
        {"input_ids": ONE, "cu_seq_lens_q": torch.tensor([0, 2**32 + 20])},
    ),
    "boundaries that fall": (
        ValueError,
        r"must rise from 0 .*, got \[0, 15, 5, 20\]",
        {"input_ids": ONE, "cu_seq_lens_q": torch.tensor([0, 15, 5, 20])},
    ),
    "boundaries of two axes": (
        ValueError,
        r"must have shape \[N \+ 1\] with N >= 1, got \(1, 2\)",
        {"input_ids": ONE, "cu_seq_lens_q": torch.tensor([[0, 20]])},
    ),
    "boundaries between tokens": (
        TypeError,
        r"must be an int32 tensor \[N \+ 1\], got torch.float32",
        {"input_ids": ONE, "cu_seq_lens_q": torch.tensor([0, 5.5, 20])},
    ),
    "list of boundaries": (
        TypeError,
        r"must be an int32 tensor \[N \+ 1\], got list",
        {"input_ids": ONE, "cu_seq_lens_q": [0, 20]},
    ),
    "padding in packed sequences": (
        ValueError,
        "packed sequences have no padding",
        {"input_ids": ONE, "cu_seq_lens_q": torch.tensor([0, 20]), "attention_mask": torch.tensor([[0] + [1] * 19])},
    ),
    "positions that restart in a batch": (
        ValueError,
        "Packed sequences need a batch of 1, got position_ids of several sequences in a batch of 2",
        {"input_ids": IDS, "position_ids": torch.arange(20).expand(2, 20) % 7},
    ),
    "positions without batch": (
        ValueError,
        r"position_ids must have shape \[1, 20\], got \(20,\)",
        {"input_ids": ONE, "position_ids": torch.arange(20)},
    ),
    "numbers of sequences between integers": (
        TypeError,
        "seq_idx must be int64 or int32, got torch.float32",
        {"input_ids": ONE, "seq_idx": torch.zeros(1, 20)},
    ),
    "positions of another length": (
        ValueError,
        r"position_ids must have shape .*, got \(1, 10\)",
        {"input_ids": ONE, "position_ids": torch.arange(10)[None]},
    ),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_bad_input_is_refused(kind, name):
    error, sentence, kwargs = INPUTS[name]
    with pytest.raises(error, match=sentence):
        tiny_model(kind)(**kwargs)


def test_a_mask_must_fit_the_past_and_the_new_tokens():
    model = tiny_model("pre_up_slstm")
    cache = model(IDS).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask must be 5 or 20 \+ 5 long .*, got 24"):
        model(IDS[:, :5], attention_mask=torch.ones(2, 24), past_key_values=cache)


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("post_up", r"C of layer 0 as .* of shape \(1, 2, 8, 16\) on cpu, got .* of shape \(2, 2, 8, 16\) on cpu"),
        ("pre_up", r"C of layer 0 as .* of shape \(1, 2, 32, 32\) on cpu, got .* of shape \(2, 2, 32, 32\) on cpu"),
        ("slstm", r"h of layer 0 as .* of shape \(1, 2, 16\) on cpu, got .* of shape \(2, 2, 16\) on cpu"),
    ],
)
def test_the_state_of_another_batch_is_refused_and_left_as_it_was(kind, sentence, length):
    model = tiny_model(kind)
    cache = model(IDS).past_key_values
    with pytest.raises(ValueError, match=sentence):
        model(ONE[:, :length], past_key_values=cache)
    assert cache.get_seq_length() == 20
    model(IDS[:, :length], past_key_values=cache)


def test_a_layer_refuses_the_state_of_another_kind():
    x = torch.randn(2, 5, 32)
    mlstm, slstm = MLSTMLayer(tiny_config("post_up")), SLSTMLayer(tiny_config("slstm", slstm_conv_kernel_size=0))
    with pytest.raises(ValueError, match="state must be an MLSTMState of C, n and m, got 4 tensors"):
        mlstm(x, slstm(x)[1])
    with pytest.raises(ValueError, match="state must be an SLSTMState of h, c, n and m, got 3 tensors"):
        slstm(x, mlstm(x)[1])
    convolved = SLSTMLayer(tiny_config("slstm", slstm_conv_kernel_size=4))
    with pytest.raises(ValueError, match=r"state\.conv must be None, got one: the state is of another model"):
        slstm(x, convolved(x)[1])
    with pytest.raises(ValueError, match=r"state\.conv must be that of the layer's convolution, got None"):
        convolved(x, slstm(x)[1])


@pytest.mark.parametrize("kind", ["post_up", "pre_up", "slstm"])
@pytest.mark.parametrize("length", [1, 5])
def test_a_layer_refuses_what_does_not_fit(kind, length):
    layer = tiny_model(kind).model.layers[0].mixer
    x, mask = torch.randn(2, length, 32), torch.ones(2, length, dtype=torch.bool)
    for bad, error, sentence in (
        ({"mask": mask.float()}, TypeError, "mask must be one of torch.bool, got torch.float32"),
        ({"mask": mask[:1]}, ValueError, rf"mask must have shape \(2, {length}\), got \(1, {length}\)"),
        ({"mask": mask[0]}, ValueError, rf"mask must have shape \(2, {length}\), got \({length},\)"),
        ({"cu_seqlens": torch.tensor([0, length])}, ValueError, "needs packed inputs with a batch of 1"),
        ({"x": x[..., 1:]}, ValueError, rf"x must have shape \[B, T, 32\], got \(2, {length}, 31\)"),
        ({"x": x[0]}, ValueError, r"x must have the 3 axes \[B T D\]"),
        ({"x": x.long()}, TypeError, "x must be float16, .* got torch.int64"),
    ):
        with pytest.raises(error, match=sentence):
            layer(**{"x": x, **bad})


def test_layers_are_built_and_continued_only_as_they_can():
    config = tiny_config(hidden_size=40, slstm_num_heads=3)
    with pytest.raises(ValueError, match="hidden_size must be a multiple of slstm_num_heads = 3, got 40"):
        SLSTMLayer(config)
    with pytest.raises(ValueError, match="layer_idx must be from 0 to 1, got 2"):
        XLSTMBlock(config, 2)
    layer, x = MLSTMLayer(config), torch.randn(2, 5, 40)
    state = layer(x)[1]
    for wrong, name in ((state.cell, "MLSTMState"), ((state.cell, None), "tuple")):
        with pytest.raises(TypeError, match=f"state must be a LayerState, as the layer returned it, got {name}"):
            layer(x, wrong)


def test_generation_from_a_cache_needs_a_row_for_each_beam():
    model = tiny_model()
    cache = model(IDS).past_key_values
    ids = torch.cat((IDS, random_ids(2, 5, seed=1)), 1)
    with pytest.raises(ValueError, match=r"a row for each of 4 sequences, beams included, got 2; batch_repeat"):
        model.generate(ids, past_key_values=cache, num_beams=2, max_new_tokens=2)
    with torch.no_grad():
        cache.batch_repeat_interleave(2)
    model.generate(ids, past_key_values=cache, num_beams=2, max_new_tokens=2)


@pytest.mark.parametrize("boundaries", ["cu_seq_lens_q", "position_ids"])
def test_packed_sequences_do_not_continue_a_cache(boundaries):
    model = tiny_model("pre_up_slstm")
    kwargs = {
        "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 7, 20])},
        "position_ids": {"position_ids": torch.tensor([[*range(7), *range(13)]])},
    }[boundaries]
    with pytest.raises(ValueError, match="Packed sequences start from empty states, got past_key_values; unpack them"):
        model(ONE, past_key_values=XLSTMCache(model.config), **kwargs)


@pytest.mark.parametrize("names", [*combinations(("past_key_values", "cache", "cache_params"), 2)])
def test_a_cache_is_given_once(names):
    model = tiny_model()
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match=f"Only one of .* may be given, got {' and '.join(sorted(names))}"):
            call(IDS, **{name: XLSTMCache(model.config) for name in names})


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_an_unknown_backend_is_refused_and_the_old_one_kept(kind):
    model = tiny_model(kind)
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, got 'cuda'"):
        model.set_backend("cuda")
    assert model.config.backend == "auto"
    model(IDS)


@pytest.mark.parametrize("kind", ["post_up", "pre_up", "slstm"])
def test_triton_on_a_cpu_is_refused_with_the_reason(kind):
    sentence = "backend 'triton' was requested for tensors on cpu"
    model = tiny_model(kind)
    with pytest.raises(NotImplementedError, match=sentence):
        model.set_backend("triton")
    assert model.config.backend == "auto"
    model = XLSTMForCausalLM(tiny_config(kind, backend="triton"))
    for ids in (IDS, IDS[:, :1]):
        with pytest.raises(NotImplementedError, match=sentence):
            model(ids)
    with pytest.raises(NotImplementedError, match=sentence):
        model.generate(IDS, max_new_tokens=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_logits_that_are_not_finite_are_refused_outside_training(kind, value):
    model = tiny_model(kind)
    with torch.no_grad():
        model.model.layers[1].mixer_norm.weight[3] = value
    sentence = (
        "The logits must be finite, got NaN or infinity: a weight or an input is not finite, or overflows torch.float32"
    )
    with torch.no_grad(), pytest.raises(FloatingPointError, match=sentence):
        model(IDS)
    with pytest.raises(FloatingPointError, match=sentence):
        model.generate(IDS, max_new_tokens=2)
    with torch.no_grad(), pytest.raises(FloatingPointError, match=sentence):
        tiny_model(kind)(inputs_embeds=torch.full((1, 3, 32), value))


def test_training_may_meet_infinite_logits():
    model = tiny_model().train()  # a loss scaler lowers its scale then
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    assert model(IDS, labels=IDS).loss.isnan()


def test_generate_refuses_other_caches():
    model = tiny_model()
    with pytest.raises(TypeError, match="past_key_values must be an XLSTMCache, got DynamicCache"):
        model.generate(IDS, past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(
        ValueError, match="cache_implementation must be None, 'dynamic' or 'static' .*, got 'quantized'"
    ):
        model.generate(IDS, cache_implementation="quantized", max_new_tokens=2)


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (torch.ones(2, 5), r"attention_mask must be 8 long, got 5"),
        (torch.ones(2, 9), r"attention_mask must be 8 long, got 9"),
        (torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]), r"attention_mask must be 8 long, got 5"),
        (torch.ones(3, 8), r"attention_mask must have shape \[2, 8\]"),
        (torch.ones(16), r"attention_mask must have shape \[2, 8\]"),
        (torch.ones(2, 1, 8, 8), r"attention_mask must have shape \[2, 8\]"),
        ([[1] * 8] * 2, r"attention_mask must have shape \[2, 8\] .*, got list"),
        (2 * torch.ones(2, 8), r"must hold 0 \(padding\) and 1, got 2"),
        (torch.full((2, 8), torch.nan), r"must hold 0 \(padding\) and 1, got nan"),
    ],
)
def test_generate_refuses_a_mask_that_does_not_fit(mask, sentence):
    model, ids = tiny_model(), random_ids(2, 8)
    for given in ({"input_ids": ids}, {"inputs": ids}, {"inputs_embeds": model.model.embed_tokens(ids)}):
        with pytest.raises(ValueError, match=sentence):
            model.generate(**given, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match=sentence):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)


@pytest.mark.parametrize("length", [13, 15, 17, 20])
def test_generate_goes_on_only_with_a_mask_over_all_or_over_what_is_given(length):
    model, ids = tiny_model(), random_ids(1, 16)
    with torch.no_grad():
        cache = model(ids[:, :12], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=rf"attention_mask must be 16 or 12 \+ 16 long .*, got {length}"):
        model.generate(ids, attention_mask=torch.ones(1, length), past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == 12


def test_generate_takes_no_cache_that_it_must_not_use():
    model, ids = tiny_model(), random_ids(1, 8)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="has seen 5 tokens continues a text only with use_cache=True, got False"):
        model.generate(ids, past_key_values=cache, use_cache=False, max_new_tokens=2)


def test_a_misspelt_argument_of_generate_is_refused():
    with pytest.raises(ValueError, match="attention_maks"):
        tiny_model().generate(IDS, attention_maks=torch.ones_like(IDS), max_new_tokens=2)


def test_right_padding_is_not_read_in_pieces():
    model = tiny_model("post_up")
    ids = torch.randint(2, 90, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with pytest.raises(ValueError, match="needs padding on the left"):
        model.generate(ids, attention_mask=mask, prefill_chunk_size=4, max_new_tokens=2)


def test_new_embeddings_alone_do_not_continue_a_cache():
    model = tiny_model("post_up")
    cache = model(torch.randint(2, 90, (1, 9))).past_key_values
    embeds = model.get_input_embeddings()(torch.randint(2, 90, (1, 6))).detach()
    mask = torch.ones(1, 15, dtype=torch.long)
    with pytest.raises(ValueError, match="must hold the whole conversation, with the 9 tokens .*, got 6"):
        model.generate(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "position_ids"])
def test_boundaries_are_checked_once_for_all_layers_and_again_once_they_change(name, monkeypatch):
    """As that waits for a GPU."""
    model, checked = tiny_model("pre_up_slstm"), []
    monkeypatch.setattr(checks, "pairwise", lambda bounds: checked.append(bounds) or pairwise(bounds))
    bounds = torch.tensor([0, 7, 12], dtype=torch.int32)
    packing = {"cu_seq_lens_q": bounds} if name == "cu_seq_lens_q" else {"position_ids": _positions(bounds)}
    model(torch.randint(2, 90, (1, 12)), **packing)
    assert checked == [[0, 7, 12]]
    if name == "cu_seq_lens_q":
        bounds[1] = 13
        with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 12, got"):
            model(torch.randint(2, 90, (1, 12)), **packing)


def test_boundaries_are_checked_once_by_layers_alone_and_whenever_their_version_is_not_known(monkeypatch):
    layer, checked = tiny_model("pre_up_slstm").model.layers[0].mixer, []
    monkeypatch.setattr(checks, "pairwise", lambda bounds: checked.append(bounds) or pairwise(bounds))
    x, bounds = torch.randn(1, 12, 32), torch.tensor([0, 7, 12], dtype=torch.int32)
    expected, _ = layer(x, cu_seqlens=bounds)
    layer(x, cu_seqlens=bounds)
    assert len(checked) == 1
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 11, got"):
        layer(x[:, 1:], cu_seqlens=bounds)
    with torch.inference_mode():
        bounds = bounds.clone()
        assert torch.equal(layer(x, cu_seqlens=bounds)[0], expected)
        bounds[1] = 13
        with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 12, got"):
            layer(x, cu_seqlens=bounds)


def test_packed_texts_may_be_read_in_inference_mode():
    model, ids = tiny_model("pre_up_slstm"), random_ids(1, 12)
    expected = model(ids, cu_seq_lens_q=torch.tensor([0, 7, 12], dtype=torch.int32)).logits
    with torch.inference_mode():
        for dtype in (torch.int32, torch.int64):
            actual = model(ids, cu_seq_lens_q=torch.tensor([0, 7, 12], dtype=dtype)).logits
            assert torch.equal(actual, expected)


def test_packed_positions_are_refused_while_a_compiler_traces(monkeypatch):
    monkeypatch.setattr(inputs_xlstm, "is_compiling", lambda: True)
    with pytest.raises(NotImplementedError, match="cannot look for packed sequences in position_ids; give their bound"):
        tiny_model()(ONE, position_ids=torch.arange(20)[None])


def test_boundaries_become_int32():
    assert checks.as_int32(torch.tensor([0, 7, 12]), 12).dtype == torch.int32


@pytest.mark.parametrize("dtype", checks.FLOATS, ids=str)
def test_a_single_number_that_is_not_finite_is_seen(dtype):
    x = torch.randn(3, 40).to(dtype)
    assert checks.is_finite(x)
    for value in ("nan", "inf", "-inf"):
        assert not checks.is_finite(x.index_fill(1, torch.tensor([17]), float(value))), value


def _positions(bounds):
    return torch.cat([torch.arange(end - start) for start, end in pairwise(bounds.tolist())])[None]


@pytest.mark.parametrize("padding", [[10, 11], [0], [4], [3, 4], [5]])
@pytest.mark.parametrize("name", ["position_ids", "seq_idx"])
def test_packed_sequences_with_padding_are_refused(name, padding):
    """Wherever it is, also between the sequences, where it would hide that one begins."""
    model = tiny_model("post_up")
    ids = torch.randint(2, 90, (1, 12))
    values = [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0]] if name == "position_ids" else [[0] * 5 + [1] * 7]
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, padding] = 0
    with pytest.raises(ValueError, match=f"packed sequences have no padding, got one with {name} of several sequences"):
        model(ids, attention_mask=mask, **{name: torch.tensor(values)})


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seq_lens"])
def test_boundaries_of_another_name_are_not_overlooked(name):
    with pytest.raises(TypeError, match=f"must be given to a model as cu_seq_lens_q, got {name}"):
        tiny_model("post_up")(ONE, **{name: torch.tensor([0, 7, 20])})


def test_labels_of_another_shape_are_refused():
    model = tiny_model("post_up")
    ids = torch.randint(2, 90, (2, 10))
    with pytest.raises(ValueError, match=r"labels must have shape \(2, 10\) like the logits, got \(10, 2\)"):
        model(ids, labels=ids.t())


def test_an_additive_mask_is_refused():
    model = tiny_model("post_up")
    mask = torch.zeros(2, 10)
    mask[0, :3] = -1e9
    with pytest.raises(ValueError, match="must hold 0 .padding. and 1, got -1"):
        model(torch.randint(2, 90, (2, 10)), attention_mask=mask)


def test_labels_of_no_token_are_refused_by_a_classifier_of_tokens():
    model = XLSTMForTokenClassification(tiny_config())
    with pytest.raises(ValueError, match="labels must hold a label to learn, got only -100"):
        model(IDS, labels=torch.full_like(IDS, -100))
