"""mLSTM over whole sequences in Triton: what the kernels do together, their launchers, and the op with exact gradients.

A sequence is cut into chunks of `L` tokens. Within a chunk, tokens reach rows through a matrix of scores, as in
attention; across chunks through the state, of which only the values between chunks are ever in memory. Forward and
backward pass are mostly two kinds of products, each one kernel:

`mlstm_state_kernel`: states between chunks, in a run over the sequence, `C <- decay C + (w x)^T y`, and n with a factor
instead of y. Forward: C from k and v. Backward: dC from q and dh, in reverse.

`_combine`, a part of two kernels: `out = scale (x Z) + scores y` for a block of rows, what comes through the state and
from tokens of the chunk. Forward: h. Backward: dq, dk and dv, in one launch with the inner product of states and their
gradients, as all of these read the same.

Around them are kernels for gates, for the stabiliser between chunks, and for scores and sums over their rows. Scores,
and states between chunks, have the dtype of the inputs, but float32 for float16, whose range is short. The backward
pass takes the states between chunks from the forward pass and recomputes the scores.

Dims: `B` batch `T` time `H` heads `K` query and key dim `V` value dim `R` rows (tokens of all sequences) `N` chunks of
all sequences `L` chunk length `BS` tokens of a block of scores. Letters are those of `mlstm_torch`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import full_precision, rising
from .custom_op import op
from .mlstm_triton_kernels import (
    mlstm_bwd_combine_kernel,
    mlstm_bwd_gates_kernel,
    mlstm_bwd_rows_kernel,
    mlstm_bwd_scores_kernel,
    mlstm_bwd_stabiliser_kernel,
    mlstm_fwd_combine_kernel,
    mlstm_fwd_gates_kernel,
    mlstm_fwd_scores_kernel,
    mlstm_fwd_stabiliser_kernel,
    mlstm_state_kernel,
)
from .triton_language import blocks_of, power_of_2, processors, shared_memory


class _Blocks(NamedTuple):
    """How work is cut. Picked on an H100; float32 is for exactness: its products run without tensor cores."""

    L: int  # tokens of a chunk
    BS: int  # tokens of a block of scores
    state: tuple[int, int, int, int, int]  # tokens, keys, values of a block; warps and stages
    d_state: tuple[int, int, int, int, int]
    few_states: tuple[int, int, int, int, int]  # where few sequences would leave most of a GPU idle
    scores: tuple[int, int, int]  # keys or values at once; warps and stages
    d_scores: tuple[int, int, int, int | None]  # and registers at most, so that more programs fit
    combine: tuple[int, int, int, int, int, int]  # rows; columns of x and out, tokens at once; warps and stages
    d_combine: tuple[int, int, int, int, int, int]
    scores_bytes: int = 512 << 20  # in memory at once; each piece of the work has an end, where a GPU waits
    d_scores_bytes: int = 160 << 20


def _tile(size: int, most: int) -> int:
    """The size of a block that covers `size`, or `most`: a power of two, and what a product takes at least."""
    return max(16, min(most, power_of_2(size)))


def _blocks(q: Tensor, V: int) -> _Blocks:
    if q.dtype == torch.float32:
        state, combine = (32, 32, 32, 4, 1), (32, 32, 32, 32, 4, 1)
        return _Blocks(
            L=64, BS=32, state=state, d_state=state, few_states=state,
            scores=(32, 4, 1), d_scores=(32, 4, 1, None), combine=combine, d_combine=combine,
        )  # fmt: skip
    K = q.shape[-1]
    if shared_memory(q.device) < 200_000 or q.dtype != torch.bfloat16 or K % 128 or V % 256:
        state, combine = (64, 64, 128, 4, 2), (128, 64, 128, 64, 8, 2)
        return _Blocks(
            L=256, BS=64, state=state, d_state=state, few_states=state,
            scores=(64, 4, 3), d_scores=(64, 4, 3, None), combine=combine, d_combine=combine,
        )  # fmt: skip
    return _Blocks(
        L=256, BS=64, state=(64, 128, 256, 8, 3), d_state=(128, 128, 256, 8, 2), few_states=(64, 64, 128, 4, 3),
        scores=(64, 4, 4), d_scores=(64, 4, 4, 168), combine=(128, 64, 128, 64, 8, 3),
        d_combine=(128, 64, 256, 64, 8, 4), d_scores_bytes=(160 if K > 128 else 96) << 20,
    )  # fmt: skip


class _Chunks(NamedTuple):
    """Where chunks are: evenly cut sequences, or tables for packed ones, which have some spare chunks at the end."""

    T: int
    R: int  # stride of heads in arrays `[H, R]`
    chunks: int  # of a sequence
    total: int
    sequences: int
    starts: Tensor | None = None  # [total] int64
    lengths: Tensor | None = None  # [total] int32
    first: Tensor | None = None  # [N + 1] int32

    @property
    def packed(self) -> bool:
        return self.starts is not None

    @property
    def tables(self) -> tuple:
        """What every kernel of a chunk is told."""
        return self.starts, self.lengths, self.T, self.chunks, self.R


def _counts(B: int, T: int, cu_seqlens: Tensor | None, L: int) -> tuple[int, int]:
    """How many sequences there are, and chunks of all of them."""
    if cu_seqlens is None:
        return B, B * blocks_of(T, L)
    sequences = cu_seqlens.shape[0] - 1
    return sequences, T // L + sequences


def _cut(B: int, T: int, cu_seqlens: Tensor | None, L: int) -> _Chunks:
    sequences, total = _counts(B, T, cu_seqlens, L)
    if cu_seqlens is None:
        return _Chunks(T, _aligned(B * T), blocks_of(T, L), total, sequences)
    bounds = rising(cu_seqlens, T)
    first = F.pad(((bounds.diff() + (L - 1)) // L).cumsum(0), (1, 0))
    chunk = torch.arange(total, device=bounds.device)
    sequence = torch.searchsorted(first[1:], chunk, right=True).clamp(max=sequences - 1)
    starts = bounds[sequence] + (chunk - first[sequence]) * L
    lengths = (bounds[sequence + 1] - starts).clamp(0, L)
    return _Chunks(T, _aligned(T), 0, total, sequences, starts, lengths.to(torch.int32), first.to(torch.int32))


def _rows(x: Tensor) -> Tensor:
    """`[B, T, H, D]` as `[R, H, D]`, gates `[B, T, H]` as `[R, H]`. What has one token after the other is read where it
    is; other layouts are copied, so that no stride depends on a length, 32 bits hold offsets within a chunk, and lines
    are whole."""
    x = x.flatten(0, 1)
    if x.dim() == 2:
        return x
    heads_in_tokens = x.stride(-1) == 1 and x.stride(1) <= max(x.stride(0), x.shape[-1])
    whole = x.dtype == torch.float32 or (all(_at_16(x)) and x.stride(0) % 16 == x.stride(1) % 16 == 0)
    where_it_is = heads_in_tokens and whole and x.stride(0) < 1 << 22
    return x if where_it_is else x.clone(memory_format=torch.contiguous_format)


def _whole(size: int, dtype: torch.dtype) -> int:
    """Size of a head in whole lines; float32, which tensor cores do not multiply, is read as it is."""
    return size if dtype == torch.float32 else _aligned(size)


def _padded(x: Tensor | None, *sizes: int) -> Tensor | None:
    """x with zeros that make its last axes this long."""
    if x is None or x.shape[-len(sizes) :] == sizes:
        return x
    missing = [size - given for size, given in zip(sizes, x.shape[-len(sizes) :], strict=True)]
    return F.pad(x, [n for zeros in reversed(missing) for n in (0, zeros)])


def _aligned(size: int) -> int:
    """The next multiple of 16, by which Triton knows arrays that follow each other for aligned."""
    return (size + 15) // 16 * 16


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _pieces(
    cut: _Chunks, H: int, blocks: _Blocks, x: Tensor, matrices: int, most_bytes: int
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Room for some matrices of scores `[matrices, chunks, H, blocks, BS, BS]`, for as many chunks as are to be in
    memory at once, and the first and number of chunks of each piece."""
    N, pairs = cut.total, blocks.L // blocks.BS * (blocks.L // blocks.BS + 1) // 2
    dtype = _kept_dtype(x.dtype)
    of_chunk = matrices * H * pairs * blocks.BS**2 * dtype.itemsize
    most = blocks_of(N, blocks_of(N * of_chunk, most_bytes))
    spans = [(first, min(most, N - first)) for first in range(0, N, most)]
    return x.new_empty(matrices, most, H, pairs, blocks.BS, blocks.BS, dtype=dtype), spans


_compiled_states: set[tuple] = set()  # for which kinds of arguments, all that Triton tells apart


def _at_16(*tensors: Tensor) -> tuple[bool, ...]:
    """Whether data starts at a multiple of 16 bytes."""
    return tuple(x.is_meta or x.data_ptr() % 16 == 0 for x in tensors)


def _run_state(x, y, weight, scale, decay, factor, first, between, ends, cut, blocks):
    """Launches `mlstm_state_kernel`, in reverse with `factor` instead of `scale`; `first`, `between` and `ends` are C
    and n.

    Blocks are small where few sequences would leave most of a GPU idle. Both sizes are compiled at the first call, so
    that no batch size is the first to need one.
    """
    (_, H, K), V = x.shape, y.shape[-1]
    packed, reverse = cut.packed, factor is not None
    has_first, has_end = first[0] is not None, ends[0] is not None
    many, few = blocks.d_state if reverse else blocks.state, blocks.few_states
    busy = cut.sequences * H * blocks_of(K, many[1]) * blocks_of(V, many[2]) > processors(x.device) / 2
    chosen = many if busy else few
    kind = (x.device, x.dtype, H, K, V, *_strides(x, y), _at_16(x, y), packed, reverse, has_first, has_end)
    for block in (chosen,) if kind in _compiled_states else {many, few}:
        BT, BK, BV, warps, stages = block
        BK, BV = _tile(K, BK), _tile(V, BV)
        mlstm_state_kernel.run(
            x, y, weight, scale, decay, factor, *(t if t is None else t.contiguous() for t in first), *between, *ends,
            cut.starts, cut.lengths, cut.first, cut.T, cut.chunks, cut.R, *_strides(x, y), H,
            K=K, V=V, L=blocks.L, BT=BT, BK=BK, BV=BV, REVERSE=reverse, HAS_FIRST=has_first, HAS_END=has_end,
            PACKED=packed, num_warps=warps, num_stages=stages,
            grid=(cut.sequences * blocks_of(K, BK) * blocks_of(V, BV), H), warmup=block != chosen,
        )  # fmt: skip
    _compiled_states.add(kind)


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states between chunks and of scores: that of the inputs, but for the range of float16."""
    return torch.float32 if dtype == torch.float16 else dtype


@op("mlstm_chunkwise_triton")
def mlstm_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, C: Tensor | None, n: Tensor | None, m: Tensor | None,
    cu_seqlens: Tensor | None, input_gate: str, gate_soft_cap: float | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h `[B, T, H, V]` in the dtype of v, the final C, n, m, and what the backward pass reads again. Without an initial
    C, n and m, all three, sequences start from zeros.

    What is read again: numbers of tokens `[9, H, R]`, the token that each row has its stabiliser from `[H, R]`, numbers
    of chunks `[5, N, H]` in float64, and C and n before each chunk, but no C that must be zero. R and N are rounded up
    there, to aligned arrays.
    """
    with torch.cuda.device_of(q):
        return _forward(q, k, v, igate, fgate, C, n, m, cu_seqlens, input_gate == "sigmoid", gate_soft_cap, eps)


def _forward(q, k, v, igate, fgate, C, n, m, cu_seqlens, sigmoid, gate_soft_cap, eps):
    B, T, H, K_given = q.shape
    V_given = v.shape[-1]
    K, V = _whole(K_given, q.dtype), _whole(V_given, q.dtype)
    q, k, v, C, n = _padded(q, K), _padded(k, K), _padded(v, V), _padded(C, K, V), _padded(n, K)
    blocks = _blocks(q, V)
    L, BS = blocks.L, blocks.BS
    cut = _cut(B, T, cu_seqlens, L)
    N, packed = cut.total, cut.packed
    qs, ks, vs, igates, fgates = (_rows(x) for x in (q, k, v, igate, fgate))
    new = q.new_empty
    tokens, chunks = new(9, H, cut.R, dtype=torch.float32), new(5, _aligned(N), H, dtype=torch.float64)
    log_f, log_f_low, log_i, peak, weight, m_rows, normaliser, denominator, state_weight = tokens
    total, top, m_before, decay, scale = chunks
    source = new(H, cut.R, dtype=torch.int32)
    mlstm_fwd_gates_kernel[(N, H)](
        igates, fgates, log_f, log_f_low, log_i, peak, source, weight, total, top, *cut.tables,
        *_strides(igates, fgates), gate_soft_cap or 0.0, H, L=L,
        SIGMOID=sigmoid, CAPPED=gate_soft_cap is not None, PACKED=packed, num_warps=8,
    )  # fmt: skip
    last = _new_state(q, v, cut.sequences)
    mlstm_fwd_stabiliser_kernel[(cut.sequences, H)](
        total, top, None if m is None else m.contiguous(), m_before, decay, scale, last[2], cut.first, cut.chunks, H,
        BC=128, HAS_FIRST=m is not None, SIGMOID=sigmoid, PACKED=packed, num_warps=4,
    )  # fmt: skip
    C_between, n_between = new(N, H, K, V, dtype=_kept_dtype(q.dtype)), new(N, H, K, dtype=torch.float32)
    _run_state(ks, vs, weight, scale, decay, None, (C, n), (C_between, n_between), last[:2], cut, blocks)
    (scores,), pieces = _pieces(cut, H, blocks, q, 1, blocks.scores_bytes)
    h = new(B * T, H, V)
    for skip, count in pieces:
        BK, warps, stages = blocks.scores
        mlstm_fwd_scores_kernel[(count * (L // BS), H)](
            qs, ks, log_f, log_f_low, log_i, peak, m_before, n_between, scores, m_rows, normaliser, denominator,
            state_weight, *cut.tables, skip, *_strides(qs, ks), K_given**-0.5, eps, H, K=K, L=L, BS=BS, BK=_tile(K, BK),
            SIGMOID=sigmoid, PACKED=packed, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        BM, BX, BY, BJ, warps, stages = blocks.combine
        BX, BY = _tile(K, BX), _tile(V, BY)
        mlstm_fwd_combine_kernel[(count * (L // BM) * blocks_of(V, BY), H)](
            qs, C_between, vs, scores, h, state_weight, denominator, *cut.tables, skip, *_strides(qs, vs, h), H,
            K=K, V=V, L=L, BS=BS, BM=BM, BX=BX, BY=BY, BJ=BJ, HAS_FIRST=C is not None, PACKED=packed,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    h, last_C, last_n = h.view(B, T, H, V)[..., :V_given], last[0][..., :K_given, :V_given], last[1][..., :K_given]
    last = last_C.contiguous(), last_n.contiguous(), last[2]
    return h.contiguous(), *last, tokens, source, chunks, C_between, n_between


def _new_state(q: Tensor, v: Tensor, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for C, n and m."""
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    C, n, m = (q.new_empty(sequences, H, *dims, dtype=torch.float32) for dims in ((K, V), (K,), ()))
    return C, n, m


@mlstm_chunkwise.register_fake
def _(q, k, v, igate, fgate, C, n, m, cu_seqlens, input_gate, gate_soft_cap, eps):
    B, T, H, K = q.shape
    sequences, N = _counts(B, T, cu_seqlens, _blocks(q, v.shape[-1]).L)
    new = q.new_empty
    whole_K, whole_V = _whole(K, q.dtype), _whole(v.shape[-1], q.dtype)
    return (
        v.new_empty(v.shape),
        *_new_state(q, v, sequences),
        new(9, H, _aligned(B * T), dtype=torch.float32),
        new(H, _aligned(B * T), dtype=torch.int32),
        new(5, _aligned(N), H, dtype=torch.float64),
        new(N, H, whole_K, whole_V, dtype=_kept_dtype(q.dtype)),
        new(N, H, whole_K, dtype=torch.float32),
    )


@op("mlstm_chunkwise_triton_backward")
def _mlstm_chunkwise_backward(
    dh: Tensor, dC: Tensor | None, dn: Tensor | None, dm: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, cu_seqlens: Tensor | None, h: Tensor,
    tokens: Tensor, source: Tensor, chunks: Tensor, C_between: Tensor, n_between: Tensor,
    has_state: bool, input_gate: str, gate_soft_cap: float | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Exact gradients of `mlstm_chunkwise`: of q, k, v, both gates, and of the initial state (else empty)."""
    with torch.cuda.device_of(q):
        return _backward_pass(
            dh, dC, dn, dm, q, k, v, igate, fgate, cu_seqlens, h, tokens, source, chunks, C_between, n_between,
            has_state, input_gate == "sigmoid", gate_soft_cap, eps,
        )  # fmt: skip


def _backward_pass(
    dh, dC, dn, dm, q, k, v, igate, fgate, cu_seqlens, h, tokens, source, chunks, C_between, n_between,
    has_state, sigmoid, gate_soft_cap, eps,
):  # fmt: skip
    B, T, H, K_given = q.shape
    V_given = v.shape[-1]
    K, V = C_between.shape[-2:]
    q, k, v, h, dh = _padded(q, K), _padded(k, K), _padded(v, V), _padded(h, V), _padded(dh, V)
    dC, dn = _padded(dC, K, V), _padded(dn, K)
    blocks = _blocks(q, V)
    L, BS = blocks.L, blocks.BS
    cut = _cut(B, T, cu_seqlens, L)
    N, packed = cut.total, cut.packed
    qs, ks, vs, igates, fgates, hs, dhs = (_rows(x) for x in (q, k, v, igate, fgate, h, dh))
    new = q.new_empty
    log_f, log_f_low, log_i, peak, weight, m_rows, normaliser, denominator, state_weight = tokens
    total, top, m_before, decay, scale = chunks
    d_norm, dC_weight, dn_weight, d_m = new(4, H, cut.R, dtype=torch.float32)
    m_from_state = new(N, H, L // BS, dtype=torch.float32)
    BD, warps, stages, registers = blocks.d_scores
    half_ulp = 0.0 if h.dtype == torch.float32 else torch.finfo(h.dtype).eps / 2
    mlstm_bwd_rows_kernel[(N * (L // BS), H)](
        hs, dhs, log_f, log_f_low, peak, m_before, m_rows, normaliser, denominator, state_weight,
        d_norm, dC_weight, dn_weight, d_m, m_from_state,
        *cut.tables, *_strides(hs, dhs), eps, H, V=V, L=L, BS=BS, BV=_tile(V, BD), HALF_ULP=half_ulp,
        SIGMOID=sigmoid, PACKED=packed, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    dC_between, dn_between = torch.empty_like(C_between), torch.empty_like(n_between)
    d_first = _new_state(q, v, cut.sequences if has_state else 0)
    if (dC is None) != (dn is None):
        zeros = _new_state(q, v, cut.sequences)
        dC, dn = (zeros[0].zero_() if dC is None else dC), (zeros[1].zero_() if dn is None else dn)
    ends = d_first[:2] if has_state else (None, None)
    _run_state(qs, dhs, dC_weight, None, decay, d_norm, (dC, dn), (dC_between, dn_between), ends, cut, blocks)
    dq, dk, dv = new(B * T, H, K), new(B * T, H, K), new(B * T, H, V)
    BM, BX, BY, BJ, combine_warps, combine_stages = blocks.d_combine
    BYK, BYV = _tile(K, BY), _tile(V, BY)
    parts = blocks_of(K, BYK)
    d_decay, (q_dots, k_dots) = new(N, H, dtype=torch.float32), new(2, parts, H, cut.R, dtype=torch.float32)
    col_sum, between = new(2, L // BS, H, cut.R, dtype=torch.float32)
    (scores, d_scores), pieces = _pieces(cut, H, blocks, q, 2, blocks.d_scores_bytes)
    for skip, count in pieces:
        mlstm_bwd_scores_kernel[(count * scores.shape[2], H)](
            qs, ks, vs, dhs, log_f, log_f_low, log_i, m_rows, denominator, d_norm, scores, d_scores, col_sum, between,
            *cut.tables, skip, *_strides(qs, ks, vs, dhs), K_given**-0.5, H,
            K=K, V=V, L=L, BS=BS, BK=_tile(K, BD), BV=_tile(V, BD), PACKED=packed,
            num_warps=warps, num_stages=stages, maxnreg=registers,
        )  # fmt: skip
        mlstm_bwd_combine_kernel[(count * (L // BM * (blocks_of(V, BYV) + 2 * parts) + 1), H)](
            qs, ks, vs, dhs, C_between, n_between, dC_between, dn_between, scores, d_scores, weight, scale, decay,
            dC_weight, dn_weight, dq, dk, dv, d_decay, q_dots, k_dots,
            *cut.tables, skip, *_strides(qs, ks, vs, dhs), H,
            K=K, V=V, L=L, BS=BS, BM=BM, BXK=_tile(K, BX), BXV=_tile(V, BX), BYK=BYK, BYV=BYV, BJ=BJ,
            BLOCK=min(16384, power_of_2(K * V)), BK=power_of_2(K),
            HAS_FIRST=has_state, HAS_LAST=dC is not None, PACKED=packed,
            num_warps=combine_warps, num_stages=combine_stages,
        )  # fmt: skip
    d_m_between = new(N, H, dtype=torch.float32)
    if sigmoid:
        d_first[2].zero_()
    else:
        mlstm_bwd_stabiliser_kernel[(cut.sequences, H)](
            m_from_state, total, top, m_before, d_decay, q_dots, k_dots, None if dm is None else dm.contiguous(),
            d_m_between, d_first[2] if has_state else None, *cut.tables, cut.first, H, L=L, BLOCKS=L // BS, PARTS=parts,
            BC=128, HAS_LAST=dm is not None, HAS_FIRST=has_state, PACKED=packed, num_warps=4,
        )  # fmt: skip
    digate, dfgate = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (igate, fgate))
    mlstm_bwd_gates_kernel[(N, H)](
        igates, fgates, log_f, log_f_low, peak, source, m_before, d_m, d_m_between, d_decay,
        col_sum, between, q_dots, k_dots, digate, dfgate, *cut.tables, *_strides(igates, fgates),
        gate_soft_cap or 0.0, H,
        L=L, BS=BS, PARTS=parts, SIGMOID=sigmoid, CAPPED=gate_soft_cap is not None, PACKED=packed, num_warps=8,
    )  # fmt: skip
    sizes = (dq, q, K_given), (dk, k, K_given), (dv, v, V_given)
    grads = (dx.view(x.shape)[..., :given].contiguous() for dx, x, given in sizes)
    d_first = d_first[0][..., :K_given, :V_given].contiguous(), d_first[1][..., :K_given].contiguous(), d_first[2]
    return *grads, digate, dfgate, *d_first


@_mlstm_chunkwise_backward.register_fake
def _(
    dh, dC, dn, dm, q, k, v, igate, fgate, cu_seqlens, h, tokens, source, chunks, C_between, n_between, has_state, *_
):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    inputs = (x.new_empty(x.shape) for x in (q, k, v, igate, fgate))
    return *inputs, *_new_state(q, v, sequences if has_state else 0)


def _setup_context(ctx, inputs, output):
    q, k, v, igate, fgate, C, n, m, cu_seqlens, *ctx.options = inputs
    h, _, _, _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.has_state = C is not None
    ctx.save_for_backward(q, k, v, igate, fgate, cu_seqlens, h, *kept)


def _backward(ctx, dh, dC, dn, dm, *_):
    saved = ctx.saved_tensors  # may be read only once under checkpointing
    if dh is None:
        dh = torch.zeros_like(saved[6])
    with full_precision(dh.device):
        *grads, dC, dn, dm = _mlstm_chunkwise_backward(dh, dC, dn, dm, *saved, ctx.has_state, *ctx.options)
    state_grads = (dC, dn, dm) if ctx.has_state else (None, None, None)
    return *grads, *state_grads, None, None, None, None


mlstm_chunkwise.register_autograd(_backward, _setup_context)
