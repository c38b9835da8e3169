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
backward pass precomputes what does not depend on the gradients of later steps for many steps at once.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import full_precision
from .custom_op import op


# Largest log weight of the state before the first step, where the stabiliser follows the input gate alone.
MAX_LOG_WEIGHT = 80.0
# Steps of the backward pass whose coefficients are computed together; they should stay in the cache.
BLOCK = 64


class SLSTMState(NamedTuple):
    """Recurrent state of an sLSTM cell, float32 (float64 for float64 inputs). A new sequence starts from zeros."""

    h: Tensor  # [B, H, D]
    c: Tensor  # [B, H, D]
    n: Tensor  # [B, H, D], zero only while empty
    m: Tensor  # [B, H, D]


def slstm_step(gates: Tensor, R: Tensor, state: SLSTMState) -> tuple[Tensor, SLSTMState]:
    """One time step: gates `[B, H, 4, D]`, R `[H, 4, D_out, D_in]`. The definition of the sLSTM."""
    h, c, n, m = state
    weight = R.to(h.dtype).flatten(1, 2)  # [H, 4 D_out, D_in]
    recurrent = torch.bmm(h.transpose(0, 1), weight.mT).transpose(0, 1).reshape(gates.shape)
    i, f, z, o = (gates.to(h.dtype) + recurrent).unbind(-2)
    logf = F.logsigmoid(f) + m
    # an empty state weighs nothing, and its m must not push the first input out of range
    m_new = torch.where(n == 0, i, torch.maximum(i, logf))
    f = torch.exp((logf - m_new).clamp(max=MAX_LOG_WEIGHT))
    i = torch.exp(i - m_new)
    c = torch.addcmul(i * torch.tanh(z), f, c)
    n = torch.addcmul(i, f, n)
    h = torch.sigmoid(o) * c / n
    return h, SLSTMState(h, c, n, m_new)


def hold_padding(new: SLSTMState, old: SLSTMState, mask: Tensor) -> SLSTMState:
    """The new state where `mask` `[B]` is True, else the old one."""
    real = mask[:, None, None]
    return SLSTMState(*(torch.where(real, a, b) for a, b in zip(new, old, strict=True)))


def slstm_recurrent(
    gates: Tensor, R: Tensor, state: SLSTMState, mask: Tensor | None = None
) -> tuple[Tensor, SLSTMState]:
    """A loop of steps over `[B, T, H, 4, D]`: what `slstm_scan` is tested against."""
    h = []
    for t in range(gates.shape[1]):
        _, new = slstm_step(gates[:, t], R, state)
        if mask is not None:
            new = hold_padding(new, state, mask[:, t])
        state = new
        h.append(state.h)
    return torch.stack(h, 1), state


class _Rows:
    """Moves `[B, T, H, ...]` to time-major rows `[T, H, B, ...]`, one row a sequence when packed, and back."""

    def __init__(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None):
        # elsewhere than on a CPU, looking would wait for the device
        self.mask = None if mask is None or (mask.device.type == "cpu" and mask.all()) else mask
        self.row = None
        if cu_seqlens is not None:
            bounds = cu_seqlens.to(x.device, torch.int64)
            lengths = bounds.diff()
            self.rows, self.T = lengths.numel(), int(lengths.max())
            self.row = torch.repeat_interleave(torch.arange(self.rows, device=x.device), lengths)
            self.time = torch.arange(self.row.numel(), device=x.device) - bounds[self.row]
            self.mask = torch.arange(self.T, device=x.device) < lengths[:, None]
        # [T, 1, B, 1] True at real positions, or None if all are
        self.real = None if self.mask is None else self.mask.t()[:, None, :, None]

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B, T, H, ...]` to `[T, H, B, ...]` in new memory of `dtype`, zero where there is no token."""
        x = x.transpose(0, 1).transpose(1, 2)
        return self.unpack(x).to(dtype, copy=True, memory_format=torch.contiguous_format)

    def merge(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `split`, also in new memory."""
        x = self.pack(x).transpose(1, 2).transpose(0, 1)
        return x.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def unpack(self, x: Tensor) -> Tensor:
        """Time-major packed tokens `[T, H, 1, ...]` to rows; x itself if it is not packed."""
        if self.row is None:
            return x
        y = x.new_zeros(self.T, x.shape[1], self.rows, *x.shape[3:])
        y[self.time, :, self.row] = x[:, :, 0]
        return y

    def pack(self, x: Tensor) -> Tensor:
        """The inverse of `unpack`."""
        return x if self.row is None else x[self.time, :, self.row].unsqueeze(2).contiguous()


def _states(*states: Tensor) -> list[Tensor]:
    """`[B, H, D]` to `[H, B, D]`, or back: always new memory, as outputs of a custom op must be."""
    return [x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in states]


@op("slstm_scan")
def slstm_scan(
    gates: Tensor, R: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor,
    mask: Tensor | None, cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h `[B, T, H, D]` in the dtype of gates; the final h, c, n, m; and, if `keep`, what the backward pass needs:
    the pre-activations, and h, c, n, m after each step, both `[T, H, B, 4, D]` in the dtype of the state."""
    dtype = h.dtype
    rows = _Rows(gates, mask, cu_seqlens)
    pre = rows.split(gates, dtype)
    T, H, B, _, D = pre.shape
    weight = R.to(dtype).flatten(1, 2).mT.contiguous()  # [H, D_in, 4 D_out]
    h, c, n, m = _states(h, c, n, m)
    after = torch.empty(T if keep else 2, 4, H, B, D, dtype=dtype, device=h.device)
    y = after[:, 0] if keep else torch.empty(T, H, B, D, dtype=dtype, device=h.device)
    weights = torch.empty(2, H, B, D, dtype=dtype, device=h.device)
    i, f = weights.unbind()  # what input and state weigh in the new state
    empty: Tensor | None = n == 0
    for t in range(T):
        pre[t].view(H, B, 4 * D).baddbmm_(h, weight)
        pre_i, pre_f, pre_z, pre_o = pre[t].unbind(2)
        old = h, c, n, m
        _, c, n, m = after[t % after.shape[0]].unbind()
        h = y[t]
        torch.add(F.logsigmoid(pre_f), old[3], out=f)
        torch.maximum(pre_i, f, out=m)
        if empty is not None:
            m.copy_(torch.where(empty, pre_i, m))
            f.clamp_(max=m + MAX_LOG_WEIGHT)
        torch.sub(pre_i, m, out=i)
        f.sub_(m)
        weights.exp_()
        torch.addcmul(torch.tanh(pre_z).mul_(i), f, old[1], out=c)
        torch.addcmul(i, f, old[2], out=n)
        torch.sigmoid(pre_o, out=h).mul_(c).div_(n)
        if rows.real is None:
            empty = None
        else:
            for x, x_old in zip((h, c, n, m), old, strict=True):
                torch.where(rows.real[t], x, x_old, out=x)
            empty = empty & ~rows.real[t]
    h, c, n, m = _states(h, c, n, m)
    kept = (rows.pack(pre), rows.pack(after.movedim(1, 3))) if keep else (h.new_empty(0), h.new_empty(0))
    return rows.merge(y, gates.dtype), h, c, n, m, *kept


@slstm_scan.register_fake
def _(gates, R, h, c, n, m, mask, cu_seqlens, keep):
    B, T, H, _, D = gates.shape
    if keep:
        pre = h.new_empty(T, H, B, 4, D)
        after = torch.empty_like(pre) if cu_seqlens is not None else h.new_empty(T, 4, H, B, D).movedim(1, 3)
    else:
        pre, after = h.new_empty(0), h.new_empty(0)
    return gates.new_empty(B, T, H, D), *(x.new_empty(x.shape) for x in (h, c, n, m)), pre, after


@op("slstm_scan_backward")
def _slstm_scan_backward(
    dy: Tensor | None, dh: Tensor | None, dc: Tensor | None, dn: Tensor | None, dm: Tensor | None,
    pre: Tensor, after: Tensor, c_last: Tensor, n_last: Tensor,
    R: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Exact gradients of `slstm_scan`: of gates, R and the initial state. h does not depend on the stabiliser, so m
    carries a gradient only from a loss on the final state, to the gate that set it."""
    dtype = h.dtype
    rows = _Rows(pre, mask, cu_seqlens)
    pre, after = rows.unpack(pre), rows.unpack(after)
    T, H, B, _, D = pre.shape
    weight = R.to(dtype).flatten(1, 2)  # [H, 4 D_out, D_in]
    state_loss = not (dc is None and dn is None and dm is None)
    dh, dc, dn, dm = _states(
        *(torch.zeros_like(x) if d is None else d for d, x in ((dh, h), (dc, c), (dn, n), (dm, m)))
    )
    h, c, n, m, c_last, n_last = _states(h, c, n, m, c_last, n_last)
    dy = h.new_zeros(()).expand(T, H, B, D) if dy is None else rows.split(dy, dtype)
    dm = dm - dc * c_last - dn * n_last
    first = torch.stack((h, c, n, m), 2)[None]
    d_pre, dR = torch.zeros_like(pre), torch.zeros_like(weight)

    for start in reversed(range(0, T, BLOCK)):
        steps = slice(start, min(T, start + BLOCK))
        real = None if rows.real is None else rows.real[steps]

        # 1. what a step multiplies incoming gradients with, for a block of steps at once
        before = torch.cat((after[start - 1 : start] if start else first, after[steps][:-1]))
        h_before, c_before, n_before, m_before = before.unbind(-2)
        _, c_after, n_after, m_after = after[steps].unbind(-2)
        i, f, z, o = pre[steps].unbind(-2)
        logf = F.logsigmoid(f) + m_before
        decay = torch.exp((logf - m_after).clamp(max=MAX_LOG_WEIGHT))
        enter = torch.exp(i - m_after)
        d_logf = torch.sigmoid(-f)
        z, o = torch.tanh(z), torch.sigmoid(o)
        h_to_c, ratio = o / n_after, c_after / n_after
        if real is not None:
            decay, enter = torch.where(real, decay, 1.0), torch.where(real, enter, 0.0)
            d_logf, h_to_c, ratio = (torch.where(real, x, 0.0) for x in (d_logf, h_to_c, ratio))
        df = decay * d_logf
        from_c = torch.stack((enter * z, df * c_before, enter * (1 - z * z)), -2)  # into i, f, z
        from_n = torch.stack((enter, df * n_before), -2)  # into i, f
        h_to_n, h_to_o = -h_to_c * ratio, o * (1 - o) * ratio

        # 2. the final stabiliser came from the last input gate that was larger, plus the forget gates since
        d = d_pre[steps]
        if state_loss:
            by_state = (logf >= i) & (n_before != 0)
            if real is not None:
                by_state |= ~real
            since = torch.cat((by_state[1:], torch.ones_like(by_state[:1]))).flip(0).cumprod(0, dtype=dtype).flip(0)
            d_m = since * dm
            d[..., 0, :] = torch.where(by_state, 0.0, d_m)
            d[..., 1, :] = torch.where(by_state, d_m * d_logf, 0.0)
            dm = torch.where(by_state[0], d_m[0], 0.0)

        # 3. from the last step to the first
        for t in reversed(range(d.shape[0])):
            dh += dy[start + t]
            dc = torch.addcmul(dc, dh, h_to_c[t])
            dn = torch.addcmul(dn, dh, h_to_n[t])
            d[t, :, :, :3].addcmul_(from_c[t], dc[:, :, None])
            d[t, :, :, :2].addcmul_(from_n[t], dn[:, :, None])
            torch.mul(h_to_o[t], dh, out=d[t, :, :, 3])
            held = None if real is None else dh.masked_fill_(real[t], 0.0)
            dh = torch.bmm(d[t].view(H, B, 4 * D), weight)
            if held is not None:
                dh += held
            dc, dn = dc * decay[t], dn * decay[t]

        # 4. the recurrent weights as one product over the block
        dR.baddbmm_(d.transpose(0, 1).reshape(H, -1, 4 * D).mT, h_before.transpose(0, 1).reshape(H, -1, D))

    dm += dc * c + dn * n
    dh, dc, dn, dm = _states(dh, dc, dn, dm)
    return rows.merge(d_pre, dtype), dR.to(R.dtype).view(R.shape), dh, dc, dn, dm


@_slstm_scan_backward.register_fake
def _(dy, dh, dc, dn, dm, pre, after, c_last, n_last, R, h, c, n, m, mask, cu_seqlens):
    T, H, B, _, D = pre.shape
    return pre.new_empty(B, T, H, 4, D), *(x.new_empty(x.shape) for x in (R, h, c, n, m))


def _setup_context(ctx, inputs, output):
    _, R, h, c, n, m, mask, cu_seqlens, ctx.keep = inputs
    y, _, c_last, n_last, _, pre, after = output
    ctx.dtype = y.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pre, after, c_last, n_last, R, h, c, n, m, mask, cu_seqlens)


def _backward(ctx, dy, dh, dc, dn, dm, _d_pre, _d_after):
    if not ctx.keep:
        raise RuntimeError("slstm_scan must keep its activations to be differentiated, got keep=False.")
    saved = ctx.saved_tensors  # may be read only once under checkpointing
    with full_precision(saved[0].device):
        d_gates, *grads = _slstm_scan_backward(dy, dh, dc, dn, dm, *saved)
    return d_gates.to(ctx.dtype), *grads, None, None, None


slstm_scan.register_autograd(_backward, _setup_context)
