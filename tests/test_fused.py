"""Soft cap, RMS norm and loss, which walk over their inputs in blocks, are the plain formulas."""

import pytest
import torch
from numerics import assert_each, assert_exact, assert_matches
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_xlstm import fused
from modeling_xlstm.fused import causal_lm_loss, rms_norm, soft_cap


VOCAB = 37

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=[1, 100, None], ids=["row by row", "in blocks of two", "at once"])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(fused, "BLOCK", request.param)


def some_logits(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(2, 5, VOCAB, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, VOCAB, (2, 5), generator=generator)
    labels[0, 2] = labels[1, 4] = -100
    return logits.to(dtype), labels


def value_and_gradient(fn, x):
    x = x.detach().requires_grad_()
    y = fn(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype) if y.dim() else 3.0
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    return {"value": y.detach(), "gradient": gradient}


def plain_cap(x):
    return 5 * torch.tanh(x / 5)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_soft_cap_is_the_plain_formula(layout):
    x = some_logits()[0]
    x = x.transpose(0, 2) if layout == "transposed" else x
    assert_each(assert_exact, value_and_gradient(lambda x: soft_cap(x, 5.0), x), value_and_gradient(plain_cap, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_soft_cap_in_low_precision_costs_only_its_own_rounding(dtype):
    x = some_logits(dtype)[0]
    baseline = value_and_gradient(lambda x: plain_cap(x.float()).to(dtype), x)
    actual = value_and_gradient(lambda x: soft_cap(x, 5.0), x)
    assert_each(assert_matches, actual, value_and_gradient(plain_cap, x.double()), baseline)


def test_soft_cap_is_the_same_to_the_bit_with_and_without_gradients():
    x = some_logits(torch.float32)[0]
    assert torch.equal(soft_cap(x, 5.0), soft_cap(x.clone().requires_grad_(), 5.0).detach())


def test_no_cap_returns_the_input_itself():
    x = some_logits()[0]
    assert soft_cap(x, None) is x


def norm_results(fn, x, weight):
    inputs = [t.detach().requires_grad_() for t in (x, weight)]
    y = fn(*inputs)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, inputs, dy)
    return {"y": y.detach(), "gradient of x": grads[0], "gradient of weight": grads[1]}


def plain_rms_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_rms_norm_is_the_plain_formula(layout):
    x = some_logits()[0]
    x = x.transpose(0, 2) if layout == "transposed" else x
    x[0, 0] = 0
    weight = torch.linspace(-2, 2, x.shape[-1], dtype=torch.float64)
    actual = norm_results(lambda x, w: rms_norm(x, w, 1e-6), x, weight)
    assert_each(assert_exact, actual, norm_results(plain_rms_norm, x, weight))


def test_rms_norm_in_float32_is_as_precise_as_that_of_pytorch():
    x = torch.randn(64, 128)
    weight = torch.randn(128)
    oracle = norm_results(plain_rms_norm, x.double(), weight.double())
    baseline = norm_results(lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), x, weight)
    assert_each(assert_matches, norm_results(lambda x, w: rms_norm(x, w, 1e-6), x, weight), oracle, baseline)


def test_rms_norm_is_the_same_to_the_bit_with_and_without_gradients():
    x, weight = torch.randn(3, 5, 128), torch.randn(128, requires_grad=True)
    with torch.no_grad():
        expected = rms_norm(x, weight, 1e-6)
    assert torch.equal(rms_norm(x, weight, 1e-6).detach(), expected)


def test_rms_norm_in_half_precision_is_that_of_pytorch():
    x, weight = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(16, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, 1e-6), F.rms_norm(x, (16,), weight, 1e-6))


OPTIONS = {
    "mean": {},
    "a number of items": {"num_items_in_batch": 13},
    "a tensor of items": {"num_items_in_batch": torch.tensor(13)},
    "another label to ignore": {"ignore_index": 3},
    "labels shifted before": {"shift_labels": torch.arange(10).view(2, 5)},
}


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_loss_is_that_of_transformers(options):
    logits, labels = some_logits(torch.float32)
    if "ignore_index" in options:
        labels = labels.clamp(min=0)
    expected = value_and_gradient(lambda x: ForCausalLMLoss(x, labels, VOCAB, **options), logits)
    actual = value_and_gradient(lambda x: causal_lm_loss(x, labels, VOCAB, **options), logits)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.usefixtures("blocks")
def test_the_loss_is_exact_and_stays_so_for_large_logits():
    logits, labels = some_logits()
    for scale in (1.0, 1000.0):
        expected = value_and_gradient(
            lambda x: F.cross_entropy(x[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), scale * logits
        )
        actual = value_and_gradient(lambda x: causal_lm_loss(x, labels, VOCAB), scale * logits)
        assert_each(assert_exact, actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_low_precision_logits_is_float32(dtype):
    logits, labels = some_logits(dtype)
    expected = value_and_gradient(lambda x: ForCausalLMLoss(x, labels, VOCAB), logits)
    actual = value_and_gradient(lambda x: causal_lm_loss(x, labels, VOCAB), logits)
    assert actual["value"].dtype == torch.float32
    torch.testing.assert_close(actual["value"], expected["value"])
    assert actual["gradient"].dtype == dtype
    torch.testing.assert_close(actual["gradient"], expected["gradient"])


def test_a_batch_without_labels_has_no_mean_but_a_sum_of_zero():
    logits, labels = some_logits()
    labels = torch.full_like(labels, -100)
    for options in ({}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(0)}):
        with pytest.raises(ValueError, match="labels must hold a token to predict, got only -100 behind the first"):
            causal_lm_loss(logits, labels, VOCAB, **options)
    result = value_and_gradient(lambda x: causal_lm_loss(x, labels, VOCAB, num_items_in_batch=4), logits)
    assert result["value"] == 0
    assert not result["gradient"].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_at_ignored_labels_may_be_anything(value):
    logits, labels = some_logits()
    ignored = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:] == -100
    expected = value_and_gradient(lambda x: causal_lm_loss(x, labels, VOCAB), logits)
    junk = logits.masked_fill(ignored[..., None], value)
    assert_each(assert_exact, value_and_gradient(lambda x: causal_lm_loss(x, labels, VOCAB), junk), expected)


def test_the_backward_pass_keeps_nothing_of_the_size_of_the_logits_but_them():
    logits, labels = some_logits()
    saved = []
    x = logits.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        causal_lm_loss(soft_cap(x, 5.0), labels, VOCAB)
    assert len({t.data_ptr() for t in saved if t.numel() >= logits.numel()}) == 1


def test_the_compiled_loss_is_the_same():
    logits, labels = some_logits()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: causal_lm_loss(soft_cap(x, 5.0), labels, VOCAB), fullgraph=True, backend="aot_eager"
    )
    expected = value_and_gradient(lambda x: causal_lm_loss(soft_cap(x, 5.0), labels, VOCAB), logits)
    assert_each(assert_exact, value_and_gradient(compiled, logits), expected)
