"""Weights that `generate` packs on a CPU: the same numbers, of the weights as they are, and gone afterwards."""

import gc
import threading
import weakref

import pytest
import torch
from models import TWO_KINDS, assert_near, random_ids, tiny_model
from torch import nn
from transformers import GenerationConfig

from modeling_xlstm import linear_packed
from modeling_xlstm.backends import HAS_ONEDNN_PACKING
from modeling_xlstm.linear import linear, packed_weight
from modeling_xlstm.linear_packed import PACKED, PATIENCE, PackedWeights, pack, packing


pytestmark = pytest.mark.skipif(not HAS_ONEDNN_PACKING, reason="this CPU does not multiply bfloat16 in oneDNN")

PROMPT = random_ids(2, 5)
OPTIONS = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture
def kept(monkeypatch):
    """What was packed, call by call of `generate`."""
    kept: list[PackedWeights] = []

    class Kept(PackedWeights):
        def __init__(self):
            super().__init__()
            kept.append(self)

    monkeypatch.setattr(linear_packed, "PackedWeights", Kept)
    return kept


def multiply_often(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for _ in range(PATIENCE):
        linear(module, x)
    assert packed_weight(module, x) is not None
    return linear(module, x)


@pytest.fixture
def inside():
    """As inside of a `generate`."""
    with packing(), torch.no_grad():
        pack(True)
        yield PACKED.get()


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_the_text_is_that_of_the_weights_as_they_are(kind, kept):
    model = tiny_model(kind).to(torch.bfloat16)
    expected = model.generate(PROMPT, disable_compile=True, **OPTIONS)
    assert not kept
    actual = model.generate(PROMPT, **OPTIONS)
    (packed,) = kept
    products = [m for name, m in model.named_modules() if type(m) is nn.Linear and "gate_proj" not in name]
    assert {id(w) for w in packed.packed} == {id(m.weight) for m in products}
    assert torch.equal(actual.sequences, expected.sequences)
    for logits, others in zip(actual.logits, expected.logits, strict=True):
        assert_near(logits, others, 1e-2)
    assert PACKED.get() is None


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (40,)], ids=str)
def test_products_are_those_of_the_weight_as_it_is(rows, bias, inside):
    layer = nn.Linear(64, 96, bias=bias).to(torch.bfloat16)
    layer.weight.data = layer.weight.data.t().contiguous().t()
    x = torch.randn(*rows, 64, dtype=torch.bfloat16)
    expected = layer(x)
    assert_near(multiply_often(layer, x), expected, 1e-2)


def test_another_weight_is_packed_anew(inside):
    layer, x = nn.Linear(64, 96).to(torch.bfloat16), torch.randn(1, 64, dtype=torch.bfloat16)
    multiply_often(layer, x)
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    layer.bias.zero_()
    assert not linear(layer, x).any()
    assert not multiply_often(layer, x).any()


def test_weights_that_change_between_two_calls_are_taken_as_they_are():
    model = tiny_model().to(torch.bfloat16)
    before = model.generate(PROMPT, **OPTIONS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.neg_()
    after = model.generate(PROMPT, **OPTIONS)
    assert not torch.equal(before.logits[-1], after.logits[-1])
    expected = model.generate(PROMPT, disable_compile=True, **OPTIONS)
    assert_near(after.logits[-1], expected.logits[-1], 1e-2)


def test_what_was_packed_is_let_go_whatever_happens(kept):
    model = tiny_model().to(torch.bfloat16)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT, prefix_allowed_tokens_fn=lambda *_: stop(), **OPTIONS)
    assert PACKED.get() is None
    gone = weakref.ref(kept.pop())
    gc.collect()
    assert gone() is None


def test_a_call_within_a_call_adds_to_what_is_packed(kept):
    """Drafts are many short calls, none of which would be worth it."""
    model, draft = (tiny_model().to(torch.bfloat16) for _ in range(2))
    options = {"do_sample": False, "max_new_tokens": 24}
    text = model.generate(PROMPT[:1], assistant_model=draft, **options)
    (packed,) = kept
    assert {id(w) for w in packed.packed} > {id(draft.lm_head.weight), id(model.lm_head.weight)}
    assert torch.equal(text, model.generate(PROMPT[:1], disable_compile=True, **options))


def test_what_does_not_fit_stays_as_it_is(monkeypatch, kept):
    model = tiny_model().to(torch.bfloat16)
    sizes = sorted(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
    monkeypatch.setattr(linear_packed, "LIMIT", sizes[-1] + 1)
    expected = model.generate(PROMPT, disable_compile=True, **OPTIONS)
    actual = model.generate(PROMPT, **OPTIONS)
    (packed,) = kept
    assert packed.packed
    assert 0 <= packed.free == sizes[-1] + 1 - sum(w.nbytes for w in packed.packed)
    assert torch.equal(actual.sequences, expected.sequences)


def test_what_is_not_a_plain_product_is_left_alone(inside):
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    layer = nn.Linear(64, 96).to(torch.bfloat16)
    multiply_often(layer, x)
    handle = layer.register_forward_hook(lambda module, inputs, y: y + 1)
    assert torch.equal(linear(layer, x), layer(x))
    handle.remove()
    with torch.enable_grad():
        assert linear(layer, x).requires_grad
    with torch.autocast("cpu", torch.float16):
        assert linear(layer, x).dtype == torch.float16
    for other in (nn.Linear(64, 96), nn.Linear(64, 96).double()):
        y = x.to(other.weight.dtype)
        assert torch.equal(linear(other, y), other(y))
        assert packed_weight(other, y) is None


def test_calls_that_do_not_want_it(kept):
    model = tiny_model().to(torch.bfloat16)
    model.generate(PROMPT, use_cache=False, **OPTIONS)
    model.generate(PROMPT, generation_config=GenerationConfig(**OPTIONS, disable_compile=True))
    with packing():
        pack(True)
        assert PACKED.get() is not None
        model.generate(PROMPT, disable_compile=True, **OPTIONS)
        assert PACKED.get() is not None
    assert all(not packed.packed for packed in kept)


def test_threads_have_their_own(kept):
    model = tiny_model().to(torch.bfloat16)
    expected = model.generate(PROMPT, disable_compile=True, **OPTIONS).sequences
    texts = []
    threads = [threading.Thread(target=lambda: texts.append(model.generate(PROMPT, **OPTIONS))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == 3
    assert all(torch.equal(text.sequences, expected) for text in texts)
