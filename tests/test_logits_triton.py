"""The Triton kernels of soft cap and loss against their formulas, on a GPU or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_each, assert_matches
from triton_device import DEVICE, GPU, needs_somewhere_to_run

from modeling_xlstm import logits_triton
from modeling_xlstm.logits_triton import BLOCK, cross_entropy, linear_cross_entropy, soft_cap


pytestmark = [pytest.mark.usefixtures("poisoned_memory"), needs_somewhere_to_run]

DTYPES = [torch.float32, torch.float16]
if GPU:  # the interpreter does not round to bfloat16
    DTYPES += [torch.bfloat16]
SHAPES = [(1, 1), (5, 40), (3, BLOCK), (2, BLOCK + 7)]
if GPU:
    SHAPES += [(64, 50304)]


def some(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    N, V = shape
    x, labels = 4 * torch.randn(N, V, generator=generator), torch.randint(0, V, (N,), generator=generator)
    labels[1::3] = -100
    return x.to(dtype), labels


def value_and_gradient(fn, x):
    x = x.detach().requires_grad_()
    loss = fn(x)
    (dx,) = torch.autograd.grad(loss / 3, x)
    return {"loss": loss.detach().cpu(), "gradient": dx.cpu()}


def formula(labels, cap):
    def loss(x):
        x = x if x.dtype == torch.float64 else x.float()
        return F.cross_entropy(x if cap is None else cap * torch.tanh(x / cap), labels, reduction="sum")

    return loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 5.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_right(shape, cap, dtype):
    x, labels = some(shape, dtype)
    actual = value_and_gradient(lambda x: cross_entropy(x, labels.to(DEVICE), cap, -100)[0], x.to(DEVICE))
    oracle, baseline = (value_and_gradient(formula(labels, cap), y) for y in (x.double(), x))
    assert_each(
        assert_matches, {"gradient": actual["gradient"]}, *({"gradient": r["gradient"]} for r in (oracle, baseline))
    )
    torch.testing.assert_close(actual["loss"], oracle["loss"].float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("part", [1, 100, 1 << 27])
def test_a_projection_in_parts_has_the_loss_and_gradients_of_the_whole(part, cap, dtype, monkeypatch):
    monkeypatch.setattr(logits_triton, "PART", part)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 16, generator=generator).to(dtype) for size in (7, 40))
    labels = torch.tensor([3, -100, 5, 39, 0, -100, 7])

    def results(fn, *inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        loss = fn(*inputs)
        dx, dweight = torch.autograd.grad(loss / 3, inputs)
        return {"loss": loss.detach().cpu(), "gradient of x": dx.cpu(), "gradient of the weight": dweight.cpu()}

    def plain(x, weight):
        return formula(labels, cap)(x @ weight.t())

    def ours(x, weight):
        return linear_cross_entropy(x, weight, labels.to(DEVICE), cap)

    actual = results(ours, x.to(DEVICE), weight.to(DEVICE))
    oracle, baseline = results(plain, x.double(), weight.double()), results(plain, x, weight)
    for name in ("gradient of x", "gradient of the weight"):
        assert_matches(actual[name], oracle[name], baseline[name], name)
    torch.testing.assert_close(
        actual["loss"], oracle["loss"].float(), rtol=2e-3 if dtype != torch.float32 else 1e-6, atol=0
    )


def test_only_gradients_that_are_needed_are_computed():
    x, weight, labels = (
        torch.randn(5, 16, device=DEVICE),
        torch.randn(40, 16, device=DEVICE),
        torch.arange(5).to(DEVICE),
    )
    for needs in ((False, False), (True, False), (False, True)):
        loss = linear_cross_entropy(x.requires_grad_(needs[0]), weight.requires_grad_(needs[1]), labels)
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.backward()
        assert [t.grad is not None for t in (x, weight)] == list(needs)
        x, weight = x.detach(), weight.detach()
    with torch.no_grad():
        expected = cross_entropy(x @ weight.t(), labels, None, -100)[0]
        assert torch.equal(linear_cross_entropy(x.requires_grad_(), weight, labels), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 40), (2, BLOCK + 7)])
def test_soft_caps_and_their_gradients_are_right(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, dy = ((scale * torch.randn(shape, generator=generator)).to(dtype) for scale in (20, 1))

    def results(fn, x):
        x = x.detach().requires_grad_()
        y = fn(x)
        return {"y": y.detach().cpu(), "gradient": torch.autograd.grad(y, x, dy.to(y))[0].cpu()}

    def formula(x):
        y = x if x.dtype == torch.float64 else x.float()
        return (30 * torch.tanh(y / 30)).to(x.dtype)

    actual = results(lambda x: soft_cap(x, 30.0), x.to(DEVICE))
    assert_each(assert_matches, actual, results(formula, x.double()), results(formula, x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_do_not_count_may_hold_anything(value):
    x, labels = some((5, 40), torch.float32)
    x, labels = x.to(DEVICE), labels.to(DEVICE)
    junk = x.masked_fill((labels == -100)[:, None], value)
    expected, actual = (value_and_gradient(lambda x: cross_entropy(x, labels, 5.0, -100)[0], y) for y in (x, junk))
    assert_each(lambda a, b, name: torch.testing.assert_close(a, b, rtol=0, atol=0), actual, expected)


@pytest.mark.parametrize("label", [-1, 40, 1 << 40])
def test_a_label_that_is_no_word_is_seen(label):
    x, labels = some((5, 40), torch.float32)
    labels[2] = label
    result = value_and_gradient(lambda x: cross_entropy(x, labels.to(DEVICE), 5.0, -100)[0], x.to(DEVICE))
    assert result["loss"].isnan()
    assert result["gradient"][2].isnan().all() and result["gradient"][0].isfinite().all()


def test_large_logits_are_exact():
    x, labels = some((5, 40), torch.float32)
    x = 1000 * x
    actual = value_and_gradient(lambda x: cross_entropy(x, labels.to(DEVICE), None, -100)[0], x.to(DEVICE))
    expected = value_and_gradient(formula(labels, None), x.double())
    for name, y in actual.items():
        torch.testing.assert_close(y, expected[name].float(), rtol=1e-6, atol=1e-6)


def test_another_index_may_be_that_of_rows_that_do_not_count():
    x, labels = some((5, 40), torch.float32)
    labels = labels.where(labels != -100, 0).to(DEVICE)
    loss = cross_entropy(x.to(DEVICE), labels, None, 0)[0]
    torch.testing.assert_close(loss.cpu(), F.cross_entropy(x, labels.cpu(), ignore_index=0, reduction="sum"))


def test_rows_may_lie_anywhere():
    x, labels = torch.randn(6, 100, device=DEVICE)[::2, 10:50], torch.tensor([3, -100, 5], device=DEVICE)
    assert torch.equal(cross_entropy(x, labels, None, -100)[0], cross_entropy(x.clone(), labels, None, -100)[0])


def test_the_ops_are_registered_right():
    x, labels = some((5, 40), torch.float32)
    torch.library.opcheck(torch.ops.modeling_xlstm.soft_cap, (x.to(DEVICE).requires_grad_(), 5.0))
    inputs = torch.randn(5, 16, device=DEVICE).requires_grad_(), torch.randn(40, 16, device=DEVICE).requires_grad_()
    torch.library.opcheck(
        torch.ops.modeling_xlstm.linear_cross_entropy, (*inputs, labels.to(DEVICE), 5.0, -100, True, True)
    )
    torch.library.opcheck(
        torch.ops.modeling_xlstm.cross_entropy, (x.to(DEVICE).requires_grad_(), labels.to(DEVICE), 5.0, -100)
    )
