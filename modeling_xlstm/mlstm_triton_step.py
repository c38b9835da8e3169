"""mLSTM for one or a few time steps in Triton: the state is read and written once.

A program has all keys and `BV` values of one head, on chip from load to store, so that even a single sequence keeps a
GPU busy; it takes one time step after the other. Where the state is overwritten, n and m are written by a second
kernel, as every program of a head reads them; it has what else needs all values of a head, the norm and output gate.

Log gates and exponentials are computed in float64, everything else in float32 and rounded once, at the end. The
backward pass of `mlstm_step` recomputes the step by its definition; the ops in place have none.

Dims: `B` batch `T` time `H` heads `K` query and key dim `V` value dim. Letters are those of `mlstm_torch`.
"""

import torch
from torch import Tensor

from .checks import full_precision
from .custom_op import op
from .fused import soft_cap
from .mlstm_torch import MLSTMState, hold_padding
from .mlstm_torch import mlstm_step as mlstm_step_torch
from .mlstm_triton_kernels import _exp, _floor, _log_gates, _max
from .triton_language import blocks_of, chain_options, chains, gdc_launch_dependents, gdc_wait, power_of_2, tl, triton


# may have any value without another compilation; of T it counts whether it is one, or a multiple of 16
SIZES = "H sq_b sq_t sq_h sk_b sk_t sk_h sv_b sv_t sv_h si_b si_t si_h sf_b sf_t sf_h sm_b sm_t".split()


# kernel


@triton.jit(do_not_specialize=SIZES)
def mlstm_step_kernel(
    q, k, v, igate, fgate, mask, C, n, m, C_out, n_out, m_out, h,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, sv_b, sv_t, sv_h, si_b, si_t, si_h, sf_b, sf_t, sf_h, sm_b, sm_t,
    H, T, softmax_scale, cap, eps,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SIGMOID: tl.constexpr, CAPPED: tl.constexpr, HAS_MASK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """`BV` columns of C of one head and of h, and in the first program of the head n and m."""
    VB: tl.constexpr = (V + BV - 1) // BV
    i, i_v = tl.program_id(0) // VB, tl.program_id(0) % VB
    i, i_b, i_h = i.to(tl.int64), (i // H).to(tl.int64), (i % H).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    in_k, in_v = o_k < K, o_v < V
    o_kv, in_kv = o_k[:, None] * V + o_v[None, :], in_k[:, None] & in_v[None, :]
    q, k, v = q + i_b * sq_b + i_h * sq_h, k + i_b * sk_b + i_h * sk_h, v + i_b * sv_b + i_h * sv_h
    igate, fgate = igate + i_b * si_b + i_h * si_h, fgate + i_b * sf_b + i_h * sf_h
    h += (i_b * T * H + i_h) * V  # where a time step is H V further
    # everything is under way before any of it is waited for; the state, for what comes before this in a chain too
    m_new = tl.load(m + i)
    b_n = tl.load(n + i * K + o_k, mask=in_k, other=0.0)
    b_C = tl.load(C + i * K * V + o_kv, mask=in_kv, other=0.0)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    for t in range(T):
        logi, logf = tl.load(igate + t * si_t), tl.load(fgate + t * sf_t)
        b_q = tl.load(q + t * sq_t + o_k, mask=in_k, other=0.0)
        b_k = tl.load(k + t * sk_t + o_k, mask=in_k, other=0.0)
        b_v = tl.load(v + t * sv_t + o_v, mask=in_v, other=0.0)
        logi, logf, _ = _log_gates(logi, logf, cap, SIGMOID, CAPPED)
        if HAS_MASK:
            real = tl.load(mask + i_b * sm_b + t * sm_t)
            b_q, b_k, b_v = tl.where(real, b_q, 0.0), tl.where(real, b_k, 0.0), tl.where(real, b_v, 0.0)
            logi, logf = tl.where(real, logi, float("-inf")), tl.where(real, logf, 0.0)
        logi = logi.to(tl.float32)
        if SIGMOID:
            logf, m_new = logf.to(tl.float32), tl.zeros_like(m_new)
        else:
            logf = (logf + m_new).to(tl.float32)
            m_new = _max(logf, logi)
            m_new = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing is left, and nothing enters: empty again
        f, floor = _exp(logf - m_new), _floor(m_new)
        b_q, b_v = b_q.to(tl.float32) * softmax_scale, b_v.to(tl.float32)
        b_k = b_k.to(tl.float32) * _exp(logi - m_new)
        b_C = f * b_C + b_k[:, None] * b_v[None, :]
        b_n = f * b_n + b_k
        numerator = tl.sum(b_q[:, None] * b_C, 0)
        normaliser = tl.abs(tl.sum(b_q * b_n, 0))
        b_h = tl.div_rn(numerator, _max(normaliser, floor) + eps)
        tl.store(h + t * H * V + o_v, b_h.to(h.dtype.element_ty), mask=in_v)
    tl.debug_barrier()  # threads share what they read of a small block
    tl.store(C_out + i * K * V + o_kv, b_C, mask=in_kv)
    if i_v == 0:
        tl.store(n_out + i * K + o_k, b_n, mask=in_k)
        tl.store(m_out + i, m_new)


@triton.jit(do_not_specialize=["so_b", "so_t", "H"])
def mlstm_finish_kernel(
    n_new, m_new, n, m, h, ogate, weight, bias, y, so_b, so_t, H, T, norm_eps, offset,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """n and m of one head, and `y = sigmoid(ogate) * (layer_norm(h) * (weight + offset) + bias)`."""
    i = tl.program_id(0)
    i, i_b, i_h = i.to(tl.int64), (i // H).to(tl.int64), (i % H).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v = o_k < K, o_v < V
    if GATED:
        w = tl.load(weight + i_h * V + o_v, mask=in_v, other=0.0).to(tl.float32) + offset
        if HAS_BIAS:
            b = tl.load(bias + i_h * V + o_v, mask=in_v, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    tl.store(n + i * K + o_k, tl.load(n_new + i * K + o_k, mask=in_k), mask=in_k)
    tl.store(m + i, tl.load(m_new + i))
    if GATED:
        row = (i_b * T * H + i_h) * V
        for t in range(T):
            x = tl.load(h + row + t * H * V + o_v, mask=in_v, other=0.0)
            o = tl.load(ogate + i_b * so_b + t * so_t + i_h * V + o_v, mask=in_v, other=0.0).to(tl.float32)
            x = tl.where(in_v, x - tl.sum(x, 0) / V, 0.0)
            x *= tl.rsqrt(tl.sum(x * x, 0) / V + norm_eps) * w
            if HAS_BIAS:
                x += b
            x *= tl.sigmoid(o)
            tl.store(y + row + t * H * V + o_v, x.to(y.dtype.element_ty), mask=in_v)


# launcher


def _blocks(K: int, V: int) -> tuple[int, int, int]:
    """Keys and values of a program, and its warps. Picked for an H100: 128 programs for 8 heads of 256 x 512."""
    BK = power_of_2(K)
    BV = min(power_of_2(V), max(1, min(32, 8192 // BK)))
    return BK, BV, max(4, min(16, BK * BV // 1024))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, state: MLSTMState, mask: Tensor | None,
    input_gate: str, gate_soft_cap: float | None, eps: float, h: Tensor, out: MLSTMState, chained: bool = False,
) -> None:  # fmt: skip
    """Writes h `[B, T, H, V]` and the new state into `out`, whose C may be that of `state`."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    BK, BV, warps = _blocks(K, V)
    q, k, v = _rows(q), _rows(k), _rows(v)
    with torch.cuda.device_of(q):
        mlstm_step_kernel[(B * H * blocks_of(V, BV),)](
            q, k, v, igate, fgate, mask, *state, *out, h,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *igate.stride(), *fgate.stride(),
            *((0, 0) if mask is None else mask.stride()), H, T, K**-0.5, gate_soft_cap or 0.0, eps,
            K=K, V=V, BK=BK, BV=BV, SIGMOID=input_gate == "sigmoid", CAPPED=gate_soft_cap is not None,
            HAS_MASK=mask is not None, num_warps=warps, **chain_options(chained),
        )  # fmt: skip


def _overwrite(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, C: Tensor, n: Tensor, m: Tensor,
    mask: Tensor | None, input_gate: str, gate_soft_cap: float | None, eps: float, h: Tensor,
    ogate: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None, y: Tensor | None = None,
    norm_eps: float = 0.0, offset: float = 0.0,
) -> None:  # fmt: skip
    """`_launch` with the new state in place of the old one; with an output gate, y of h."""
    for name, x in zip(MLSTMState._fields, (C, n, m), strict=True):
        if not x.is_contiguous():
            raise ValueError(f"state.{name} must be contiguous to be overwritten, got strides {x.stride()}.")
    B, T, H, K = q.shape
    V, chained = v.shape[-1], B == 1 and chains(q.device)  # more keep a GPU busy, and those in front of them waiting
    new = MLSTMState(C, torch.empty_like(n), torch.empty_like(m))
    _launch(q, k, v, igate, fgate, MLSTMState(C, n, m), mask, input_gate, gate_soft_cap, eps, h, new, chained)
    with torch.cuda.device_of(q):
        mlstm_finish_kernel[(B * H,)](
            new.n, new.m, n, m, h, ogate, weight, bias, y, *((0, 0) if ogate is None else ogate.stride()[:2]),
            H, T, norm_eps, offset, K=K, V=V, BK=power_of_2(K), BV=power_of_2(V),
            GATED=ogate is not None, HAS_BIAS=bias is not None, **chain_options(chained),
        )  # fmt: skip


# ops


@op("mlstm_step_triton")
def mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, C: Tensor, n: Tensor, m: Tensor,
    mask: Tensor | None, input_gate: str, gate_soft_cap: float | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h `[B, H, V]` in the dtype of v, and the new C, n, m. `mask` is `[B]` bool, False where the step is padding."""
    h, out = v.new_empty(v.shape), MLSTMState(*(x.new_empty(x.shape) for x in (C, n, m)))
    state = MLSTMState(C.contiguous(), n.contiguous(), m.contiguous())
    q, k, v, igate, fgate = (x.unsqueeze(1) for x in (q, k, v, igate, fgate))
    mask = None if mask is None else mask.unsqueeze(1)
    _launch(q, k, v, igate, fgate, state, mask, input_gate, gate_soft_cap, eps, h, out)
    return h, *out


@mlstm_step.register_fake
def _(q, k, v, igate, fgate, C, n, m, mask, input_gate, gate_soft_cap, eps):
    return v.new_empty(v.shape), *(x.new_empty(x.shape) for x in (C, n, m))


@torch.library.custom_op("modeling_xlstm::mlstm_steps_triton_", mutates_args=("C", "n", "m"))
def mlstm_steps_(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, C: Tensor, n: Tensor, m: Tensor,
    mask: Tensor | None, input_gate: str, gate_soft_cap: float | None, eps: float,
) -> Tensor:  # fmt: skip
    """h `[B, T, H, V]` in the dtype of v; the state, which must be contiguous, becomes the new one. Without gradients.

    `mask` is `[B, T]` bool, False where a step is padding.
    """
    h = v.new_empty(v.shape)
    _overwrite(q, k, v, igate, fgate, C, n, m, mask, input_gate, gate_soft_cap, eps, h)
    return h


@mlstm_steps_.register_fake
def _(q, k, v, igate, fgate, C, n, m, mask, input_gate, gate_soft_cap, eps):
    return v.new_empty(v.shape)


@torch.library.custom_op("modeling_xlstm::mlstm_steps_gated_triton_", mutates_args=("C", "n", "m"))
def mlstm_steps_gated_(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, ogate: Tensor, C: Tensor, n: Tensor, m: Tensor,
    weight: Tensor, bias: Tensor | None, mask: Tensor | None, input_gate: str, gate_soft_cap: float | None,
    eps: float, norm_eps: float, offset: float,
) -> Tensor:  # fmt: skip
    """`mlstm_steps_` with the norm of heads and the output gate: y `[B, T, H V]` in the dtype of v.

    `ogate` `[B, T, H V]` is a pre-activation; `weight` and `bias` are `[H V]`, `offset` is added to the weight.
    """
    y, h = v.new_empty(ogate.shape), v.new_empty(v.shape, dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    _overwrite(
        q, k, v, igate, fgate, C, n, m, mask, input_gate, gate_soft_cap, eps, h,
        _rows(ogate), weight.contiguous(), bias, y, norm_eps, offset,
    )  # fmt: skip
    return y


@mlstm_steps_gated_.register_fake
def _(q, k, v, igate, fgate, ogate, *_):
    return v.new_empty(ogate.shape)


# gradients


def _setup_context(ctx, inputs, output):
    tensors, ctx.options = inputs[:9], inputs[9:]
    ctx.save_for_backward(*tensors)


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


mlstm_step.register_autograd(_backward, _setup_context)
