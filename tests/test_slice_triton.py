"""The Triton kernels of what a slice adds to a state against its definition, on a GPU or in Triton's interpreter."""

import pytest
import torch
from triton_device import DEVICE, GPU, RUN, needs_somewhere_to_run


pytestmark = [pytest.mark.usefixtures("poisoned_memory"), needs_somewhere_to_run]

if RUN:
    from modeling_xlstm import slice_triton
    from modeling_xlstm.slice_triton import slice_sum, slice_sum_backward

# of the sum of absolute terms: sums in float32, of numbers of 16 bits where the inputs are bfloat16
ROUNDING = {torch.float32: 2**-20, torch.float16: 2**-20}
if GPU:  # the interpreter has no products in bfloat16
    ROUNDING[torch.bfloat16] = 2**-15
SHAPES = [(1, 1, 1, 16, 16), (2, 5, 3, 5, 7), (1, 70, 2, 24, 40), (2, 64, 1, 64, 32), (1, 33, 2, 80, 130)]
if GPU:
    SHAPES += [(1, 5000, 2, 256, 512), (2, 3001, 3, 128, 256), (1, 777, 2, 300, 600), (1, 200_000, 1, 64, 96)]


def inputs_of(B, T, H, K, V, dtype):
    """k and v, views of one projection as in a layer, and weights, some of them below what float16 holds."""
    q, k, v = torch.randn(B, T, H * (2 * K + V)).to(DEVICE, dtype).split([H * K, H * K, H * V], -1)
    w = torch.exp(-20 * torch.rand(B, H, T)).to(DEVICE)
    return k.unflatten(-1, (H, K)), v.unflatten(-1, (H, V)), w


def gradients_of(k, v):
    B, _, H, K = k.shape
    return torch.randn(B, H, K, v.shape[-1], device=DEVICE), torch.randn(B, H, K, device=DEVICE)


def formula(dC, dn, k, v, w):
    """Sums and gradients, written out."""
    weights = w.mT[..., None]
    C, n = torch.einsum("bthk,bthv->bhkv", weights * k, v), (weights * k).sum(1)
    d = torch.einsum("bthv,bhkv->bthk", v, dC) + dn[:, None]
    dv = weights * torch.einsum("bthk,bhkv->bthv", k, dC)
    return C, n, weights * d, dv, (d * k).sum(-1).mT


def assert_right(k, v, w, dC, dn):
    """To a part of the sum of absolute terms, beside what gradients in half precision lose when stored so."""
    inputs = dC, dn, k, v, w
    actual = *slice_sum(k, v, w), *slice_sum_backward(*inputs)
    oracle, scale = formula(*(x.double() for x in inputs)), formula(*(x.double().abs() for x in inputs))
    assert [x.dtype for x in actual] == [w.dtype, w.dtype, k.dtype, v.dtype, w.dtype]
    for name, x, y, terms in zip(("C", "n", "dk", "dv", "dw"), actual, oracle, scale, strict=True):
        assert x.shape == y.shape, name
        numbers = torch.finfo(x.dtype)
        stored = numbers.eps / 2 * y.abs().clamp(min=numbers.smallest_normal)
        error = (x - y).abs() - stored
        assert (error <= ROUNDING[k.dtype] * terms).all(), f"{name}: {(error / terms).max():.3g} of absolute terms"


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("B, T, H, K, V", SHAPES)
def test_sums_and_gradients_are_right(B, T, H, K, V, dtype):
    k, v, w = inputs_of(B, T, H, K, V, dtype)
    assert_right(k, v, w, *gradients_of(k, v))


@pytest.mark.parametrize("dtype", ROUNDING)
def test_many_segments_are_right(dtype, monkeypatch):
    """The last of which ends within a block."""
    monkeypatch.setattr(slice_triton, "SEGMENT", 64)
    k, v, w = inputs_of(2, 300, 2, 24, 40, dtype)
    assert_right(k, v, w, *gradients_of(k, v))


@pytest.mark.parametrize("dtype", ROUNDING)
def test_any_strides_are_right(dtype):
    """Heads before time, the head dim not the last in memory, gradients of one number."""
    B, T, H, K, V = 2, 37, 3, 24, 40
    k = torch.randn(B, H, T, K).to(DEVICE, dtype).transpose(1, 2)
    v = torch.randn(B, T, V, H).to(DEVICE, dtype).mT
    w = torch.rand(B, T, H).to(DEVICE).mT
    dC, dn = torch.ones(1, 1, 1, 1, device=DEVICE).expand(B, H, K, V), torch.randn(B, K, H, device=DEVICE).mT
    assert_right(k, v, w, dC, dn)


def test_tokens_without_weight_leave_zeros():
    k, v, w = inputs_of(1, 40, 2, 16, 32, torch.float16)
    dC, dn = gradients_of(k, v)
    C, n = slice_sum(k, v, torch.zeros_like(w))
    dk, dv, dw = slice_sum_backward(dC, dn, k, v, torch.zeros_like(w))
    assert not any(x.any() for x in (C, n, dk, dv))
    assert torch.equal(dw, slice_sum_backward(dC, dn, k, v, w)[2])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_results_have_the_same_bits_again(dtype, monkeypatch):
    monkeypatch.setattr(slice_triton, "SEGMENT", 64)
    k, v, w = inputs_of(1, 200, 2, 24, 40, dtype)
    inputs = *gradients_of(k, v), k, v, w
    first, again = ((*slice_sum(k, v, w), *slice_sum_backward(*inputs)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.skipif(not GPU, reason="on a CPU the sum is PyTorch's")
@pytest.mark.parametrize("dtype", ROUNDING)
def test_it_is_what_a_slice_is_summed_by(dtype):
    from modeling_xlstm.sequence_parallel import _WeightedSum

    k, v, w = (x.detach().requires_grad_() for x in inputs_of(2, 300, 2, 24, 40, dtype))
    d = gradients_of(k, v)
    sums = _WeightedSum.apply(k, v, w)
    assert all(torch.equal(x, y) for x, y in zip(sums, slice_sum(k, v, w), strict=True))
    gradients = torch.autograd.grad(sums, (k, v, w), d)
    assert all(torch.equal(x, y) for x, y in zip(gradients, slice_sum_backward(*d, k, v, w), strict=True))


def test_the_ops_are_registered_right():
    k, v, w = inputs_of(1, 20, 2, 16, 32, torch.float16)
    torch.library.opcheck(torch.ops.modeling_xlstm.slice_sum, (k, v, w))
    torch.library.opcheck(torch.ops.modeling_xlstm.slice_sum_backward, (*gradients_of(k, v), k, v, w))
