"""mLSTM cell in PyTorch: step (the definition), recurrent (a loop of steps), chunkwise (the same, in parallel).

Paper: https://arxiv.org/abs/2405.04517, equations 19 to 27, stabilised as in its appendix A.3.

| code | meaning | paper |
|---|---|---|
| `C n m` | matrix memory, normaliser, stabiliser; `C` and `n` hold their values times `exp(-m)` | C_t n_t m_t |
| `igate fgate` | gate pre-activations | ĩ_t f̃_t |
| `logf` | log of the forget gate, `logsigmoid(fgate)` | log f_t |
| `h` | output before the output gate | h̃_t |

Dims: `B` batch `T` time `H` heads `K` query and key dim `V` value dim `N` chunks `L` chunk length. All arithmetic is in
float32, or float64 if the inputs are. The backward pass recomputes what the forward pass had: only inputs are kept.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import full_precision
from .custom_op import op


# exp(-m), the least denominator, is not let grow further: h is zero there, and infinity would have no gradient. Nor
# shrink: a query of zeros, such as that of padding, would be divided by zero where there is no eps.
MAX_LOG_FLOOR = 80.0


class MLSTMState(NamedTuple):
    """Recurrent state of an mLSTM cell, float32 (float64 for float64 inputs). A new sequence starts from zeros."""

    C: Tensor  # [B, H, K, V]
    n: Tensor  # [B, H, K]
    m: Tensor  # [B, H]


def mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, state: MLSTMState, input_gate: str, eps: float,
    in_place: bool = False,
) -> tuple[Tensor, MLSTMState]:  # fmt: skip
    """One time step: q, k `[B, H, K]`, v `[B, H, V]`, gates `[B, H]`. The definition of the mLSTM.

    With `in_place` the state is overwritten, which autograd must not see.
    """
    C, n, m = state
    dtype = C.dtype
    q, k, v, igate, fgate = (x.to(dtype) for x in (q, k, v, igate, fgate))
    q = q * q.shape[-1] ** -0.5
    past = F.logsigmoid(fgate)
    if input_gate == "exp":
        past = past + m
        m_new = _or_empty(torch.maximum(past, igate))
    else:
        igate, m_new = F.logsigmoid(igate), torch.zeros_like(m)
    f = torch.exp(past - m_new).unsqueeze(-1)
    k = torch.exp(igate - m_new).unsqueeze(-1) * k
    C_out, n_out = (C, n) if in_place else (None, None)
    C = torch.mul(f.unsqueeze(-1), C, out=C_out)
    C = torch.addcmul(C, k.unsqueeze(-1), v.unsqueeze(-2), out=C_out)
    n = torch.addcmul(k, f, n, out=n_out)
    numerator = torch.bmm(q.flatten(0, 1).unsqueeze(1), C.flatten(0, 1)).view(v.shape)
    denominator = torch.maximum(torch.linalg.vecdot(q, n).abs(), _floor(m_new)) + eps
    m = m.copy_(m_new) if in_place else m_new
    return numerator / denominator.unsqueeze(-1), MLSTMState(C, n, m)


def _or_empty(m: Tensor) -> Tensor:
    """A stabiliser that is 0 where it would be minus infinity: nothing is left, and nothing enters."""
    return torch.nan_to_num(m, nan=math.nan, posinf=math.inf, neginf=0.0)


def _floor(m: Tensor) -> Tensor:
    return torch.exp((-m).clamp(-MAX_LOG_FLOOR, MAX_LOG_FLOOR))


def mlstm_recurrent(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, state: MLSTMState, input_gate: str, eps: float
) -> tuple[Tensor, MLSTMState]:
    """A loop of steps over `[B, T, H, ...]`: what `mlstm_chunkwise` is tested against."""
    h = []
    for t in range(q.shape[1]):
        h_t, state = mlstm_step(q[:, t], k[:, t], v[:, t], igate[:, t], fgate[:, t], state, input_gate, eps)
        h.append(h_t)
    return torch.stack(h, 1), state


def hold_padding(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs that leave the state as it was where `mask` `[B, T]` or `[B]` is False, whatever they were there: nothing
    enters or is forgotten."""
    if mask is None:
        return q, k, v, igate, fgate
    padding = ~mask[..., None]
    q, k, v = (x.masked_fill(padding[..., None], 0.0) for x in (q, k, v))
    return q, k, v, igate.masked_fill(padding, -math.inf), fgate.masked_fill(padding, math.inf)


def clear_closed(k: Tensor, igate: Tensor, fgate: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and input gates that leave an empty state where both gates are minus infinity: a key of zero, let in."""
    closed = torch.isneginf(igate) & torch.isneginf(fgate)
    return k.masked_fill(closed[..., None], 0.0), igate.masked_fill(closed, 0.0)


class _Chunks:
    """Splits `[B, T, H, ...]` into chunks `[N, B, H, L, ...]`, each sequence starting a chunk of its own, and back.

    `segments` lists (first chunk, end chunk, rows of the state) of each run of chunks that hand on a state.
    """

    def __init__(self, x: Tensor, chunk_size: int, cu_seqlens: Tensor | None):
        self.T = x.shape[1]
        self.L = min(chunk_size, self.T)
        if cu_seqlens is None:
            self.N = -(-self.T // self.L)
            self.slots = None
            self.segments = [(0, self.N, slice(None))]
            return
        slots, self.N, self.segments = [], 0, []
        for s, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            chunks = -(-(end - start) // self.L)
            slots.append(torch.arange(end - start) + self.N * self.L)
            self.segments.append((self.N, self.N + chunks, slice(s, s + 1)))
            self.N += chunks
        self.slots = torch.cat(slots).to(x.device)

    def split(self, x: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """`[B, T, H, ...]` to a contiguous `[N, B, H, L, ...]` of `dtype`, with `fill` where there is no token."""
        if self.slots is not None:
            y = x.new_full((1, self.N * self.L, *x.shape[2:]), fill)
            y[:, self.slots] = x
            x = y
        elif self.N * self.L != self.T:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, self.N * self.L - self.T), value=fill)
        return x.unflatten(1, (self.N, self.L)).movedim(0, 1).transpose(2, 3).to(dtype).contiguous()

    def merge(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `split`."""
        x = x.transpose(2, 3).movedim(1, 0).flatten(1, 2)
        x = x[:, : self.T] if self.slots is None else x[:, self.slots]
        return x.to(dtype).contiguous()


class _Weights(NamedTuple):
    """What every token of a chunk weighs in every later row, and what the state before the chunk weighs."""

    W: Tensor  # [N, B, H, L, L] exp(D - m), zero above the diagonal; the last row weighs tokens in the next state
    g: Tensor  # [N, B, H, L] the weight of the state before the chunk in each row; the last also in the next state
    m: Tensor  # [N, B, H, L] stabiliser of each row
    from_state: Tensor | None  # [N, B, H, L] True where m comes through the state before the chunk; None if m stays 0
    source: Tensor | None  # [N, B, H, L] else the token that it comes from


def _weights(logi: Tensor, logf: Tensor, m: Tensor, chunks: _Chunks, input_gate: str) -> tuple[_Weights, Tensor]:
    """Weights of all chunks from log gates `[N, B, H, L]` and the initial `m`; also the final `m`."""
    L = chunks.L
    causal = torch.ones(L, L, dtype=torch.bool, device=logf.device).tril()
    # Sums over segments rather than differences of one cumulative sum: exact for any gate.
    D = logf[..., None].masked_fill(~causal.tril(-1), 0.0).cumsum(-2)
    D = (D + logi[..., None, :]).masked_fill_(~causal, -math.inf)
    b = logf.cumsum(-1)
    if input_gate == "sigmoid":
        zero = torch.zeros_like(b)
        return _Weights(D.exp_(), b.exp(), zero, None, None), m.new_zeros(m.shape)
    row_max, source = D.max(-1)
    b_last, max_last, before = b[..., -1].unbind(), row_max[..., -1].unbind(), []
    m_last = m.new_empty(m.shape)
    for first, end, rows in chunks.segments:
        m_next = m[rows]
        for i in range(first, end):
            before.append(m_next)
            m_next = _or_empty(torch.maximum(b_last[i] + m_next, max_last[i]))
        m_last[rows] = m_next
    through_state = b + torch.stack(before)[..., None]
    m_rows = _or_empty(torch.maximum(through_state, row_max))
    W = D.sub_(m_rows[..., None]).exp_()
    return _Weights(W, (through_state - m_rows).exp_(), m_rows, through_state >= row_max, source), m_last


class _Chunked:
    """What the forward and the backward pass both need: inputs in chunks, their weights, and the rows' denominators."""

    def __init__(self, q, k, v, igate, fgate, n, m, chunks: _Chunks, input_gate: str, eps: float):
        dtype = m.dtype
        logi = chunks.split(igate, dtype, fill=-math.inf)
        logf = F.logsigmoid(chunks.split(fgate, dtype, fill=math.inf))
        logi = F.logsigmoid(logi) if input_gate == "sigmoid" else logi
        self.w, self.m_last = _weights(logi, logf, m, chunks, input_gate)
        self.q = chunks.split(q, dtype) * q.shape[-1] ** -0.5
        self.k, self.v = chunks.split(k, dtype), chunks.split(v, dtype)
        # through the state to the next chunk, and from the state to the rows
        self.decay = self.w.g[..., -1]
        self.k_next = self.k * self.w.W[..., -1, :, None]
        self.q_state = self.q * self.w.g[..., None]
        n_before, self.n_last = [], n.clone(memory_format=torch.contiguous_format)
        entering, decay = self.k_next.sum(-2).unbind(), self.decay[..., None].unbind()
        for first, end, rows in chunks.segments:
            x = n[rows]
            for i in range(first, end):
                n_before.append(x)
                x = torch.addcmul(entering[i], decay[i], x)
            self.n_last[rows] = x
        self.n_before = torch.stack(n_before)
        # from tokens of the chunk to its rows
        self.P = self.q @ self.k.mT
        self.S = self.P * self.w.W
        self.normaliser = self.S.sum(-1) + (self.q_state @ self.n_before[..., None]).squeeze(-1)
        self.floor = _floor(self.w.m)
        self.denominator = torch.maximum(self.normaliser.abs(), self.floor) + eps


@op("mlstm_chunkwise")
def mlstm_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, C: Tensor, n: Tensor, m: Tensor,
    cu_seqlens: Tensor | None, input_gate: str, chunk_size: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h `[B, T, H, V]` in the dtype of v, and the final C, n, m. One op to `torch.compile` and `torch.export`."""
    chunks = _Chunks(q, chunk_size, cu_seqlens)
    x = _Chunked(q, k, v, igate, fgate, n, m, chunks, input_gate, eps)
    # each row: earlier tokens of its own chunk, and the state before the chunk
    numerator = x.S @ x.v
    C = C.clone(memory_format=torch.contiguous_format)
    numerators, q_states, vs, k_nexts = map(_matrices, (numerator, x.q_state, x.v, x.k_next))
    decays = _matrices(x.decay[..., None, None])
    for first, end, rows in chunks.segments:
        state = C[rows].view(-1, *C.shape[2:])
        for i in range(first, end):
            numerators[i].baddbmm_(q_states[i], state)
            _advance_(state, decays[i], k_nexts[i].mT, vs[i])
    h = numerator.div_(x.denominator[..., None])
    return chunks.merge(h, v.dtype), C, x.n_last, x.m_last


def _advance_(state: Tensor, decay: Tensor, x: Tensor, y: Tensor) -> None:
    """The state becomes `decay * state + x @ y`. The product is summed by itself: terms that a large state would not
    notice one by one are not lost."""
    torch.addcmul(torch.bmm(x, y), decay, state, out=state)


def _matrices(x: Tensor) -> tuple[Tensor, ...]:
    """`[N, B, H, ...]` as N batches of B H matrices, of the same memory."""
    return x.view(x.shape[0], -1, *x.shape[3:]).unbind()


@mlstm_chunkwise.register_fake
def _(q, k, v, igate, fgate, C, n, m, cu_seqlens, input_gate, chunk_size, eps):
    return tuple(x.new_empty(x.shape) for x in (v, C, n, m))


@op("mlstm_chunkwise_backward")
def _mlstm_chunkwise_backward(
    dh: Tensor, dC: Tensor, dn: Tensor, dm: Tensor,
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, C: Tensor, n: Tensor, m: Tensor,
    cu_seqlens: Tensor | None, input_gate: str, chunk_size: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Exact gradients of `mlstm_chunkwise`: of q, k, v, both gates and the initial state.

    The stabiliser cancels out of h but for what of a denominator does not follow it: eps, or all of it at a bound of
    the floor. Every sum below is over the unstabilised recurrence plus what that sends through m. `u` is minus the
    gradient of a row's denominator.
    """
    dtype = C.dtype
    chunks = _Chunks(q, chunk_size, cu_seqlens)
    x = _Chunked(q, k, v, igate, fgate, n, m, chunks, input_gate, eps)
    w, decay, S, q_state = x.w, x.decay, x.S, x.q_state
    C_before, C_last = C.new_empty(*decay.shape, *C.shape[2:]), C.clone(memory_format=torch.contiguous_format)
    befores, vs, k_nexts, decays = map(_matrices, (C_before, x.v, x.k_next, decay[..., None, None]))
    for first, end, rows in chunks.segments:
        state = C_last[rows].view(-1, *C.shape[2:])
        for i in range(first, end):
            befores[i].copy_(state)
            _advance_(state, decays[i], k_nexts[i].mT, vs[i])

    # 1. through h = numerator / denominator to the weights of tokens and states
    d_numerator = chunks.split(dh, dtype) / x.denominator[..., None]
    dS = d_numerator @ x.v.mT
    dq_state = d_numerator @ C_before.mT
    u = ((S * dS).sum(-1) + (q_state * dq_state).sum(-1)) / x.denominator
    d_normaliser = torch.where(x.normaliser.abs() >= x.floor, -u * x.normaliser.sign(), 0.0)
    dS.add_(d_normaliser[..., None])
    dq_state.addcmul_(d_normaliser[..., None], x.n_before[..., None, :])

    # 2. through the states
    dv = S.mT @ d_numerator
    dk_next = torch.empty_like(x.k)
    d_decay = torch.empty_like(decay)
    dn_entering = (q_state * d_normaliser[..., None]).sum(-2)
    dC_first, dn_first = (x.clone(memory_format=torch.contiguous_format) for x in (dC, dn))
    dvs, dk_nexts, q_states, d_numerators = map(_matrices, (dv, dk_next, q_state, d_numerator))
    for first, end, rows in chunks.segments:
        dC_after, dn_after = dC_first[rows].view(-1, *C.shape[2:]), dn[rows]
        for i in reversed(range(first, end)):
            torch.bmm(vs[i], dC_after.mT, out=dk_nexts[i])
            dk_next[i] += dn_after[..., None, :]
            dvs[i].baddbmm_(k_nexts[i], dC_after)
            through_C = torch.linalg.vecdot(dC_after, befores[i]).sum(-1)
            d_decay[i] = through_C.view_as(d_decay[i]) + (dn_after * x.n_before[i]).sum(-1)
            _advance_(dC_after, decays[i], q_states[i].mT, d_numerators[i])
            dn_after = torch.addcmul(dn_entering[i], decay[i, ..., None], dn_after)
        dn_first[rows] = dn_after

    # 3. q, k, v
    dP = dS.mul_(w.W)
    dq = (dP @ x.k).addcmul_(w.g[..., None], dq_state).mul_(q.shape[-1] ** -0.5)
    dk = (dP.mT @ x.q).addcmul_(w.W[..., -1, :, None], dk_next)

    # 4. gates: every weight is the exponential of a sum of log gates
    dD = dP.mul_(x.P)
    dD[..., -1, :] += (x.k_next * dk_next).sum(-1)
    d_state = (q_state * dq_state).sum(-1)
    d_state[..., -1] += decay * d_decay
    if input_gate == "exp":
        dm = dm - (dC * C_last).sum((-1, -2)) - (dn * x.n_last).sum(-1)
        held = (x.normaliser.abs() < x.floor) & (w.m.abs() > MAX_LOG_FLOOR)
        dm_rows = -u * torch.where(held, x.denominator, eps)
        dm_first = _stabiliser_backward(dD, d_state, dm_rows, dm, w, chunks)
        dm_first += (dC_first * C).sum((-1, -2)) + (dn_first * n).sum(-1)
    else:
        dm_first = m.new_zeros(m.shape)
    dlogi = dD.sum(-2)
    # a forget gate weighs on all earlier tokens in all rows from its own on
    dlogf = _reverse_cumsum(dD, -2).tril_(-1).sum(-1) + _reverse_cumsum(d_state, -1)
    if input_gate == "sigmoid":
        dlogi *= torch.sigmoid(-chunks.split(igate, dtype))
    dlogf *= torch.sigmoid(-chunks.split(fgate, dtype))
    inputs = (q, k, v, igate, fgate)
    grads = (chunks.merge(d, like.dtype) for d, like in zip((dq, dk, dv, dlogi, dlogf), inputs, strict=True))
    dq, dk, dv, dlogi, dlogf = grads
    return dq, dk, dv, dlogi, dlogf, dC_first, dn_first, dm_first


def _stabiliser_backward(
    dD: Tensor, d_state: Tensor, dm_rows: Tensor, dm: Tensor, w: _Weights, chunks: _Chunks
) -> Tensor:
    """Adds gradients of the rows' m (and of the final one, `dm`) to where each m came from; returns the initial one."""
    dm_first = dm.new_empty(dm.shape)
    for first, end, rows in chunks.segments:
        carry = dm[rows]
        for n in reversed(range(first, end)):
            dm_rows[n, ..., -1] += carry
            carry = (dm_rows[n] * w.from_state[n]).sum(-1)
        dm_first[rows] = carry
    d_state += dm_rows * w.from_state
    dD.scatter_add_(-1, w.source[..., None], (dm_rows * ~w.from_state)[..., None])
    return dm_first


def _reverse_cumsum(x: Tensor, dim: int) -> Tensor:
    return x.flip(dim).cumsum(dim).flip(dim)


@_mlstm_chunkwise_backward.register_fake
def _(dh, dC, dn, dm, q, k, v, igate, fgate, C, n, m, cu_seqlens, input_gate, chunk_size, eps):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, igate, fgate, C, n, m))


def _setup_context(ctx, inputs, output):
    tensors, (ctx.input_gate, ctx.chunk_size, ctx.eps) = inputs[:9], inputs[9:]
    ctx.save_for_backward(*tensors)


def _backward(ctx, dh, dC, dn, dm):
    with full_precision(dh.device):
        grads = _mlstm_chunkwise_backward(dh, dC, dn, dm, *ctx.saved_tensors, ctx.input_gate, ctx.chunk_size, ctx.eps)
    return *grads, None, None, None, None


mlstm_chunkwise.register_autograd(_backward, _setup_context)
