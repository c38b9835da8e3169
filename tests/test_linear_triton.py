"""Products of a few rows in Triton against their formula in float64, on a GPU or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_matches
from triton_device import DEVICE, GPU, RUN, needs_somewhere_to_run


pytestmark = [pytest.mark.usefixtures("poisoned_memory"), needs_somewhere_to_run]

if RUN:
    from modeling_xlstm.linear_triton import Gates, Norm, multiply

DTYPES = (torch.float16, torch.bfloat16) if GPU else (torch.float16,)
# rows, inputs, outputs
SHAPES = [(1, 8, 1), (1, 40, 33), (1, 1032, 7), (2, 40, 33), (16, 136, 64), (17, 264, 70), (64, 72, 130)]
if GPU:
    SHAPES += [(1, 4096, 12288), (5, 10944, 4096), (8, 4096, 12288), (64, 4096, 50304), (33, 4096, 4096)]
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}


def formula(x, weight, norm=None, activation="", residual=None, cap=None):
    """What `multiply` computes, in the dtype of x, by PyTorch."""
    if norm is not None:
        x = F.rms_norm(x, x.shape[-1:], norm[0], norm[1])
    y = F.linear(x, weight)
    if activation:
        gate, up = y.chunk(2, -1)
        y = ACTIVATIONS[activation](gate) * up
    y = y if residual is None else y + residual
    return y if cap is None else cap * torch.tanh(y / cap)


def tensors(M, K, N, dtype, *, normed, activation, residual):
    gate = torch.Generator().manual_seed(M + K + N)
    draw = lambda *size: torch.randn(*size, generator=gate).to(dtype)  # noqa: E731
    weight = draw(N * (2 if activation else 1), K) / K**0.5
    return {
        "x": draw(M, K), "weight": weight, "norm": (1 + draw(K) / 4, 1e-5) if normed else None,
        "activation": activation, "residual": draw(M, N) if residual else None,
    }  # fmt: skip


def cast(x, dtype=None, device="cpu"):
    if isinstance(x, tuple):
        return tuple(cast(value, dtype, device) for value in x)
    return x.to(device=device, dtype=dtype) if isinstance(x, torch.Tensor) else x


def assert_right(options, cap=None):
    inputs = {name: cast(x, device=DEVICE) for name, x in options.items()}
    norm = inputs.pop("norm")
    y = multiply(inputs.pop("x"), inputs.pop("weight"), norm=None if norm is None else Norm(*norm), cap=cap, **inputs)
    baseline = formula(**options, cap=cap)
    oracle = formula(**{name: cast(x, torch.float64) for name, x in options.items()}, cap=cap)
    assert_matches(y.cpu(), oracle, baseline)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, K, N", SHAPES)
def test_any_shape_is_right(M, K, N, dtype):
    assert_right(tensors(M, K, N, dtype, normed=False, activation="", residual=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("M, K, N", [(1, 264, 130), (9, 264, 130), (40, 264, 130)])
def test_what_comes_before_and_after_is_right(M, K, N, normed, activation, residual, dtype):
    options = tensors(M, K, N, dtype, normed=normed, activation=activation, residual=residual)
    assert_right(options, cap=2.5 if normed else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, K, G", [(1, 264, 3), (1, 1032, 16), (7, 264, 1), (16, 1032, 16)])
def test_gates_are_of_the_normalised_rows_in_float32(M, K, G, dtype):
    options = tensors(M, K, 24, dtype, normed=True, activation="", residual=False)
    weight, bias = torch.randn(G, K) / K**0.5, torch.randn(G)
    out = torch.full((M, G), torch.nan, device=DEVICE)
    norm = Norm(*cast(options["norm"], device=DEVICE))
    gates = Gates(weight.to(DEVICE), bias.to(DEVICE), out)
    y = multiply(options["x"].to(DEVICE), options["weight"].to(DEVICE), norm=norm, gates=gates)
    x = F.rms_norm(options["x"].double(), (K,), options["norm"][0].double(), 1e-5)
    baseline = F.linear(x.float(), weight, bias)
    assert_matches(out.cpu(), F.linear(x, weight.double(), bias.double()), baseline)
    double = {name: cast(value, torch.float64) for name, value in options.items()}
    assert_matches(y.cpu(), formula(**double), formula(**options))


@pytest.mark.skipif(not GPU, reason="the interpreter has no products in other orders")
@pytest.mark.parametrize("M", [1, 8, 64])
def test_two_runs_are_bit_equal(M):
    x, weight = torch.randn(M, 4096, device=DEVICE).bfloat16(), torch.randn(8192, 4096, device=DEVICE).bfloat16()
    norm = Norm(torch.rand(4096, device=DEVICE).bfloat16(), 1e-6)
    first, second = (multiply(x, weight, norm=norm, activation="silu") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("M", [1, 9])
def test_the_result_is_written_where_it_is_wanted_and_as_often(M):
    options = tensors(M, 264, 130, torch.float16, normed=False, activation="", residual=False)
    x, weight = options["x"].to(DEVICE), options["weight"].to(DEVICE)
    out, *others = torch.full((4, M, 130), torch.nan, device=DEVICE)
    copies = torch.tensor([place.data_ptr() for place in others[:2]], device=DEVICE)
    assert multiply(x, weight, out=out, copies=copies) is out
    assert torch.equal(out.half(), multiply(x, weight))
    assert all(torch.equal(place, out) for place in others[:2])
    assert others[2].isnan().all()
