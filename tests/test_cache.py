"""The recurrent cache: precision, addresses, batch operations, taking tokens back, forking."""

import copy
import pickle
from functools import partial

import pytest
import torch
from models import KINDS, TWO_KINDS, assert_near, assert_same_states, random_ids, states, tiny_config, tiny_model

from modeling_xlstm import XLSTMCache
from modeling_xlstm.cache_xlstm import LINE, state_shapes


def cache_after(model, ids, **kwargs):
    cache = XLSTMCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, **kwargs)
    return cache


NO_CONVOLUTION = {"conv_kernel_size": 0, "slstm_conv_kernel_size": 0}


@pytest.mark.parametrize("fields", [{}, NO_CONVOLUTION], ids=["as they are", "no convolution"])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_states_follow_from_the_configuration(kind, fields):
    model = tiny_model(kind, **fields)
    for layer in cache_after(model, random_ids(2, 5)).layers:
        shapes = {name: x.shape[1:] for name, x in layer.state.tensors().items()}
        assert shapes == state_shapes(model.config)[layer.kind]


def test_of_several_processes_each_has_the_states_of_its_heads(monkeypatch):
    config = tiny_config("pre_up_slstm")
    whole = state_shapes(config)
    monkeypatch.setattr(type(config), "ranks", 2)
    for kind, shapes in state_shapes(config).items():
        for name, shape in shapes.items():
            split = -1 if name == "conv" else 0  # channels, which the heads have side by side
            expected = list(whole[kind][name])
            expected[split] //= 2
            assert list(shape) == expected, name


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_states_may_live_in_memory_that_is_given_each_at_a_line_of_its_own(kind):
    model, ids = tiny_model(kind), random_ids(3, 20)
    cache = XLSTMCache(model.config)
    memory = torch.zeros(cache.numbers(3))
    cache.take(memory, 3)
    places = [(x.data_ptr() - memory.data_ptr()) // 4 for x in states(cache).values()]
    assert all(place % LINE == 0 for place in places)
    sizes = [x.numel() for x in states(cache).values()]
    ends = [place + size for place, size in zip(places, sizes, strict=True)]
    assert all(0 <= next_place - end < LINE for end, next_place in zip(ends, [*places[1:], len(memory)], strict=True))
    model(ids, past_key_values=cache)
    assert_same_states(cache, cache_after(model, ids), 0)
    assert [(x.data_ptr() - memory.data_ptr()) // 4 for x in states(cache).values()] == places


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


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_token_with_gradients_does_not_overwrite_states_without(kind):
    model, ids = tiny_model(kind), random_ids(2, 10)
    cache = cache_after(model, ids[:, :9])
    kept = states(cache)
    copies = {name: tensor.clone() for name, tensor in kept.items()}
    model(ids[:, 9:], past_key_values=cache).logits.sum().backward()
    assert all(torch.equal(tensor, copies[name]) for name, tensor in kept.items())
    assert all(tensor.requires_grad for tensor in states(cache).values())


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


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_token_outside_autograd_overwrites_no_state_that_a_loss_is_of(kind):
    model, ids = tiny_model(kind), random_ids(1, 9)
    cache = model(ids).past_key_values
    loss = sum(x.square().sum() for x in states(cache).values())
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    loss.backward()


def test_an_empty_cache_says_so():
    cache = XLSTMCache(tiny_config("pre_up_slstm"))
    assert cache.get_seq_length() == 0
    assert len(cache) == 3
    assert not cache.has_previous_state() and not cache.has_previous_state(1)
    assert cache.is_compileable and cache.is_croppable and not any(cache.is_sliding)
    assert not any(layer.supports_early_init for layer in cache.layers)
    assert cache.layers[0].get_max_length() == -1  # there is none
    assert cache.get_mask_sizes(7) == (7, 0)
    assert states(cache) == {}
    assert repr(cache.layers[1]) == "XLSTMCacheLayer(slstm)"
    with pytest.raises(AttributeError, match="An empty cache layer has no batch size"):
        cache.layers[0].batch_size  # noqa: B018


def test_a_cache_has_a_previous_state_once_its_last_layer_has_one():
    filled, cache = (XLSTMCache(tiny_config("pre_up_slstm")) for _ in range(2))
    tiny_model("pre_up_slstm")(random_ids(2, 5), past_key_values=filled)
    cache.update(filled.layers[2].state, 2)
    assert cache.has_previous_state() and cache.has_previous_state(2) and not cache.has_previous_state(1)


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


def test_a_reset_keeps_the_addresses_where_autograd_is_on():
    cache = cache_after(tiny_model("pre_up_slstm"), random_ids(2, 5))
    before = states(cache)
    cache.reset()
    for name, tensor in states(cache).items():
        assert tensor is before[name] and not tensor.any(), name


def test_what_was_checked_of_an_empty_cache_does_not_hold_of_a_filled_one():
    model = tiny_model("pre_up_slstm")
    cache, filled = (cache_after(model, random_ids(2, 5)) for _ in range(2))
    cache.reset()
    cache.check(model.config, 3)
    with torch.no_grad():
        for i, layer in enumerate(filled.layers):
            cache.update(layer.state, i)
    with pytest.raises(ValueError, match="past_key_values must hold"):
        cache.check(model.config, 3)


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
        cache.save(tmp_path / "state.safetensors", model)
    with pytest.raises(ValueError, match="failed half-way"):
        cache.fork(2)
    cache.reset()
    with torch.no_grad():
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


def raise_interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "kind, fields, got",
    [
        ("sigmoid", {}, "be of a model with mlstm_input_gate 'exp', got 'sigmoid'"),
        ("slstm", {}, r"be of a model with block_types \['mlstm', 'mlstm'\], got \['slstm', 'slstm'\]"),
        ("pre_up", {}, "be of a model with mlstm_block 'post_up', got 'pre_up'"),
        ("post_up", {"gate_soft_cap": 3.0}, "be of a model with gate_soft_cap 15.0, got 3.0"),
        ("post_up", {"num_heads": 4}, "be of a model with num_heads 2, got 4"),
        ("post_up", {"hidden_size": 64}, r"hold C of layer 0 .* shape \(2, 2, 8, 16\) .* shape \(2, 2, 16, 32\)"),
    ],
)
def test_the_cache_of_another_model_is_refused_by_what_differs(kind, fields, got, tmp_path):
    model, ids = tiny_model(), random_ids(2, 5)
    cache = cache_after(tiny_model(kind, **fields), ids)
    for use in (
        lambda: model(ids, past_key_values=cache),
        lambda: model.generate(random_ids(2, 9), past_key_values=cache, max_new_tokens=2),
        lambda: cache.save(tmp_path / "state", model),
    ):
        with pytest.raises(ValueError, match=f"past_key_values must {got}"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_what_a_model_does_not_have_may_differ():
    slstm = cache_after(tiny_model("slstm"), random_ids(2, 5))
    tiny_model("slstm", mlstm_input_gate="sigmoid")(random_ids(2, 5), past_key_values=slstm)


def spoil(cache, how):
    """Changes the state of the last layer only."""
    layer = cache.layers[-1]
    cell, conv, _ = layer.state
    if how == "dtype":
        layer.state = layer.state.map(torch.Tensor.bfloat16)
    elif how == "device":
        layer.state = layer.state.map(lambda x: x.to("meta"))
    elif how == "rows":
        layer.state = layer.state.map(lambda x: x[:1])
    elif how == "shape":
        layer.state = layer.state._replace(cell=cell._replace(n=cell.n[..., 1:]))
    elif how == "convolution":
        layer.state = layer.state._replace(conv=cell.n if conv is None else None)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how, got",
    [
        ("dtype", "as torch.float32 .*, got torch.bfloat16"),
        ("device", "on cpu, got .* on meta"),
        ("rows", r"of shape \(2, .*, got .* of shape \(1, "),
        ("shape", r"of shape .*, got .* of shape \("),
        ("convolution", "got .*: the states are of another model"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_computed(how, got, kind, length):
    model, ids = tiny_model(kind), random_ids(2, length)
    cache = cache_after(model, random_ids(2, 5))
    model(ids, past_key_values=cache)
    spoil(cache, how)
    before = {name: x.clone() for name, x in states(cache).items()}
    with pytest.raises(ValueError, match=rf"^past_key_values must hold \w.* of layer {len(cache.layers) - 1}.*{got}"):
        model(ids, past_key_values=cache)
    assert not cache.is_broken and cache.get_seq_length() == 5 + length
    assert all(torch.equal(x, before[name]) for name, x in states(cache).items() if x.device.type == "cpu")
    if how != "rows":  # of which generate has a sentence of its own
        with pytest.raises(ValueError, match=got):
            model.generate(random_ids(2, 20), past_key_values=cache, max_new_tokens=2)


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
    cache = cache_after(model, ids[:1])
    with torch.no_grad():
        cache.batch_select_indices(torch.tensor([True]))
    continues_as(model, cache, cache_after(model, ids[:1]), 20)


@torch.no_grad()
@pytest.mark.parametrize(
    "change, error, sentence",
    [
        (lambda c: c.reorder_cache(torch.tensor([0, 3])), IndexError, "beam_idx must be from 0 to 2, got 3"),
        (lambda c: c.reorder_cache(torch.tensor([-1])), IndexError, "beam_idx must be from 0 to 2, got -1"),
        (lambda c: c.reorder_cache([0, 1]), TypeError, "beam_idx must be a tensor of .*int64 or .*int32, got list"),
        (lambda c: c.reorder_cache(torch.ones(3, dtype=torch.bool)), TypeError, "beam_idx must be .*, got torch.bool"),
        (lambda c: c.batch_select_indices(torch.tensor(0)), ValueError, r"indices must have shape \[N\], got \(\)"),
        (
            lambda c: c.batch_select_indices(torch.ones(2, dtype=torch.bool)),
            ValueError,
            r"indices must have shape \[3\] as a mask, got \(2,\)",
        ),
        (lambda c: c.batch_select_indices(torch.zeros(3, dtype=torch.bool)), ValueError, "must choose a row at least"),
        (lambda c: c.reorder_cache(torch.tensor([], dtype=torch.int64)), ValueError, "beam_idx must choose a row"),
        (lambda c: c.batch_repeat_interleave(0), ValueError, "repeats must be an integer of at least 1, got 0"),
        (lambda c: c.batch_repeat_interleave(True), ValueError, "repeats must be an integer of at least 1, got True"),
        (lambda c: c.crop("1"), TypeError, "crop takes minus the number of tokens to remove, an integer, got '1'"),
        (lambda c: c.crop(-1.0), TypeError, "crop takes minus the number .*, got -1.0"),
    ],
)
def test_rows_and_numbers_that_there_are_not_are_refused_and_the_cache_left_as_it_was(change, error, sentence):
    model, ids = tiny_model("pre_up_slstm"), random_ids(3, 20)
    cache = cache_after(model, ids)
    with pytest.raises(error, match=sentence):
        change(cache)
    continues_as(model, cache, cache_after(model, ids), 20)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.reorder_cache(torch.tensor([1, 0])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([1])),
        lambda c: c.reset(),
    ],
)
def test_a_change_that_is_stopped_half_way_leaves_a_cache_that_is_refused(change, monkeypatch):
    """The rows of one layer are then others than those of the next."""
    model, ids = tiny_model(), random_ids(2, 9)
    cache = cache_after(model, ids)

    def fail(*_, **__):
        raise KeyboardInterrupt

    for name in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "reset"):
        monkeypatch.setattr(cache.layers[1], name, fail)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        change(cache)
    with pytest.raises(ValueError, match="must be of a text read to its end"):
        cache.fork(1)
    monkeypatch.undo()
    cache.reset()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    continues_as(model, cache, cache_after(model, ids), 9)


def test_batch_operations_on_an_empty_cache_do_nothing():
    cache = XLSTMCache(tiny_config())
    cache.batch_repeat_interleave(2)
    cache.reset()
    assert states(cache) == {} and cache.get_seq_length() == 0


@pytest.mark.parametrize("stop", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_pass_that_is_stopped_anywhere_leaves_a_cache_that_is_refused(kind, layer, length, stop, monkeypatch):
    model, ids = tiny_model(kind), random_ids(2, 9)
    cache = cache_after(model, ids)

    def fail(*_, **__):
        raise stop

    monkeypatch.setattr(model.model.layers[layer].mixer.head_norm, "forward", fail)
    with pytest.raises(stop), torch.no_grad():
        model(ids[:, :length], past_key_values=cache)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="must be of a text read to its end"):
        model(ids, past_key_values=cache)
    cache.reset()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    continues_as(model, cache, cache_after(model, ids), 9)


def test_tokens_that_are_taken_back_in_part_leave_a_cache_that_is_refused(monkeypatch):
    model, ids = tiny_model(), random_ids(2, 9)
    cache = XLSTMCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids, past_key_values=cache)

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.model.layers[1].mixer.head_norm, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        cache.crop(-4)
    with pytest.raises(ValueError, match="must be of a text read to its end"):
        cache.crop(0)


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_leaves_the_state_of_a_cache_as_it_is(kind, length):
    model = tiny_model(kind)
    cache, x = cache_after(model, random_ids(2, 9)), torch.randn(2, length, model.config.hidden_size)
    before = {name: tensor.clone() for name, tensor in states(cache).items()}
    with torch.no_grad():
        for layer, block in zip(cache.layers, model.model.layers, strict=True):
            results = [block(x, layer.state)[0] for _ in range(2)]
            assert torch.equal(*results)
    assert all(torch.equal(tensor, before[name]) for name, tensor in states(cache).items())


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_several_rows_at_one_address_are_replaced(kind):
    model, ids = tiny_model(kind), random_ids(1, 9)
    cache = cache_after(model, ids)
    for layer in cache.layers:
        layer.state = layer.state.map(lambda x: x.expand(3, *x.shape[1:]))
    continues_as(model, cache, cache_after(model, ids.repeat(3, 1)), 9)
    continues_as(model, cache, cache_after(model, torch.cat((ids.repeat(3, 1), random_ids(3, 5, seed=9)), 1)), 14)


def test_copies_and_pickles_hold_nothing_recorded():
    model, ids = tiny_model(), random_ids(2, 9)
    cache = XLSTMCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert copied.is_recording and not copied.records
        with pytest.raises(ValueError, match="of which 0 are recorded"):
            copied.crop(-1)
        continues_as(model, copied, cache_after(model, ids), 9)
    cache.crop(-4)
    continues_as(model, cache, cache_after(model, ids[:, :5]), 5)


def test_recording_can_be_ended():
    model, ids = tiny_model(), random_ids(2, 9)
    cache = XLSTMCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.deactivate_past_recording()
        model(ids, past_key_values=cache)
    assert not cache.is_recording and not cache.records


@pytest.mark.parametrize("recording", [False, True])
def test_prompt_lookup_and_drafts_leave_a_cache_that_records_only_if_it_did(recording):
    model, ids = tiny_model(), random_ids(1, 8).repeat(1, 3)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model(hidden_size=16)}):
        cache = XLSTMCache(model.config)
        if recording:
            cache.activate_past_recording()
        model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, **options)
        assert cache.is_recording == recording
        returned = model.generate(ids, max_new_tokens=8, return_dict_in_generate=True, **options).past_key_values
        assert not returned.is_recording and not returned.records


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


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_taking_tokens_back_leaves_no_gradients(kind):
    model, ids = tiny_model(kind), random_ids(2, 14)
    cache = XLSTMCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        for part in ids.split(7, 1):
            model(part, past_key_values=cache)
    cache.crop(-2)
    assert not any(tensor.requires_grad for tensor in states(cache).values())
    assert_same_states(cache, cache_after(model, ids[:, :12]), 1e-5)


def test_a_cache_of_a_single_layer_knows_whether_it_records():
    cache = XLSTMCache(tiny_config(num_hidden_layers=1))
    assert not cache.is_recording
    cache.activate_past_recording()
    assert cache.is_recording


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


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_holds_each_row_n_times_and_leaves_the_original(kind, n):
    model, ids = tiny_model(kind), random_ids(2, 20)
    cache = cache_after(model, ids)
    before = {name: (x.data_ptr(), x.clone()) for name, x in states(cache).items()}
    fork = cache.fork(n)
    for name, x in states(fork).items():
        address, old = before[name]
        assert torch.equal(x, old.repeat_interleave(n, 0))
        assert x.data_ptr() != address
    continues_as(model, fork, cache_after(model, ids.repeat_interleave(n, 0)), 20)
    for name, x in states(cache).items():
        address, old = before[name]
        assert x.data_ptr() == address and torch.equal(x, old)
    continues_as(model, cache, cache_after(model, ids), 20)


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_forks_of_a_fork_and_of_a_cache_that_was_reset_are_forks(kind):
    model, ids = tiny_model(kind), random_ids(2, 20)
    cache = cache_after(model, ids)
    continues_as(model, cache.fork(2).fork(3), cache_after(model, ids.repeat_interleave(6, 0)), 20)
    cache.reset()
    for empty in (cache.fork(2), XLSTMCache(model.config).fork(2)):
        assert empty.get_seq_length() == 0
        assert torch.equal(model(ids, past_key_values=empty).logits, model(ids).logits)
        assert_same_states(empty, cache_after(model, ids), 0)


def test_a_fork_passes_gradients_to_the_prompt():
    model, ids = tiny_model("pre_up_slstm"), random_ids(1, 20)
    new = random_ids(3, 5, seed=1)
    grads = []
    for forked in (True, False):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        if forked:
            cache = model(inputs_embeds=embeds).past_key_values.fork(3)
        else:
            cache = model(inputs_embeds=embeds.expand(3, -1, -1)).past_key_values
        model(new, past_key_values=cache).logits.square().mean().backward()
        grads.append(embeds.grad)
    assert grads[0].any()
    assert_near(*grads, 1e-4)


@pytest.mark.parametrize("n", [0, -1, 2.0, None, True])
def test_a_fork_is_of_at_least_one(n):
    with pytest.raises(ValueError, match=f"n must be an integer of at least 1, got {n}"):
        XLSTMCache(tiny_config()).fork(n)


@torch.no_grad()
def test_a_fork_takes_back_what_it_has_recorded_itself_and_the_original_what_it_has():
    model, ids, new = tiny_model("pre_up_slstm"), random_ids(1, 20), random_ids(3, 5, seed=1)
    cache = cache_after(model, ids[:, :12])
    cache.activate_past_recording()
    model(ids[:, 12:], past_key_values=cache)
    fork = cache.fork(3)
    with pytest.raises(ValueError, match="of which 0 are recorded"):
        fork.crop(-1)
    fork.activate_past_recording()
    model(new, past_key_values=fork)
    fork.crop(-2)
    rows = torch.cat((ids.expand(3, -1), new[:, :3]), 1)
    continues_as(model, fork, cache_after(model, rows), 23)
    cache.crop(-8)
    continues_as(model, cache, cache_after(model, ids[:, :12]), 12)
