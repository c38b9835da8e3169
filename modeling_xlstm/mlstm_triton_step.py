"""mLSTM for one time step in Triton: one kernel, which reads and writes the state once, and returns h or y.

A program has all keys and `BV` values of one head, on chip from load to store, so that even a single sequence keeps a
GPU busy. What needs all values of a head is left to whichever of its programs arrives last, told by a counter: the
epilogue `y = sigmoid(ogate) * (layer_norm(h) * (weight + offset) + bias)`, and to write n and m where they may be the
ones that the other programs read. Sums are not in order of arrival: results are deterministic.

Log gates and exponentials are computed in float64, everything else in float32 and rounded once, at the end. The
backward pass of `mlstm_step` recomputes the step by its definition; the other ops have none.

Counters `[B, H]` are int32 zeros, and zeros again after the call. Given none, a call makes its own, at the price of a
second, tiny launch; that is safe anywhere, as a CUDA graph captures and replays it. Who calls often gives some that
live as long as the state, and to no two calls that may run at once.

Dims: `B` batch `H` heads `K` query and key dim `V` value dim. Letters are those of `mlstm_torch`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import full_precision
from .fused import soft_cap
from .mlstm_torch import MLSTMState, hold_padding
from .mlstm_torch import mlstm_step as mlstm_step_torch
from .mlstm_triton_kernels import LOG_FLOOR, _exp, _log_gates, _max
from .triton_language import blocks_of, power_of_2, tl, triton


# may have any value without another compilation
SIZES = "H sq_b sq_h sk_b sk_h sv_b sv_h si_b si_h sf_b sf_h so_b s_mask".split()


# kernel


@triton.jit(do_not_specialize=SIZES)
def mlstm_step_kernel(
    q, k, v, igate, fgate, mask, C, n, m, C_out, n_out, m_out, h, arrived, ogate, weight, bias, y,
    sq_b, sq_h, sk_b, sk_h, sv_b, sv_h, si_b, si_h, sf_b, sf_h, so_b, s_mask,
    H, softmax_scale, cap, eps, norm_eps, offset,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    SIGMOID: tl.constexpr, CAPPED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    COUNTED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """`BV` columns of C of one head, what they contribute to h, and in the last program of the head all the rest."""
    VB: tl.constexpr = (V + BV - 1) // BV
    i, i_v = tl.program_id(0) // VB, tl.program_id(0) % VB
    i, i_b, i_h = i.to(tl.int64), (i // H).to(tl.int64), (i % H).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    in_k, in_v = o_k < K, o_v < V
    o_kv, in_kv = o_k[:, None] * V + o_v[None, :], in_k[:, None] & in_v[None, :]
    # everything is under way before any of it is waited for
    logi = tl.load(igate + i_b * si_b + i_h * si_h)
    logf = tl.load(fgate + i_b * sf_b + i_h * sf_h)
    if HAS_MASK:
        real = tl.load(mask + i_b * s_mask)
    m_old = tl.load(m + i)
    b_n = tl.load(n + i * K + o_k, mask=in_k, other=0.0)
    b_q = tl.load(q + i_b * sq_b + i_h * sq_h + o_k, mask=in_k, other=0.0)
    b_k = tl.load(k + i_b * sk_b + i_h * sk_h + o_k, mask=in_k, other=0.0)
    b_v = tl.load(v + i_b * sv_b + i_h * sv_h + o_v, mask=in_v, other=0.0)
    b_C = tl.load(C + i * K * V + o_kv, mask=in_kv, other=0.0)
    logi, logf, _ = _log_gates(logi, logf, cap, SIGMOID, CAPPED)
    if HAS_MASK:
        b_q, b_k, b_v = tl.where(real, b_q, 0.0), tl.where(real, b_k, 0.0), tl.where(real, b_v, 0.0)
        logi, logf = tl.where(real, logi, float("-inf")), tl.where(real, logf, 0.0)
    logi = logi.to(tl.float32)
    if SIGMOID:
        logf, m_new = logf.to(tl.float32), tl.zeros_like(m_old)
    else:
        logf = (logf + m_old).to(tl.float32)
        m_new = _max(logf, logi)
        m_new = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing is left, and nothing enters: empty again
    f, floor = _exp(logf - m_new), _exp(tl.minimum(-m_new, LOG_FLOOR))
    b_q, b_k, b_v = b_q.to(tl.float32) * softmax_scale, b_k.to(tl.float32) * _exp(logi - m_new), b_v.to(tl.float32)
    b_C = f * b_C + b_k[:, None] * b_v[None, :]
    b_n = f * b_n + b_k
    numerator = tl.sum(b_q[:, None] * b_C, 0)
    normaliser = tl.abs(tl.sum(b_q * b_n, 0))
    b_h = tl.div_rn(numerator, _max(normaliser, floor) + eps)
    tl.store(h + i * V + o_v, b_h.to(h.dtype.element_ty), mask=in_v)
    last = i_v == 0  # or any other
    if COUNTED:
        tl.debug_barrier()
        last = tl.atomic_add(arrived + i, 1, sem="acq_rel") == VB - 1
    # after the barrier, as threads share what they read of a small block; after the count, which would wait for it
    tl.store(C_out + i * K * V + o_kv, b_C, mask=in_kv)
    if last:
        tl.store(n_out + i * K + o_k, b_n, mask=in_k)
        tl.store(m_out + i, m_new)
        if COUNTED:
            tl.store(arrived + i, 0)
        if GATED:
            o_n = tl.arange(0, BN)
            in_n = o_n < V
            x = tl.load(h + i * V + o_n, mask=in_n, other=0.0)
            o = tl.load(ogate + i_b * so_b + i_h * V + o_n, mask=in_n, other=0.0).to(tl.float32)
            w = tl.load(weight + i_h * V + o_n, mask=in_n, other=0.0).to(tl.float32) + offset
            x = tl.where(in_n, x - tl.sum(x, 0) / V, 0.0)
            x *= tl.rsqrt(tl.sum(x * x, 0) / V + norm_eps) * w
            if HAS_BIAS:
                x += tl.load(bias + i_h * V + o_n, mask=in_n, other=0.0).to(tl.float32)
            x *= tl.sigmoid(o)
            tl.store(y + i * V + o_n, x.to(y.dtype.element_ty), mask=in_n)


# launcher


class _Epilogue(NamedTuple):
    """What makes y of h, in the order of the arguments of the kernel."""

    ogate: Tensor
    weight: Tensor
    bias: Tensor | None
    y: Tensor


def _blocks(K: int, V: int) -> tuple[int, int, int]:
    """Keys and values of a program, and its warps. Picked for an H100: 128 programs for 8 heads of 256 x 512."""
    BK = power_of_2(K)
    BV = min(power_of_2(V), max(1, min(32, 8192 // BK)))
    return BK, BV, max(4, min(16, BK * BV // 1024))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, state: MLSTMState, mask: Tensor | None,
    input_gate: str, gate_soft_cap: float | None, eps: float, h: Tensor, out: MLSTMState,
    *, arrived: Tensor | None = None, epilogue: _Epilogue | None = None, norm_eps: float = 0.0, offset: float = 0.0,
) -> None:  # fmt: skip
    """Writes h `[B, H, V]` and the new state into `out`, which may be `state` where `arrived` counts programs.

    With an epilogue, h is float32 and its y is written as well.
    """
    B, H, K = q.shape
    V = v.shape[-1]
    BK, BV, warps = _blocks(K, V)
    q, k, v = _rows(q), _rows(k), _rows(v)
    ogate, weight, bias, y = epilogue or (None, None, None, None)
    with torch.cuda.device_of(q):
        mlstm_step_kernel[(B * H * blocks_of(V, BV),)](
            q, k, v, igate, fgate, mask, *state, *out, h, arrived, ogate, weight, bias, y,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *igate.stride(), *fgate.stride(),
            0 if ogate is None else ogate.stride(0), 0 if mask is None else mask.stride(0),
            H, K**-0.5, gate_soft_cap or 0.0, eps, norm_eps, offset,
            K=K, V=V, BK=BK, BV=BV, BN=power_of_2(V),
            SIGMOID=input_gate == "sigmoid", CAPPED=gate_soft_cap is not None, HAS_MASK=mask is not None,
            HAS_BIAS=bias is not None, COUNTED=arrived is not None, GATED=epilogue is not None, num_warps=warps,
        )  # fmt: skip


def _contiguous(C: Tensor, n: Tensor, m: Tensor) -> MLSTMState:
    return MLSTMState(C.contiguous(), n.contiguous(), m.contiguous())


def _in_place(C: Tensor, n: Tensor, m: Tensor) -> MLSTMState:
    for name, x in zip(MLSTMState._fields, (C, n, m), strict=True):
        if not x.is_contiguous():
            raise ValueError(f"state.{name} must be contiguous to be updated in place, got strides {x.stride()}.")
    return MLSTMState(C, n, m)


def _empty_state(C: Tensor, n: Tensor, m: Tensor) -> MLSTMState:
    return MLSTMState(*(x.new_empty(x.shape) for x in (C, n, m)))


def _counter(counter: Tensor | None, m: Tensor) -> Tensor:
    return torch.zeros(m.shape, dtype=torch.int32, device=m.device) if counter is None else counter


# ops


@torch.library.custom_op("modeling_xlstm::mlstm_step_triton", mutates_args=())
def mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, C: Tensor, n: Tensor, m: Tensor,
    mask: Tensor | None, input_gate: str, gate_soft_cap: float | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h `[B, H, V]` in the dtype of v, and the new C, n, m. `mask` is `[B]` bool, False where the step is padding."""
    h, out = v.new_empty(v.shape), _empty_state(C, n, m)
    state = _contiguous(C, n, m)
    _launch(q, k, v, igate, fgate, state, mask, input_gate, gate_soft_cap, eps, h, out)
    return h, *out


@mlstm_step.register_fake
def _(q, k, v, igate, fgate, C, n, m, mask, input_gate, gate_soft_cap, eps):
    return v.new_empty(v.shape), *_empty_state(C, n, m)


@torch.library.custom_op("modeling_xlstm::mlstm_step_triton_", mutates_args=("C", "n", "m"))
def mlstm_step_(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, C: Tensor, n: Tensor, m: Tensor,
    mask: Tensor | None, input_gate: str, gate_soft_cap: float | None, eps: float, counter: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """h of `mlstm_step`; the state, which must be contiguous, becomes the new one. Without gradients."""
    h, state = v.new_empty(v.shape), _in_place(C, n, m)
    arrived = _counter(counter, m)
    _launch(q, k, v, igate, fgate, state, mask, input_gate, gate_soft_cap, eps, h, state, arrived=arrived)
    return h


@mlstm_step_.register_fake
def _(q, k, v, igate, fgate, C, n, m, mask, input_gate, gate_soft_cap, eps, counter=None):
    return v.new_empty(v.shape)


def _gated(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, ogate: Tensor, state: MLSTMState, out: MLSTMState,
    weight: Tensor, bias: Tensor | None, mask: Tensor | None, input_gate: str, gate_soft_cap: float | None,
    eps: float, norm_eps: float, offset: float, counter: Tensor | None,
) -> Tensor:  # fmt: skip
    y, h = v.new_empty(ogate.shape), v.new_empty(v.shape, dtype=torch.float32)
    epilogue = _Epilogue(_rows(ogate), weight.contiguous(), None if bias is None else bias.contiguous(), y)
    _launch(
        q, k, v, igate, fgate, state, mask, input_gate, gate_soft_cap, eps, h, out,
        arrived=_counter(counter, state.m), epilogue=epilogue, norm_eps=norm_eps, offset=offset,
    )  # fmt: skip
    return y


@torch.library.custom_op("modeling_xlstm::mlstm_step_gated_triton", mutates_args=())
def mlstm_step_gated(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, ogate: Tensor, C: Tensor, n: Tensor, m: Tensor,
    weight: Tensor, bias: Tensor | None, mask: Tensor | None, input_gate: str, gate_soft_cap: float | None,
    eps: float, norm_eps: float, offset: float, counter: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`mlstm_step` with the norm of heads and the output gate: y `[B, H V]` in the dtype of v, and the new C, n, m.

    `ogate` `[B, H V]` is a pre-activation; `weight` and `bias` are `[H V]`, `offset` is added to the weight. Without
    gradients.
    """
    out = _empty_state(C, n, m)
    y = _gated(
        q, k, v, igate, fgate, ogate, _contiguous(C, n, m), out,
        weight, bias, mask, input_gate, gate_soft_cap, eps, norm_eps, offset, counter,
    )  # fmt: skip
    return y, *out


@mlstm_step_gated.register_fake
def _(q, k, v, igate, fgate, ogate, C, n, m, *_):
    return v.new_empty(ogate.shape), *_empty_state(C, n, m)


@torch.library.custom_op("modeling_xlstm::mlstm_step_gated_triton_", mutates_args=("C", "n", "m"))
def mlstm_step_gated_(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, ogate: Tensor, C: Tensor, n: Tensor, m: Tensor,
    weight: Tensor, bias: Tensor | None, mask: Tensor | None, input_gate: str, gate_soft_cap: float | None,
    eps: float, norm_eps: float, offset: float, counter: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y of `mlstm_step_gated`; the state, which must be contiguous, becomes the new one. Without gradients."""
    state = _in_place(C, n, m)
    return _gated(
        q, k, v, igate, fgate, ogate, state, state,
        weight, bias, mask, input_gate, gate_soft_cap, eps, norm_eps, offset, counter,
    )  # fmt: skip


@mlstm_step_gated_.register_fake
def _(q, k, v, igate, fgate, ogate, *_):
    return v.new_empty(ogate.shape)


# gradients


def _setup_context(ctx, inputs, output):
    tensors, ctx.options = inputs[:9], inputs[9:]
    ctx.save_for_backward(*tensors)


@once_differentiable
def _backward(ctx, *grads):
    *inputs, mask = ctx.saved_tensors
    input_gate, gate_soft_cap, eps = ctx.options
    with torch.enable_grad(), full_precision(grads[0].device):
        inputs = [x.detach().requires_grad_() for x in inputs]
        q, k, v, igate, fgate, *state = inputs
        igate, fgate = soft_cap(igate, gate_soft_cap), soft_cap(fgate, gate_soft_cap)
        held = hold_padding(q, k, v, igate, fgate, mask)
        h, last = mlstm_step_torch(*held, MLSTMState(*state), input_gate, eps)
        results = zip((h.to(v.dtype), *last), grads, strict=True)
    # m of a sigmoid gate depends on nothing
    outputs, d_outputs = zip(*((x, grad) for x, grad in results if x.requires_grad), strict=True)
    return *torch.autograd.grad(outputs, inputs, d_outputs, materialize_grads=True), None, None, None, None


mlstm_step.register_autograd(_backward, setup_context=_setup_context)
