"""The recurrent cache: precision, addresses, batch operations, taking tokens back, saving."""

import copy
import json
from functools import partial

import pytest
import torch
from models import KINDS, TWO_KINDS, assert_near, assert_same_states, random_ids, states, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from modeling_xlstm import XLSTMCache


def cache_after(model, ids, **kwargs):
    cache = XLSTMCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, **kwargs)
    return cache


def continues_as(model, cache, expected, seen):
    """Both caches give the same logits for the next tokens."""
    new = random_ids(cache.layers[0].batch_size, 5, seed=9)
    assert cache.get_seq_length() == expected.get_seq_length() == seen
    with torch.no_grad():
        actual_logits, expected_logits = (model(new, past_key_values=c).logits for c in (cache, expected))
    assert_near(actual_logits, expected_logits)
    assert_same_states(cache, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_float32_in_a_half_precision_model(kind, dtype):
    model, ids = tiny_model(kind).to(dtype), random_ids(2, 20)
    cache = cache_after(model, ids)
    with torch.no_grad():
        for t in range(3):
            model(ids[:, t : t + 1], past_key_values=cache)
    assert {tensor.dtype for tensor in states(cache).values()} == {torch.float32}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_states_stay_at_their_addresses_outside_autograd(kind, context):
    model, ids = tiny_model(kind), random_ids(2, 20)
    cache = XLSTMCache(model.config)
    with context():
        model(ids[:, :10], past_key_values=cache)
        before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in states(cache).items()}
        counter = cache.seen_tokens.data_ptr()
        for t in range(10, 20):
            model(ids[:, t : t + 1], past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)
    for name, tensor in states(cache).items():
        address, old = before[name]
        assert tensor.data_ptr() == address, name
        assert not torch.equal(tensor, old) or not tensor.any()
    assert cache.seen_tokens.data_ptr() == counter
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_cache_made_in_inference_mode_works_after_it(kind):
    model, ids = tiny_model(kind), random_ids(2, 25)
    with torch.inference_mode():
        cache = model(ids[:, :20]).past_key_values
    with torch.no_grad():
        for t in range(20, 25):
            model(ids[:, t : t + 1], past_key_values=cache)
    assert_same_states(cache, cache_after(model, ids))
    assert cache.get_seq_length() == 25
    with torch.inference_mode():
        cache = model(ids).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    continues_as(model, cache, XLSTMCache(model.config), 0)


def test_a_cache_that_is_differentiated_through_is_not_overwritten():
    model, ids = tiny_model("pre_up_slstm"), random_ids(2, 20)
    cache = XLSTMCache(model.config)
    loss = model(ids[:, :10], past_key_values=cache).logits.square().mean()
    kept = states(cache)
    copies = {name: tensor.detach().clone() for name, tensor in kept.items()}
    with torch.no_grad():
        model(ids[:, 10:], past_key_values=cache)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in kept.items())
    loss.backward()
    assert not any(tensor.requires_grad for tensor in states(cache).values())


def test_an_empty_cache_says_so():
    cache = XLSTMCache(tiny_config("pre_up_slstm"))
    assert cache.get_seq_length() == 0
    assert len(cache) == 3
    assert not cache.has_previous_state() and not cache.has_previous_state(1)
    assert cache.is_compileable
    assert cache.get_mask_sizes(7) == (7, 0)
    assert states(cache) == {}
    assert repr(cache.layers[1]) == "XLSTMCacheLayer(slstm)"
    with pytest.raises(AttributeError, match="An empty cache layer has no batch size"):
        cache.layers[0].batch_size  # noqa: B018


def test_a_filled_cache_says_what_it_has_seen():
    model = tiny_model("pre_up_slstm")
    cache = cache_after(model, random_ids(4, 11))
    assert cache.get_seq_length() == 11
    assert cache.has_previous_state() and cache.has_previous_state(0)
    assert cache.layers[0].batch_size == 4
    assert cache.get_mask_sizes(1) == (12, 0)
    assert cache.get_max_length() == -1


@pytest.mark.parametrize("kind", KINDS)
def test_reset_equals_a_fresh_cache(kind):
    model = tiny_model(kind)
    cache = cache_after(model, random_ids(2, 20))
    cache.reset()
    assert not any(tensor.any() for tensor in states(cache).values())
    ids = random_ids(2, 20, seed=1)
    with torch.no_grad():
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)
    assert_same_states(cache, cache_after(model, ids), 0)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_reset_the_batch_may_be_another(kind):
    model = tiny_model(kind)
    cache = cache_after(model, random_ids(2, 20))
    cache.reset()
    ids = random_ids(3, 20, seed=1)
    with torch.no_grad():
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)
    assert_same_states(cache, cache_after(model, ids), 0)


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_KINDS)
@pytest.mark.parametrize("how", ["in place", "assigned"])
def test_states_put_into_a_cache_that_was_reset_are_used(kind, how):
    model, ids = tiny_model(kind), random_ids(2, 20)
    cache = cache_after(model, ids[:, :12])
    kept = [layer.state.map(torch.clone) for layer in cache.layers]
    cache.reset()
    for layer, state in zip(cache.layers, kept, strict=True):
        if how == "assigned":
            layer.state = state
        else:
            for name, tensor in layer.state.tensors().items():
                tensor.copy_(state.tensors()[name])
    assert_near(model(ids[:, 12:], past_key_values=cache).logits, model(ids).logits[:, 12:])


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_cropped_to_nothing_it_is_empty_again(kind):
    model, ids = tiny_model(kind), random_ids(2, 20)
    cache = cache_after(model, random_ids(3, 7))
    cache.reset()
    cache.activate_past_recording()
    for rows in (ids, ids[:1]):
        assert torch.equal(model(rows, past_key_values=cache).logits, model(rows).logits)
        cache.crop(-20)
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_cache_filled_in_inference_mode_serves_outside_of_it(kind):
    model, ids = tiny_model(kind), random_ids(2, 20)
    with torch.inference_mode():
        cache = model(ids[:, :12]).past_key_values
    logits = model(ids[:, 12:], past_key_values=cache).logits
    logits.sum().backward()
    assert_near(logits, model(ids).logits[:, 12:])


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_cache_that_a_failing_forward_pass_left_half_way_is_refused_until_it_is_reset(kind, monkeypatch, tmp_path):
    model, ids = tiny_model(kind), random_ids(2, 20)
    cache = cache_after(model, ids)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[-1], "forward", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache)
    for use in (model, partial(model.generate, max_new_tokens=1)):
        with pytest.raises(ValueError, match=r"got the states that a forward pass left when it failed half-way; reset"):
            use(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="failed half-way"):
        cache.save(tmp_path / "state.safetensors")
    cache.reset()
    with torch.no_grad():
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


def raise_interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_the_state_of_another_input_gate_is_refused(tmp_path):
    path, ids = tmp_path / "state.safetensors", random_ids(2, 5)
    cache = cache_after(tiny_model("sigmoid"), ids)
    with pytest.raises(ValueError, match="must be of a model with mlstm_input_gate 'exp', got 'sigmoid'"):
        tiny_model("post_up")(ids, past_key_values=cache)
    cache.save(path)
    with pytest.raises(ValueError, match="must hold the state of an 'exp' input gate, got 'sigmoid'"):
        XLSTMCache.load(path, tiny_config("post_up"))
    slstm = cache_after(tiny_model("slstm"), ids)
    tiny_model("slstm", mlstm_input_gate="sigmoid")(ids, past_key_values=slstm)  # which has no such gate


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_reordered_repeated_and_selected(kind):
    model, ids = tiny_model(kind), random_ids(3, 20)
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    ):
        cache = cache_after(model, ids)
        with torch.no_grad():
            change(cache)
        continues_as(model, cache, cache_after(model, ids[rows]), 20)


def test_batch_operations_on_an_empty_cache_do_nothing():
    cache = XLSTMCache(tiny_config())
    cache.batch_repeat_interleave(2)
    cache.reset()
    assert states(cache) == {} and cache.get_seq_length() == 0


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_copy_is_independent(kind):
    model, ids = tiny_model(kind), random_ids(2, 20)
    cache = cache_after(model, ids)
    duplicate = copy.deepcopy(cache)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    continues_as(model, duplicate, cache_after(model, ids), 20)


def test_a_cache_moves_to_another_device():
    model, ids = tiny_model("pre_up_slstm"), random_ids(2, 20)
    cache = cache_after(model, ids)
    assert cache.to("cpu") is cache
    continues_as(model, cache, cache_after(model, ids), 20)
    moved = cache.to("meta")
    assert {tensor.device.type for tensor in states(moved).values()} == {"meta"}
    assert moved.seen_tokens.device.type == "meta"


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_crop_equals_never_having_seen_the_tokens(kind):
    model, ids = tiny_model(kind), random_ids(2, 40)
    for before, forwards in ((0, (10,)), (20, (10,)), (0, (7, 1, 1, 5)), (13, (1, 1, 17, 3))):
        recorded = sum(forwards)
        for remove in range(recorded + 1):
            cache = XLSTMCache(model.config)
            if before:
                model(ids[:, :before], past_key_values=cache)
            cache.activate_past_recording()
            for piece in ids[:, before : before + recorded].split(forwards, 1):
                model(piece, past_key_values=cache)
            cache.crop(-remove)
            kept = before + recorded - remove
            expected = cache_after(model, ids[:, :kept]) if kept else XLSTMCache(model.config)
            assert cache.get_seq_length() == kept
            if kept:
                assert_same_states(cache, expected)
            else:
                assert not any(tensor.any() for tensor in states(cache).values())


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_cropped_cache_records_again(kind):
    model, ids = tiny_model(kind), random_ids(2, 40)
    cache = cache_after(model, ids[:, :20])
    cache.activate_past_recording()
    for start, end, remove in ((20, 26, 4), (22, 30, 0), (30, 33, 3), (30, 31, 1)):
        model(ids[:, start:end], past_key_values=cache)
        cache.crop(-remove)
    continues_as(model, cache, cache_after(model, ids[:, :30]), 30)


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_crop_counts_padding_as_tokens(kind):
    model, ids = tiny_model(kind), random_ids(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 12:15] = 0
    cache = cache_after(model, ids[:, :10])
    cache.activate_past_recording()
    model(ids[:, 10:], attention_mask=mask, past_key_values=cache)
    cache.crop(-6)
    expected = cache_after(model, ids[:, :10])
    model(ids[:, 10:14], attention_mask=mask[:, :14], past_key_values=expected)
    continues_as(model, cache, expected, 14)


@torch.no_grad()
def test_crop_of_nothing_only_forgets_the_records():
    model, ids = tiny_model("pre_up_slstm"), random_ids(2, 20)
    cache = XLSTMCache(model.config)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    cache.crop(0)
    assert_same_states(cache, cache_after(model, ids), 0)
    assert cache.get_seq_length() == 20
    with pytest.raises(ValueError, match="of which 0 are recorded"):
        cache.crop(-1)


@torch.no_grad()
def test_crop_refuses_what_is_not_recorded():
    model, ids = tiny_model("pre_up_slstm"), random_ids(2, 20)
    cache = cache_after(model, ids)
    with pytest.raises(
        ValueError, match=r"of which 0 are recorded \(activate_past_recording\(\) starts recording\), got -3"
    ):
        cache.crop(-3)
    cache.crop(0)
    cache.activate_past_recording()
    model(ids[:, :4], past_key_values=cache)
    for tokens in (-5, 2):
        with pytest.raises(
            ValueError, match=f"minus the number of tokens to remove, of which 4 are recorded .*, got {tokens}"
        ):
            cache.crop(tokens)
    continues_as(model, cache, cache_after(model, torch.cat((ids, ids[:, :4]), 1)), 24)


@torch.no_grad()
def test_reordering_ends_what_can_be_taken_back():
    model, ids = tiny_model(), random_ids(2, 20)
    cache = XLSTMCache(model.config)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="of which 0 are recorded"):
        cache.crop(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_cache_loads_and_continues_exactly(kind, tmp_path):
    model, ids = tiny_model(kind), random_ids(2, 20)
    cache = cache_after(model, ids)
    cache.save(tmp_path / "state.safetensors")
    loaded = XLSTMCache.load(tmp_path / "state.safetensors", model.config)
    assert_same_states(loaded, cache, 0)
    assert {tensor.dtype for tensor in states(loaded).values()} == {torch.float32}
    new = random_ids(2, 5, seed=1)
    with torch.no_grad():
        assert torch.equal(model(new, past_key_values=loaded).logits, model(new, past_key_values=cache).logits)
    assert loaded.get_seq_length() == 25


def test_a_cache_under_autograd_can_be_saved(tmp_path):
    model, ids = tiny_model("pre_up_slstm"), random_ids(2, 20)
    cache = model(ids).past_key_values
    cache.save(str(tmp_path / "state.safetensors"))
    assert_same_states(XLSTMCache.load(tmp_path / "state.safetensors", model.config), cache, 0)


def test_an_empty_cache_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="Only a cache with states can be saved, got one that has seen no tokens"):
        XLSTMCache(tiny_config()).save(tmp_path / "state.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_such_cache_are_refused(tmp_path):
    path, config = tmp_path / "state.safetensors", tiny_config("post_up_slstm")
    with pytest.raises(FileNotFoundError):
        XLSTMCache.load(path, config)
    path.write_text("not safetensors")
    with pytest.raises(ValueError, match="must be a safetensors file written by XLSTMCache.save"):
        XLSTMCache.load(path, config)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"must hold the state of blocks \['mlstm', 'slstm'\], got None"):
        XLSTMCache.load(path, config)


def test_the_cache_of_another_model_is_refused(tmp_path):
    path, model = tmp_path / "state.safetensors", tiny_model("post_up_slstm")
    cache_after(model, random_ids(2, 5)).save(path)
    with pytest.raises(ValueError, match=r"blocks \['mlstm', 'mlstm'\], got \['mlstm', 'slstm'\]"):
        XLSTMCache.load(path, tiny_config("post_up"))
    tensors = load_file(path)
    del tensors["layers.1.n"]
    kinds = json.dumps(model.config.block_types)
    save_file(tensors, path, metadata={"seen_tokens": "5", "block_types": kinds, "mlstm_input_gate": "exp"})
    with pytest.raises(ValueError, match=r"must hold every state of layer 1, got none for layers.1.n"):
        XLSTMCache.load(path, model.config)


def test_the_cache_of_a_model_of_other_sizes_is_refused_by_the_model(tmp_path):
    path, ids = tmp_path / "state.safetensors", random_ids(2, 5)
    cache_after(tiny_model("slstm"), ids).save(path)
    for fields, message in (
        ({"hidden_size": 64}, r"the state of the convolution must have shape \(2, 3, 64\), got \(2, 3, 32\)"),
        ({"slstm_num_heads": 4}, r"state.h must have shape \(2, 4, 8\), got \(2, 2, 16\)"),
        ({"slstm_conv_kernel_size": 0}, "state.conv must be None, got one"),
    ):
        model = tiny_model("slstm", **fields)
        with pytest.raises(ValueError, match=message):
            model(ids, past_key_values=XLSTMCache.load(path, model.config))
    cache_after(tiny_model("slstm", slstm_conv_kernel_size=0), ids).save(path)
    model = tiny_model("slstm")
    with pytest.raises(ValueError, match="state.conv must be that of the layer's convolution, got None"):
        model(ids, past_key_values=XLSTMCache.load(path, model.config))
