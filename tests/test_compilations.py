"""What is compiled for a GPU, counted without one: nothing for another batch, length or order of axes in memory."""

from types import SimpleNamespace

import pytest
import torch

from modeling_xlstm.backends import INTERPRETED


pytest.importorskip("triton")
if torch.cuda.is_available() or INTERPRETED:
    pytest.skip("counts what a GPU that is not there would need", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from modeling_xlstm import mlstm_triton, slstm_triton


pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")


@pytest.fixture
def compiled(monkeypatch):
    """Names of kernels in the order in which an H100 would have them compiled. Nothing runs."""
    names: list[str] = []
    run = JITFunction.run

    def compile_(self, key, signature, device, *_):
        names.append(self.fn.__name__)
        self.device_caches[device][0][key] = SimpleNamespace()

    monkeypatch.setattr(JITFunction, "_do_compile", compile_)
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *args, **options: run(self, *args, **options | {"warmup": True})
    )
    monkeypatch.setattr(mlstm_triton, "shared_memory", lambda device: 232_448)
    monkeypatch.setattr(mlstm_triton, "processors", lambda device: 132)
    monkeypatch.setattr(mlstm_triton, "_compiled_states", set())
    monkeypatch.setattr(slstm_triton, "shared_memory", lambda device: 232_448)
    monkeypatch.setattr(slstm_triton, "processors", lambda device: 132)
    monkeypatch.setattr(slstm_triton, "_compiled", set())
    h100 = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: "an H100",
        get_current_stream=lambda device: 0,
    )
    modules = vars(mlstm_triton) | vars(slstm_triton)
    kernels = [x for name, x in modules.items() if name.endswith("_kernel")]
    monkeypatch.setattr(driver, "_active", h100)
    yield names
    for kernel in kernels:
        kernel.device_caches.pop("an H100", None)


ORDERS = {"tokens": (0, 1, 2), "heads": (0, 2, 1), "time": (1, 0, 2)}  # of B, T and H in memory


def forward_and_backward(B, T, H, K, V, order="tokens", packed=False):
    """The launches of both passes, for tensors without data."""

    def tensor(*dims, dtype=torch.bfloat16):
        sizes = [(B, T, H)[axis] for axis in ORDERS[order]]
        x = torch.empty(*sizes, *dims, dtype=dtype, device="meta")
        return x.permute(*(ORDERS[order].index(axis) for axis in range(3)), *range(3, x.dim()))

    q, k, v, h, dh = (tensor(size) for size in (K, K, V, V, V))
    gates = torch.empty(B, T, 2 * H + 1, device="meta")
    igate, fgate = gates[..., 1 : H + 1], gates[..., H + 1 :]
    cu_seqlens = torch.empty(3 + B, dtype=torch.int32, device="meta") if packed else None
    state, options = (None, None, None), (False, None, 1e-6)
    _, _, _, _, *kept = mlstm_triton._forward(q, k, v, igate, fgate, *state, cu_seqlens, *options)
    mlstm_triton._backward_pass(dh, *state, q, k, v, igate, fgate, cu_seqlens, h, *kept, False, *options)


@pytest.mark.parametrize("H", [1, 2, 16])
@pytest.mark.parametrize("K, V", [(24, 40), (128, 256), (256, 512)])
def test_nothing_is_compiled_again_for_another_batch_length_or_order(compiled, K, V, H):
    forward_and_backward(1, 16, H, K, V)
    assert {name.removeprefix("mlstm_") for name in compiled} == {
        "fwd_gates_kernel", "fwd_stabiliser_kernel", "state_kernel", "fwd_scores_kernel", "fwd_combine_kernel",
        "bwd_rows_kernel", "bwd_scores_kernel", "bwd_combine_kernel", "bwd_stabiliser_kernel", "bwd_gates_kernel",
    }  # fmt: skip
    compiled.clear()
    for B, T in ((2, 17), (3, 256), (200, 16), (5, 513), (1, 1), (1, 100_000)):
        for order in ORDERS:
            forward_and_backward(B, T, H, K, V, order)
            assert compiled == [], (B, T, order)


def test_nothing_is_compiled_again_for_other_packed_sequences(compiled):
    forward_and_backward(1, 16, 2, 128, 256, packed=True)
    compiled.clear()
    for T in (1, 17, 513, 100_000):
        forward_and_backward(1, T, 2, 128, 256, packed=True)
        assert compiled == [], T


def scan(B, T, H, D, rows=None):
    """The launches of both passes of an sLSTM, for tensors without data; packed if there are rows."""

    def tensor(*size, dtype=torch.bfloat16):
        return torch.empty(size, dtype=dtype, device="meta")

    bounds = None if rows is None else tensor(rows + 1, dtype=torch.int32)
    states = [tensor(B if rows is None else rows, H, D, dtype=torch.float32) for _ in range(4)]
    R = tensor(H, 4, D, D)
    y, *_, pre, before, h_before = slstm_triton._forward(tensor(B, T, H, 4, D), R, *states, None, bounds, True)
    slstm_triton._backward_pass(y, *states, R, *states[1:], None, bounds, pre, before, h_before)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("H", [1, 2, 16])
@pytest.mark.parametrize("D, count", [(24, 1), (64, 1), (72, 2), (256, 2), (1024, 1)])
def test_no_scan_is_compiled_again_for_another_batch_or_length(compiled, D, count, H, packed):
    rows = [1, 2, 16, 200] if packed else [None] * 4
    scan(1, 16, H, D, rows[0])
    assert sorted(compiled) == ["slstm_bwd_kernel"] * count + ["slstm_fwd_kernel"] * count
    compiled.clear()
    for T, n in zip((1, 17, 513, 100_000), rows, strict=True):
        for B in (1,) if packed else (1, 2, 16, 200):
            scan(B, T, H, D, n)
            assert compiled == [], (B, T, n)
