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


# exp(-m), the least denominator, is not let grow further: h is zero there, and infinity would have no gradient.
MAX_LOG_FLOOR = 80.0


class MLSTMState(NamedTuple):
    """Recurrent state of an mLSTM cell, float32 (float64 for float64 inputs). A new sequence starts from zeros."""

    C: Tensor  # [B, H, K, V]
    n: Tensor  # [B, H, K]
    m: Tensor  # [B, H]


def mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, state: MLSTMState, input_gate: str, eps: float
) -> tuple[Tensor, MLSTMState]:
    """One time step: q, k `[B, H, K]`, v `[B, H, V]`, gates `[B, H]`. The definition of the mLSTM."""
    C, n, m = state
    dtype = C.dtype
    q, k, v, igate, fgate = (x.to(dtype) for x in (q, k, v, igate, fgate))
    q = q * q.shape[-1] ** -0.5
    logf = F.logsigmoid(fgate)
    if input_gate == "exp":
        m_new = torch.maximum(logf + m, igate)
    else:
        igate, m_new = F.logsigmoid(igate), torch.zeros_like(m)
        m = m_new
    f = torch.exp(logf + m - m_new)
    i = torch.exp(igate - m_new)
    k = i[..., None] * k
    C = torch.addcmul(f[..., None, None] * C, k[..., :, None], v[..., None, :])
    n = f[..., None] * n + k
    numerator = (q[..., None, :] @ C).squeeze(-2)
    denominator = torch.maximum((q * n).sum(-1).abs(), _floor(m_new)) + eps
    return numerator / denominator[..., None], MLSTMState(C, n, m_new)


def _floor(m: Tensor) -> Tensor:
    return torch.exp((-m).clamp(max=MAX_LOG_FLOOR))


def mlstm_recurrent(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, state: MLSTMState, input_gate: str, eps: float
) -> tuple[Tensor, MLSTMState]:
    """A loop of steps over `[B, T, H, ...]`: what `mlstm_chunkwise` is tested against."""
    h = []
    for t in range(q.shape[1]):
        h_t, state = mlstm_step(q[:, t], k[:, t], v[:, t], igate[:, t], fgate[:, t], state, input_gate, eps)
        h.append(h_t)
    return torch.stack(h, 1), state


def hold_padding(igate: Tensor, fgate: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gates that leave the state as it was where `mask` `[B, T]` or `[B]` is False: nothing enters or is forgotten."""
    if mask is None:
        return igate, fgate
    padding = ~mask[..., None]
    return igate.masked_fill(padding, -math.inf), fgate.masked_fill(padding, math.inf)


class _Chunks:
    """Splits `[B, T, H, ...]` into chunks `[B, H, N, L, ...]`, each sequence starting a chunk of its own, and back.

    `segments` lists (first chunk, end chunk, batch row of the chunks, rows of the state) of each run of chunks to scan.
    """

    def __init__(self, x: Tensor, chunk_size: int, cu_seqlens: Tensor | None):
        B, self.T = x.shape[:2]
        self.L = min(chunk_size, self.T)
        if cu_seqlens is None:
            self.N = -(-self.T // self.L)
            self.slots = None
            self.segments = [(0, self.N, slice(None))]
            return
        bounds = cu_seqlens.tolist()
        slots, self.N, self.segments = [], 0, []
        for s, (start, end) in enumerate(pairwise(bounds)):
            chunks = max(1, -(-(end - start) // self.L))
            slots.append(torch.arange(end - start) + self.N * self.L)
            self.segments.append((self.N, self.N + chunks, slice(s, s + 1)))
            self.N += chunks
        self.slots = torch.cat(slots).to(x.device)

    def split(self, x: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """`[B, T, H, ...]` to a contiguous `[B, H, N, L, ...]` of `dtype`, with `fill` where there is no token."""
        if self.slots is not None:
            y = x.new_full((1, self.N * self.L, *x.shape[2:]), fill)
            y[:, self.slots] = x
            x = y
        elif self.N * self.L != self.T:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, self.N * self.L - self.T), value=fill)
        return x.unflatten(1, (self.N, self.L)).movedim(3, 1).to(dtype).contiguous()

    def merge(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `split`."""
        x = x.movedim(1, 3).flatten(1, 2)
        x = x[:, : self.T] if self.slots is None else x[:, self.slots]
        return x.to(dtype).contiguous()


class _Weights(NamedTuple):
    """What every token of a chunk weighs in every later row, and what the state before the chunk weighs."""

    W: Tensor  # [B, H, N, L, L] exp(D - m), zero above the diagonal; the last row weighs tokens in the next state
    g: Tensor  # [B, H, N, L] the weight of the state before the chunk in each row; the last also in the next state
    m: Tensor  # [B, H, N, L] stabiliser of each row
    from_state: Tensor  # [B, H, N, L] True where m comes through the state before the chunk
    source: Tensor  # [B, H, N, L] else the token that it comes from


def _weights(logi: Tensor, logf: Tensor, m: Tensor, chunks: _Chunks, input_gate: str) -> tuple[_Weights, Tensor]:
    """Weights of all chunks from log gates `[B, H, N, L]` and the initial `m`; also the final `m`."""
    L = chunks.L
    causal = torch.ones(L, L, dtype=torch.bool, device=logf.device).tril()
    # Sums over segments rather than differences of one cumulative sum: exact for any gate, -inf included.
    D = logf[..., None].expand(*logf.shape, L).masked_fill(~causal.tril(-1), 0.0).cumsum(-2)
    D = (D + logi[..., None, :]).masked_fill_(~causal, -math.inf)
    b = logf.cumsum(-1)
    if input_gate == "sigmoid":
        zero = torch.zeros_like(b)
        return _Weights(D.exp_(), b.exp(), zero, zero > 1, zero.long()), torch.zeros_like(m)
    row_max, source = D.max(-1)
    before = torch.empty_like(b[..., 0])
    m_last = torch.empty_like(m)
    for first, end, rows in chunks.segments:
        m_next = m[rows]
        for n in range(first, end):
            before[:, :, n] = m_next
            m_next = torch.maximum(b[:, :, n, -1] + m_next, row_max[:, :, n, -1])
        m_last[rows] = m_next
    through_state = b + before[..., None]
    m_rows = torch.maximum(through_state, row_max)
    W = D.sub_(m_rows[..., None]).exp_()
    return _Weights(W, (through_state - m_rows).exp_(), m_rows, through_state >= row_max, source), m_last


def _scan(decay: Tensor, update: Tensor, initial: Tensor, chunks: _Chunks) -> tuple[Tensor, Tensor]:
    """`x[n + 1] = decay[n] x[n] + update[n]` within each segment: all `x[n]` before each chunk, and the last ones."""
    before, last = torch.empty_like(update), torch.empty_like(initial)
    for first, end, rows in chunks.segments:
        x = initial[rows]
        for n in range(first, end):
            before[:, :, n] = x
            x = torch.addcmul(update[:, :, n], decay[:, :, n], x)
        last[rows] = x
    return before, last


def _scan_back(decay: Tensor, update: Tensor, final: Tensor, chunks: _Chunks) -> tuple[Tensor, Tensor]:
    """The adjoint of `_scan`: gradients of the state after each chunk, and of the initial ones."""
    after, first_grad = torch.empty_like(update), torch.empty_like(final)
    for first, end, rows in chunks.segments:
        x = final[rows]
        for n in reversed(range(first, end)):
            after[:, :, n] = x
            x = torch.addcmul(update[:, :, n], decay[:, :, n], x)
        first_grad[rows] = x
    return after, first_grad


class _Chunked(NamedTuple):
    """Inputs split into chunks, in the dtype of the state."""

    q: Tensor  # [B, H, N, L, K], scaled
    k: Tensor  # [B, H, N, L, K]
    v: Tensor  # [B, H, N, L, V]
    logi: Tensor  # [B, H, N, L]
    logf: Tensor  # [B, H, N, L]


def _split(q, k, v, igate, fgate, chunks: _Chunks, dtype: torch.dtype, input_gate: str) -> _Chunked:
    logi = chunks.split(igate, dtype, fill=-math.inf)
    if input_gate == "sigmoid":
        logi = F.logsigmoid(logi)
    logf = F.logsigmoid(chunks.split(fgate, dtype, fill=math.inf))
    q = chunks.split(q, dtype) * q.shape[-1] ** -0.5
    return _Chunked(q, chunks.split(k, dtype), chunks.split(v, dtype), logi, logf)


@torch.library.custom_op("modeling_xlstm::mlstm_chunkwise", mutates_args=())
def mlstm_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, C: Tensor, n: Tensor, m: Tensor,
    cu_seqlens: Tensor | None, input_gate: str, chunk_size: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h `[B, T, H, V]` in the dtype of v, and the final C, n, m. One op to `torch.compile` and `torch.export`."""
    chunks = _Chunks(q, chunk_size, cu_seqlens)
    x = _split(q, k, v, igate, fgate, chunks, C.dtype, input_gate)
    w, m_last = _weights(x.logi, x.logf, m, chunks, input_gate)
    # 1. the state before each chunk, from the weighted keys of the chunks before it
    k_next = x.k * w.W[..., -1, :, None]
    decay = w.g[..., -1]
    C_before, C_last = _scan(decay[..., None, None], k_next.mT @ x.v, C, chunks)
    n_before, n_last = _scan(decay[..., None], k_next.sum(-2), n, chunks)
    # 2. each row: earlier tokens of its own chunk, and the state
    S = (x.q @ x.k.mT).mul_(w.W)
    q_state = x.q * w.g[..., None]
    numerator = (S @ x.v).add_(q_state @ C_before)
    normaliser = S.sum(-1) + (q_state @ n_before[..., None]).squeeze(-1)
    denominator = torch.maximum(normaliser.abs(), _floor(w.m)) + eps
    h = numerator.div_(denominator[..., None])
    return chunks.merge(h, v.dtype), C_last, n_last, m_last


@mlstm_chunkwise.register_fake
def _(q, k, v, igate, fgate, C, n, m, cu_seqlens, input_gate, chunk_size, eps):
    return torch.empty_like(v, memory_format=torch.contiguous_format), *map(torch.empty_like, (C, n, m))


@torch.library.custom_op("modeling_xlstm::mlstm_chunkwise_backward", mutates_args=())
def _mlstm_chunkwise_backward(
    dh: Tensor, dC: Tensor, dn: Tensor, dm: Tensor,
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, C: Tensor, n: Tensor, m: Tensor,
    cu_seqlens: Tensor | None, input_gate: str, chunk_size: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Exact gradients of `mlstm_chunkwise`: of q, k, v, both gates and the initial state.

    The stabiliser cancels out of h but for eps, and every sum below is over the unstabilised recurrence plus what eps
    sends through m. `u` is minus the gradient of a row's denominator.
    """
    dtype = C.dtype
    chunks = _Chunks(q, chunk_size, cu_seqlens)
    x = _split(q, k, v, igate, fgate, chunks, dtype, input_gate)
    w, _ = _weights(x.logi, x.logf, m, chunks, input_gate)
    w_next, decay = w.W[..., -1, :, None], w.g[..., -1]
    k_next = x.k * w_next
    C_before, C_last = _scan(decay[..., None, None], k_next.mT @ x.v, C, chunks)
    n_before, n_last = _scan(decay[..., None], k_next.sum(-2), n, chunks)
    P = x.q @ x.k.mT
    S = P * w.W
    q_state = x.q * w.g[..., None]
    normaliser = S.sum(-1) + (q_state @ n_before[..., None]).squeeze(-1)
    floor = _floor(w.m)
    denominator = torch.maximum(normaliser.abs(), floor) + eps

    # 1. through h = numerator / denominator to the weights of tokens and states
    d_numerator = chunks.split(dh, dtype) / denominator[..., None]
    dS = d_numerator @ x.v.mT
    dq_state = d_numerator @ C_before.mT
    u = ((S * dS).sum(-1) + (q_state * dq_state).sum(-1)) / denominator
    d_normaliser = torch.where(normaliser.abs() >= floor, -u * normaliser.sign(), 0.0)
    dS.add_(d_normaliser[..., None])
    dq_state.addcmul_(d_normaliser[..., None], n_before[..., None, :])

    # 2. through the states
    dC_after, dC_first = _scan_back(decay[..., None, None], q_state.mT @ d_numerator, dC, chunks)
    dn_after, dn_first = _scan_back(decay[..., None], (q_state * d_normaliser[..., None]).sum(-2), dn, chunks)
    dk_next = (x.v @ dC_after.mT).add_(dn_after[..., None, :])

    # 3. q, k, v
    dv = (S.mT @ d_numerator).add_(k_next @ dC_after)
    dP = dS.mul_(w.W)
    dq = (dP @ x.k).addcmul_(w.g[..., None], dq_state).mul_(q.shape[-1] ** -0.5)
    dk = (dP.mT @ x.q).addcmul_(w_next, dk_next)

    # 4. gates: every weight is the exponential of a sum of log gates
    dD = dP.mul_(P)
    dD[..., -1, :] += (k_next * dk_next).sum(-1)
    d_state = (q_state * dq_state).sum(-1)
    d_state[..., -1] += decay * ((dC_after * C_before).sum((-1, -2)) + (dn_after * n_before).sum(-1))
    if input_gate == "exp":
        dm = dm - (dC * C_last).sum((-1, -2)) - (dn * n_last).sum(-1)
        dm_first = _stabiliser_backward(dD, d_state, -eps * u, dm, w, chunks)
        dm_first += (dC_first * C).sum((-1, -2)) + (dn_first * n).sum(-1)
    else:
        dm_first = torch.zeros_like(m)
    dlogi = dD.sum(-2)
    # a forget gate weighs on all earlier tokens in all rows from its own on
    dlogf = _reverse_cumsum(dD, -2).tril_(-1).sum(-1) + _reverse_cumsum(d_state, -1)
    if input_gate == "sigmoid":
        dlogi *= torch.sigmoid(-chunks.split(igate, dtype))
    dlogf *= torch.sigmoid(-chunks.split(fgate, dtype, fill=math.inf))
    inputs = (q, k, v, igate, fgate)
    grads = (chunks.merge(d, like.dtype) for d, like in zip((dq, dk, dv, dlogi, dlogf), inputs, strict=True))
    dq, dk, dv, dlogi, dlogf = grads
    return dq, dk, dv, dlogi, dlogf, dC_first, dn_first, dm_first


def _stabiliser_backward(
    dD: Tensor, d_state: Tensor, dm_rows: Tensor, dm: Tensor, w: _Weights, chunks: _Chunks
) -> Tensor:
    """Adds gradients of the rows' m (and of the final one, `dm`) to where each m came from; returns the initial one."""
    dm_first = torch.empty_like(dm)
    for first, end, rows in chunks.segments:
        carry = dm[rows]
        for n in reversed(range(first, end)):
            dm_rows[:, :, n, -1] += carry
            carry = (dm_rows[:, :, n] * w.from_state[:, :, n]).sum(-1)
        dm_first[rows] = carry
    d_state += dm_rows * w.from_state
    dD.scatter_add_(-1, w.source[..., None], (dm_rows * ~w.from_state)[..., None])
    return dm_first


def _reverse_cumsum(x: Tensor, dim: int) -> Tensor:
    return x.flip(dim).cumsum(dim).flip(dim)


@_mlstm_chunkwise_backward.register_fake
def _(dh, dC, dn, dm, q, k, v, igate, fgate, C, n, m, cu_seqlens, input_gate, chunk_size, eps):
    contiguous = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, igate, fgate))
    return *contiguous, *map(torch.empty_like, (C, n, m))


def _setup_context(ctx, inputs, output):
    tensors, (ctx.input_gate, ctx.chunk_size, ctx.eps) = inputs[:9], inputs[9:]
    ctx.save_for_backward(*tensors)


def _backward(ctx, dh, dC, dn, dm):
    with full_precision(dh.device):
        grads = _mlstm_chunkwise_backward(dh, dC, dn, dm, *ctx.saved_tensors, ctx.input_gate, ctx.chunk_size, ctx.eps)
    return *grads, None, None, None, None


mlstm_chunkwise.register_autograd(_backward, setup_context=_setup_context)
