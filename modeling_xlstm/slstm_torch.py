"""sLSTM cell in PyTorch: step (the definition), recurrent (a loop of steps), scan (the same, differentiated by hand).

Paper: https://arxiv.org/abs/2405.04517, equations 8 to 18, stabilised as in its appendix A.2, with an exponential input
gate and a sigmoid forget gate.

| code | meaning | paper |
|---|---|---|
| `gates` | input parts of the pre-activations, `W x + b`, in the order i f z o | ĩ f̃ z̃ õ less R h |
| `R` | recurrent weights, block-diagonal over heads: memory mixing | R |
| `h c n m` | output, cell, normaliser, stabiliser; `c` and `n` hold their values times `exp(-m)` | h_t c_t n_t m_t |

Dims: `B` batch `T` time `H` heads `D` head dim. All arithmetic is in float32, or float64 if the inputs are. The scan is
time-major inside: a step is one matrix product and a few small elementwise operations on preallocated memory, and the
backward pass precomputes everything that does not depend on the gradient of a later step for all steps at once.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


# Largest log weight of the state before the first step, where the stabiliser follows the input gate alone.
MAX_LOG_WEIGHT = 80.0


class SLSTMState(NamedTuple):
    """Recurrent state of an sLSTM cell, float32 (float64 for float64 inputs). A new sequence starts from zeros."""

    h: Tensor  # [B, H, D]
    c: Tensor  # [B, H, D]
    n: Tensor  # [B, H, D], zero only while empty
    m: Tensor  # [B, H, D]


def slstm_step(gates: Tensor, R: Tensor, state: SLSTMState) -> tuple[Tensor, SLSTMState]:
    """One time step: gates `[B, H, 4, D]`, R `[H, 4, D_out, D_in]`. The definition of the sLSTM."""
    h, c, n, m = state
    recurrent = torch.einsum("hgoi,bhi->bhgo", R.to(h.dtype), h)
    i, f, z, o = (gates.to(h.dtype) + recurrent).unbind(-2)
    logf = F.logsigmoid(f) + m
    # an empty state weighs nothing, and its m must not push the first input out of range
    m_new = torch.where(n == 0, i, torch.maximum(i, logf))
    f = torch.exp((logf - m_new).clamp(max=MAX_LOG_WEIGHT))
    i = torch.exp(i - m_new)
    c = f * c + i * torch.tanh(z)
    n = f * n + i
    h = torch.sigmoid(o) * c / n
    return h, SLSTMState(h, c, n, m_new)


def slstm_recurrent(
    gates: Tensor, R: Tensor, state: SLSTMState, mask: Tensor | None = None
) -> tuple[Tensor, SLSTMState]:
    """A loop of steps over `[B, T, H, 4, D]`: what `slstm_scan` is tested against."""
    h = []
    for t in range(gates.shape[1]):
        _, new = slstm_step(gates[:, t], R, state)
        if mask is not None:
            real = mask[:, t, None, None]
            new = SLSTMState(*(torch.where(real, a, b) for a, b in zip(new, state, strict=True)))
        state = new
        h.append(state.h)
    return torch.stack(h, 1), state


class _Rows:
    """Moves `[B, T, H, ...]` to time-major rows `[T, H, B, ...]`, one row a sequence when packed, and back."""

    def __init__(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None):
        self.mask = None if mask is None or bool(mask.all()) else mask
        self.row = None
        if cu_seqlens is not None:
            bounds = cu_seqlens.to(x.device, torch.int64)
            lengths = bounds.diff()
            self.rows, self.T = lengths.numel(), int(lengths.max())
            self.row = torch.repeat_interleave(torch.arange(self.rows, device=x.device), lengths)
            self.time = torch.arange(x.shape[1], device=x.device) - bounds[self.row]
            self.mask = torch.arange(self.T, device=x.device) < lengths[:, None]
        # [T, 1, B, 1] True at real positions, or None if all are
        self.real = None if self.mask is None else self.mask.t()[:, None, :, None]

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B, T, H, ...]` to a contiguous `[T, H, B, ...]` of `dtype`, zero where there is no token."""
        if self.row is not None:
            y = x.new_zeros(self.rows, self.T, *x.shape[2:])
            y[self.row, self.time] = x[0]
            x = y
        return x.transpose(0, 1).transpose(1, 2).to(dtype).contiguous()

    def merge(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `split`."""
        x = x.transpose(1, 2).transpose(0, 1)
        if self.row is not None:
            x = x[self.row, self.time][None]
        return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _states(*states: Tensor) -> list[Tensor]:
    """`[B, H, D]` to `[H, B, D]`, or back: always new memory, as outputs of a custom op must be."""
    return [x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in states]


@torch.library.custom_op("modeling_xlstm::slstm_scan", mutates_args=())
def slstm_scan(
    gates: Tensor, R: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor,
    mask: Tensor | None, cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h `[B, T, H, D]` in the dtype of gates; the final h, c, n, m; and, if `keep`, what the backward pass needs:
    the pre-activations and h, c, n, m after each step, both `[B, T, H, 4, D]` in the dtype of the state."""
    dtype = h.dtype
    rows = _Rows(gates, mask, cu_seqlens)
    pre = rows.split(gates, dtype)  # [T, H, B, 4, D]
    T, H, B, _, D = pre.shape
    weight = R.to(dtype).flatten(1, 2).mT.contiguous()  # [H, D_in, 4 D_out]
    h, c, n, m = _states(h, c, n, m)
    slots = T if keep else 2
    after = torch.empty(4, slots, H, B, D, dtype=dtype, device=h.device)
    y = after[0] if keep else torch.empty(T, H, B, D, dtype=dtype, device=h.device)
    weights = torch.empty(2, H, B, D, dtype=dtype, device=h.device)
    i, f = weights.unbind()  # what input and state weigh in the new state
    empty: Tensor | None = n == 0
    for t in range(T):
        preact = pre[t]
        preact.view(H, B, 4 * D).baddbmm_(h, weight)
        i.copy_(preact[:, :, 0])
        torch.add(F.logsigmoid(preact[:, :, 1]), m, out=f)
        m_new = torch.maximum(i, f)
        if empty is not None:
            m_new = torch.where(empty, i, m_new)
            f.clamp_(max=m_new + MAX_LOG_WEIGHT)
        weights.sub_(m_new).exp_()
        old = h, c, n, m
        h, c, n, m = y[t], *after[1:, t % slots].unbind()
        torch.addcmul(torch.tanh(preact[:, :, 2]).mul_(i), f, old[1], out=c)
        torch.addcmul(i, f, old[2], out=n)
        torch.sigmoid(preact[:, :, 3], out=h).mul_(c).div_(n)
        m.copy_(m_new)
        if rows.real is None:
            empty = None
        else:
            for x, x_old in zip((h, c, n, m), old, strict=True):
                torch.where(rows.real[t], x, x_old, out=x)
            empty = empty & ~rows.real[t]
    residuals = [rows.merge(x, dtype) if keep else h.new_empty(0) for x in (pre, after.movedim(0, 3))]
    return rows.merge(y, gates.dtype), *_states(h, c, n, m), *residuals


@slstm_scan.register_fake
def _(gates, R, h, c, n, m, mask, cu_seqlens, keep):
    B, T, H, _, D = gates.shape
    residuals = [h.new_empty(B, T, H, 4, D) if keep else h.new_empty(0) for _ in range(2)]
    return gates.new_empty(B, T, H, D), *map(torch.empty_like, (h, c, n, m)), *residuals


@torch.library.custom_op("modeling_xlstm::slstm_scan_backward", mutates_args=())
def _slstm_scan_backward(
    dy: Tensor, dh: Tensor, dc: Tensor, dn: Tensor, dm: Tensor,
    pre: Tensor, after: Tensor, c_last: Tensor, n_last: Tensor,
    R: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Exact gradients of `slstm_scan`: of gates, R and the initial state. h does not depend on the stabiliser, so m
    carries a gradient only from a loss on the final state, to the gate that set it."""
    dtype = h.dtype
    rows = _Rows(pre, mask, cu_seqlens)
    dy, pre, after = (rows.split(x, dtype) for x in (dy, pre, after))
    T, H, B, _, D = pre.shape
    dh, dc, dn, dm, h, c, n, m, c_last, n_last = _states(dh, dc, dn, dm, h, c, n, m, c_last, n_last)
    weight = R.to(dtype).flatten(1, 2)  # [H, 4 D_out, D_in]

    # 1. what a step multiplies incoming gradients with, for all steps at once
    i, f, z, o = pre.unbind(-2)
    states = torch.cat((torch.stack((h, c, n, m), 2)[None], after))
    h_before, c_before, n_before, m_before = states[:-1].unbind(-2)
    _, c_after, n_after, m_after = after.unbind(-2)
    real = torch.ones((), dtype=torch.bool, device=h.device) if rows.real is None else rows.real
    logf = F.logsigmoid(f) + m_before
    decay = torch.where(real, torch.exp((logf - m_after).clamp(max=MAX_LOG_WEIGHT)), 1.0)
    enter = torch.where(real, torch.exp(i - m_after), 0.0)
    z, o = torch.tanh(z), torch.sigmoid(o)
    safe_n = torch.where(n_after == 0, 1.0, n_after)
    df = decay * torch.where(real, torch.sigmoid(-f), 0.0)
    from_c = torch.stack((enter * z, df * c_before, enter * (1 - z * z)), -2)  # into i, f, z
    from_n = torch.stack((enter, df * n_before), -2)  # into i, f
    h_to_c = torch.where(real, o / safe_n, 0.0)
    ratio = torch.where(real, c_after / safe_n, 0.0)
    h_to_n = -h_to_c * ratio
    h_to_o = o * (1 - o) * ratio

    # 2. the final stabiliser came from the last input gate that was larger, plus the forget gates since
    set_by_state = (logf >= i) & (n_before != 0) | ~real
    dm = dm - dc * c_last - dn * n_last
    since = torch.cat((set_by_state[1:], torch.ones_like(set_by_state[:1]))).flip(0).cumprod(0, dtype=dtype).flip(0)
    d_stabiliser = since * dm
    d_pre = torch.zeros_like(pre)
    d_pre[..., 0, :] = torch.where(set_by_state, 0.0, d_stabiliser)
    d_pre[..., 1, :] = torch.where(set_by_state & real, d_stabiliser * torch.sigmoid(-f), 0.0)
    dm = torch.where(set_by_state[0], d_stabiliser[0], 0.0)

    # 3. from the last step to the first
    for t in reversed(range(T)):
        dh += dy[t]
        dc = torch.addcmul(dc, dh, h_to_c[t])
        dn = torch.addcmul(dn, dh, h_to_n[t])
        d = d_pre[t]
        d[:, :, :3].addcmul_(from_c[t], dc[:, :, None])
        d[:, :, :2].addcmul_(from_n[t], dn[:, :, None])
        torch.mul(h_to_o[t], dh, out=d[:, :, 3])
        held = None if rows.real is None else dh.masked_fill_(rows.real[t], 0.0)
        dh = torch.bmm(d.view(H, B, 4 * D), weight)
        if held is not None:
            dh += held
        dc, dn = dc * decay[t], dn * decay[t]
    dm += dc * c + dn * n

    # 4. the recurrent weights as one product over all steps
    dR = torch.einsum("thbx,thbi->hxi", d_pre.flatten(-2), h_before).view(R.shape)
    return rows.merge(d_pre, dtype), dR.to(R.dtype), *_states(dh, dc, dn, dm)


@_slstm_scan_backward.register_fake
def _(dy, dh, dc, dn, dm, pre, after, c_last, n_last, R, h, c, n, m, mask, cu_seqlens):
    return torch.empty_like(pre), torch.empty_like(R), *map(torch.empty_like, (h, c, n, m))


def _setup_context(ctx, inputs, output):
    _, R, h, c, n, m, mask, cu_seqlens, keep = inputs
    if not keep:
        raise RuntimeError("slstm_scan must keep its activations to be differentiated, got keep=False.")
    y, _, c_last, n_last, _, pre, after = output
    ctx.dtype = y.dtype
    ctx.save_for_backward(pre, after, c_last, n_last, R, h, c, n, m, mask, cu_seqlens)


def _backward(ctx, dy, dh, dc, dn, dm, _d_pre, _d_after):
    d_gates, *grads = _slstm_scan_backward(dy, dh, dc, dn, dm, *ctx.saved_tensors)
    return d_gates.to(ctx.dtype), *grads, None, None, None


slstm_scan.register_autograd(_backward, setup_context=_setup_context)
