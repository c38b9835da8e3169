"""Triton kernels of the mLSTM over whole sequences; `mlstm_triton` says what they do together, and launches them.

A program handles one chunk of one head, or a part of it; in `mlstm_state_kernel` and the kernels for stabilisers it
walks over the chunks of a sequence. Products accumulate in float32; gates, normaliser and stabiliser are float32, sums
of log gates float64. Float32 products are exact ("ieee"), without tensor cores.

Dims and letters as in `mlstm_triton`. `i_` program or loop index, `o_` offsets, `in_` masks, `s*_t s*_h` strides of
tokens and heads, `at` a chunk and head, `tokens` where the numbers of a chunk's tokens start in arrays `[H, R]`.
"""

from .mlstm_torch import MAX_LOG_FLOOR
from .triton_language import tl, triton


# the log of a forget gate that is shut: its exp is zero whatever float16 has for input gates, and sums over a chunk are
# as exact as need be
LOG_ZERO = tl.constexpr(-2e5)
LOG_FLOOR = tl.constexpr(MAX_LOG_FLOOR)
# gates are small, and may be slices of anything
GATES, GATE_STRIDES = ["igate", "fgate"], ["si_t", "si_h", "sf_t", "sf_h"]


# helpers


@triton.jit
def _span(i_chunk, T, chunks, starts, lengths, L: tl.constexpr, PACKED: tl.constexpr):
    """First row of a chunk, and how many it has; none in the spare chunks of packed sequences."""
    if PACKED:
        start, length = tl.load(starts + i_chunk), tl.load(lengths + i_chunk)
    else:
        t = (i_chunk % chunks) * L
        start, length = (i_chunk // chunks).to(tl.int64) * T + t, tl.minimum(T - t, L)
    return start, length


@triton.jit
def _sequence(i_n, chunks, first_chunk, PACKED: tl.constexpr):
    """First and end chunk of a sequence."""
    if PACKED:
        first, end = tl.load(first_chunk + i_n), tl.load(first_chunk + i_n + 1)
    else:
        first, end = i_n * chunks, (i_n + 1) * chunks
    return first, end


@triton.jit
def _max(x, y):
    """The larger, or the one that is not a number, which `tl.maximum` alone drops."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exp(x):
    """exp of float32 to the last bit; `tl.exp` first rounds x log2(e) to float32, which costs digits of a large x."""
    return tl.exp(x.to(tl.float64)).to(tl.float32)


@triton.jit
def _tanh(x):
    shrunk = tl.exp(-2 * tl.abs(x))
    size = (1 - shrunk) / (1 + shrunk)
    return tl.where(x < 0, -size, size)


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def _log_gates(igate, fgate, cap, SIGMOID: tl.constexpr, CAPPED: tl.constexpr):
    """Log gates in float64, and where both are minus infinity: the state is emptied and nothing enters."""
    igate, fgate = igate.to(tl.float64), fgate.to(tl.float64)
    if CAPPED:
        igate, fgate = cap * _tanh(igate / cap), cap * _tanh(fgate / cap)
    closed = (igate == float("-inf")) & (fgate == float("-inf"))
    if SIGMOID:
        igate = _log_sigmoid(igate)
    return igate, _log_sigmoid(fgate), closed


@triton.jit
def _keeps(log_f, log_f_low, peak, m_before, tokens, at, valid):
    """Whether rows have their stabiliser from the state before the chunk, and not from one of its tokens."""
    through = tl.load(log_f + tokens, mask=valid, other=0.0).to(tl.float64) + tl.load(m_before + at)
    through += tl.load(log_f_low + tokens, mask=valid, other=0.0)
    return valid & (through.to(tl.float32) >= tl.load(peak + tokens, mask=valid, other=0.0))


@triton.jit
def _floor(m):
    """exp(-m), the least denominator, within bounds."""
    return _exp(tl.maximum(tl.minimum(-m, LOG_FLOOR), -LOG_FLOOR))


@triton.jit
def _later(b1, a1, b2, a2):
    """Two steps `m -> max(b + m, a)` as one."""
    return b1 + b2, _max(a1 + b2, a2)


@triton.jit
def _larger(x1, i1, x2, i2):
    """The larger value and its place, the first of equals."""
    return _max(x1, x2), tl.where(x2 > x1, i2, i1)


@triton.jit
def _segment(end1, x1, end2, x2):
    """Sums within segments: what comes after the end of one is not added."""
    return end1 | end2, tl.where(end2 == 1, x2, x1 + x2)


@triton.jit
def _linear(z1, x1, z2, x2):
    """Two steps `y -> z y + x` as one."""
    return z1 * z2, z2 * x1 + x2


@triton.jit
def _tf32(x):
    """Float32 rounded to what TF32 holds; a product would cut the other digits off. Float16 fits as it is."""
    if x.dtype == tl.float32:
        nearest = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)  # of a NaN that has all bits set the sum is a zero
    return x.to(tl.float32)


@triton.jit
def _dot(x, y, acc):
    """x y + acc. Where one is float16 and the other is kept in float32, for its range, in TF32."""
    if x.dtype == y.dtype:
        acc = tl.dot(x, y, acc, input_precision="ieee")
    else:
        acc = tl.dot(_tf32(x), _tf32(y), acc, input_precision="tf32")
    return acc


@triton.jit
def _weights(log_f, log_f_low, m, rows, log_f_cols, log_f_low_cols, log_i, cols, EXACT: tl.constexpr):
    """What each token (columns) of a chunk weighs in each row; rows beyond the end have an infinite m."""
    if EXACT:
        log_f, log_f_low, log_i = log_f.to(tl.float64), log_f_low.to(tl.float64), log_i.to(tl.float64)
    D = (log_f[:, None] - log_f_cols[None, :]) + ((log_f_low[:, None] - log_f_low_cols[None, :]) + log_i[None, :])
    D = tl.where(rows[:, None] >= cols[None, :], D - m[:, None], float("-inf"))
    return _exp(D) if EXACT else tl.exp(D)


@triton.jit
def _chunk_scores(scores, i_chunk, i_h, H, L: tl.constexpr, BS: tl.constexpr):
    """Where scores of a chunk start, the first of those that are in memory being 0."""
    BLOCKS: tl.constexpr = L // BS
    return scores + (i_chunk.to(tl.int64) * H + i_h) * (BLOCKS * (BLOCKS + 1) // 2 * BS * BS)


@triton.jit
def _scores(rows, cols, BS: tl.constexpr):
    """Offsets of scores of a chunk, and which are stored: blocks at and below the diagonal, one after the other."""
    block = rows // BS
    return (
        (block * (block + 1) // 2 * BS * BS + rows % BS * BS)[:, None] + (cols // BS * BS * BS + cols % BS)[None, :],
        (cols // BS)[None, :] <= block[:, None],
    )


# gates and stabiliser


@triton.jit(do_not_specialize=["T", "chunks", "R", *GATE_STRIDES], do_not_specialize_on_alignment=GATES)
def mlstm_fwd_gates_kernel(
    igate, fgate, log_f, log_f_low, log_i, peak, source, weight, total, top,
    starts, lengths, T, chunks, R, si_t, si_h, sf_t, sf_h, cap, H,
    L: tl.constexpr, SIGMOID: tl.constexpr, CAPPED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """For each token the sum of log forget gates up to it, its log input gate, its weight in the next state, the
    largest log weight in its row and the token that has it; for each chunk the sum of log forget gates and the largest
    log weight in the next state."""
    i_chunk, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, length = _span(i_chunk, T, chunks, starts, lengths, L, PACKED)
    o_t = tl.arange(0, L)
    valid = o_t < length
    igates = tl.load(igate + start * si_t + i_h * si_h + o_t * si_t, mask=valid, other=0.0)
    fgates = tl.load(fgate + start * sf_t + i_h * sf_h + o_t * sf_t, mask=valid, other=0.0)
    logi, logf, closed = _log_gates(igates, fgates, cap, SIGMOID, CAPPED)
    logi, logf = tl.where(valid, logi, float("-inf")), tl.where(valid, _max(logf, LOG_ZERO), 0.0)
    b = tl.cumsum(logf, 0)
    b_last = tl.sum(tl.where(o_t == L - 1, b, 0.0), 0)  # the same sum, so that nothing is between it and the last
    reach = tl.where(valid & closed, 0.0, logi)  # for the stabiliser a shut gate is open to a key of zero
    rows = i_h * R + start + o_t
    high = b.to(tl.float32)
    tl.store(log_f + rows, high, mask=valid)
    tl.store(log_f_low + rows, (b - high).to(tl.float32), mask=valid)
    tl.store(log_i + rows, logi.to(tl.float32), mask=valid)
    to_end = (b_last - b) + logi
    if SIGMOID:
        largest = 0.0
    else:
        largest_before, token = tl.associative_scan((reach - b, o_t), 0, _larger)
        tl.store(peak + rows, (b + largest_before).to(tl.float32), mask=valid)
        tl.store(source + rows, token, mask=valid)
        largest = tl.reduce(tl.where(valid, (b_last - b) + reach, float("-inf")), 0, _max)
        tl.store(top + i_chunk * H + i_h, largest)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(weight + rows, _exp(to_end - largest), mask=valid)
    tl.store(total + i_chunk * H + i_h, b_last)


@triton.jit(do_not_specialize=["chunks"])
def mlstm_fwd_stabiliser_kernel(
    total, top, m_first, m_before, decay, scale, m_last, first_chunk, chunks, H,
    BC: tl.constexpr, HAS_FIRST: tl.constexpr, SIGMOID: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """m before each chunk, and what the state before it and the sum over it weigh in the state after it."""
    i_n, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, end = _sequence(i_n, chunks, first_chunk, PACKED)
    m = tl.full([], 0.0, tl.float64)
    if HAS_FIRST and not SIGMOID:
        m = tl.load(m_first + i_n * H + i_h).to(tl.float64)
    o_c = tl.arange(0, BC)
    for c in range(first, end, BC):
        at = (c + o_c) * H + i_h
        valid = c + o_c < end
        b = tl.load(total + at, mask=valid, other=0.0)
        if SIGMOID:
            tl.store(m_before + at, tl.zeros_like(b), mask=valid)
            tl.store(decay + at, tl.exp(b), mask=valid)
            tl.store(scale + at, tl.zeros_like(b) + 1.0, mask=valid)
        else:
            a = tl.load(top + at, mask=valid, other=float("-inf"))
            b_sum, a_max = tl.associative_scan((b, a), 0, _later)
            m_after = _max(b_sum + m, a_max)
            tl.store(m_before + c * H + i_h, m)
            tl.store(m_before + at + H, m_after, mask=c + o_c + 1 < end)
            tl.debug_barrier()
            before = tl.load(m_before + at, mask=valid, other=0.0)
            tl.store(decay + at, tl.exp(tl.where(valid, b + before - m_after, 0.0)), mask=valid)
            tl.store(scale + at, tl.exp(tl.where(valid, a - m_after, 0.0)), mask=valid)
            m = tl.sum(tl.where(o_c == tl.minimum(end - c, BC) - 1, m_after, 0.0), 0)
    tl.store(m_last + i_n * H + i_h, m.to(tl.float32))


# the state, between chunks


@triton.jit
def _columns(x, dtype: tl.constexpr):
    """Float32 x as columns of a matrix in a dtype of fewer digits, whose sum it is; the others are zero."""
    o = tl.arange(0, 16)[None, :]
    high = x.to(dtype)
    middle = (x - high.to(tl.float32)).to(dtype)
    low = (x - high.to(tl.float32) - middle.to(tl.float32)).to(dtype)
    zero = tl.zeros_like(high)[:, None]
    return tl.where(o == 0, high[:, None], tl.where(o == 1, middle[:, None], tl.where(o == 2, low[:, None], zero)))


@triton.jit(do_not_specialize=["T", "chunks", "R"])
def mlstm_state_kernel(
    x, y, weight, scale, decay, factor, C_first, n_first, C_between, n_between, C_end, n_end,
    starts, lengths, first_chunk, T, chunks, R, sx_t, sx_h, sy_t, sy_h, H,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A block of C, and of n, from chunk to chunk: `C <- decay C + (w x)^T y` and `n <- decay n + (w x)^T factor`,
    where factor is 1 but in reverse. A C that must be zero is not stored, see `_stored`."""
    KB: tl.constexpr = (K + BK - 1) // BK
    VB: tl.constexpr = (V + BV - 1) // BV
    TILES: tl.constexpr = L // BT
    SUMS: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float32 else tl.float32
    i, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_n, i_k, i_v = i // (KB * VB), i // VB % KB, i % VB
    first, end = _sequence(i_n, chunks, first_chunk, PACKED)
    o_k, o_v, o_t = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    in_k, in_v = o_k < K, o_v < V
    in_kv = in_k[:, None] & in_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    at_end = (i_n.to(tl.int64) * H + i_h) * K
    C, n = tl.zeros([BK, BV], tl.float32), tl.zeros([BK, 16], SUMS)  # n is the sum of its columns
    if HAS_FIRST:
        C = tl.load(C_first + at_end * V + o_kv, mask=in_kv, other=0.0)
        in_column = in_k[:, None] & (tl.arange(0, 16) == 0)[None, :]
        n = tl.load(n_first + at_end + o_k[:, None] + tl.zeros([BK, 16], tl.int32), mask=in_column, other=0.0).to(SUMS)
    for i_tile in range((end - first) * TILES):
        i_chunk = end - 1 - i_tile // TILES if REVERSE else first + i_tile // TILES
        start, length = _span(i_chunk, T, chunks, starts, lengths, L, PACKED)
        at = i_chunk.to(tl.int64) * H + i_h
        if i_tile % TILES == 0:
            if HAS_FIRST or PACKED or i_tile > 0:
                tl.store(C_between + at * K * V + o_kv, C.to(C_between.dtype.element_ty), mask=in_kv)
            if i_v == 0:
                tl.store(n_between + at * K + o_k, tl.sum(n, 1).to(tl.float32), mask=in_k)
            chunk_decay = tl.load(decay + at).to(tl.float32)
            C *= chunk_decay
            n *= chunk_decay
        o_row = i_tile % TILES * BT + o_t
        valid = o_row < length
        tokens = i_h * R + start + o_row
        w = tl.load(weight + tokens, mask=valid, other=0.0)
        factors = tl.full([BT], 1.0, tl.float32)
        if REVERSE:
            factors = tl.load(factor + tokens, mask=valid, other=0.0)
        else:
            w *= tl.load(scale + at).to(tl.float32)
        xs = tl.load(
            x + start * sx_t + i_h * sx_h + o_row[:, None] * sx_t + o_k[None, :],
            mask=valid[:, None] & in_k[None, :], other=0.0,
        )  # fmt: skip
        ys = tl.load(
            y + start * sy_t + i_h * sy_h + o_row[:, None] * sy_t + o_v[None, :],
            mask=valid[:, None] & in_v[None, :], other=0.0,
        )  # fmt: skip
        weighted = (xs * w[:, None]).to(C_between.dtype.element_ty)
        if x.dtype.element_ty == tl.float32:
            # Small terms first, which rounds less. A sum would be compiled to a product that adds each to C.
            C -= tl.dot(tl.trans(-weighted), ys, input_precision="ieee")
        else:
            C = _dot(tl.trans(weighted), ys, C)
        if x.dtype.element_ty == tl.bfloat16:
            n = tl.dot(tl.trans(weighted), _columns(factors, tl.bfloat16), n)
        else:
            total = tl.sum(weighted.to(SUMS) * factors[:, None], 0)
            n += tl.where((tl.arange(0, 16) == 0)[None, :], total[:, None], 0.0)
    if HAS_END:
        tl.store(C_end + at_end * V + o_kv, C, mask=in_kv)
        if i_v == 0:
            tl.store(n_end + at_end + o_k, tl.sum(n, 1).to(tl.float32), mask=in_k)


@triton.jit
def _stored(size, i_chunk, edge, chunks, GIVEN: tl.constexpr, PACKED: tl.constexpr):
    """`size`, how much of a state is in memory, or 0 where it is zero: in chunk `edge` of a sequence, its first or in
    reverse its last, if no state was given."""
    if not (GIVEN or PACKED):
        size = tl.where(i_chunk % chunks == edge, 0, size)
    return size


# scores of a chunk, and sums over its rows


@triton.jit
def _products(x, y, sx_t, sy_t, rows, cols, length, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr):
    """x y^T for a block of rows of x and one of y, both with D columns."""
    o_d = tl.arange(0, BD)
    acc = tl.zeros([BS, BS], tl.float32)
    for i_d in range(0, D, BD):
        in_d = i_d + o_d < D
        xs = tl.load(
            x + rows[:, None] * sx_t + i_d + o_d[None, :], mask=(rows < length)[:, None] & in_d[None, :], other=0.0
        )
        ys = tl.load(
            y + cols[None, :] * sy_t + i_d + o_d[:, None], mask=(cols < length)[None, :] & in_d[:, None], other=0.0
        )
        acc = tl.dot(xs, ys, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["T", "chunks", "R", "skip"])
def mlstm_fwd_scores_kernel(
    q, k, log_f, log_f_low, log_i, peak, m_before, n_before, scores, m_rows, normaliser, denominator, state_weight,
    starts, lengths, T, chunks, R, skip, sq_t, sq_h, sk_t, sk_h, softmax_scale, eps, H,
    K: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
    SIGMOID: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What tokens of a chunk (`scores`) and the state before it (`state_weight`) weigh in the numerator of some rows,
    and stabiliser, normaliser and denominator of these."""
    BLOCKS: tl.constexpr = L // BS
    i, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_chunk, i_row = skip + i // BLOCKS, i % BLOCKS * BS
    start, length = _span(i_chunk, T, chunks, starts, lengths, L, PACKED)
    at = i_chunk.to(tl.int64) * H + i_h
    o_s, o_k = tl.arange(0, BS), tl.arange(0, BK)
    rows = i_row + o_s
    valid = rows < length
    tokens = i_h * R + start
    q += start * sq_t + i_h * sq_h
    k += start * sk_t + i_h * sk_h
    b = tl.load(log_f + tokens + rows, mask=valid, other=0.0)
    b_low = tl.load(log_f_low + tokens + rows, mask=valid, other=0.0)
    through = (b.to(tl.float64) + tl.load(m_before + at)) + b_low
    if SIGMOID:
        m = tl.where(valid, 0.0, float("inf"))
    else:
        m = _max(through.to(tl.float32), tl.load(peak + tokens + rows, mask=valid, other=float("inf")))
    g = _exp(through - m) * softmax_scale
    norm = tl.zeros([BS], tl.float32)
    for i_k in tl.static_range(0, K, BK):
        in_k = i_k + o_k < K
        qs = tl.load(q + rows[:, None] * sq_t + i_k + o_k[None, :], mask=valid[:, None] & in_k[None, :], other=0.0)
        n = tl.load(n_before + at * K + i_k + o_k, mask=in_k, other=0.0)
        norm += tl.sum(qs * n[None, :], 1)
    norm *= g
    scores = _chunk_scores(scores, i_chunk - skip, i_h, H, L, BS)
    for col in tl.range(0, tl.minimum(length, i_row + BS), BS, flatten=True):
        cols = col + o_s
        S = _products(q, k, sq_t, sk_t, rows, cols, length, K, BS, BK)
        b_cols = tl.load(log_f + tokens + cols, mask=cols < length, other=0.0)
        b_low_cols = tl.load(log_f_low + tokens + cols, mask=cols < length, other=0.0)
        logi = tl.load(log_i + tokens + cols, mask=cols < length, other=float("-inf"))
        S *= (
            _weights(b, b_low, m, rows, b_cols, b_low_cols, logi, cols, k.dtype.element_ty == tl.float32)
            * softmax_scale
        )
        # The normaliser sums what a product will read: where one token makes a row, h is exactly its v.
        S = S.to(scores.dtype.element_ty) if scores.dtype.element_ty == q.dtype.element_ty else _tf32(S)
        norm += tl.sum(S.to(tl.float32), 1)
        inside, _ = _scores(rows, cols, BS)
        tl.store(scores + inside, S)
    den = _max(tl.abs(norm), _floor(m)) + eps
    tl.store(m_rows + tokens + rows, m, mask=valid)
    tl.store(normaliser + tokens + rows, norm, mask=valid)
    tl.store(denominator + tokens + rows, den, mask=valid)
    tl.store(state_weight + tokens + rows, g, mask=valid)


@triton.jit(do_not_specialize=["T", "chunks", "R"])
def mlstm_bwd_rows_kernel(
    h, dh, log_f, log_f_low, peak, m_before, m_rows, normaliser, denominator, state_weight,
    d_norm, dC_weight, dn_weight, d_m, m_from_state,
    starts, lengths, T, chunks, R, sh_t, sh_h, sd_t, sd_h, eps, H,
    V: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, HALF_ULP: tl.constexpr,
    SIGMOID: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradients of the normaliser (times the denominator) and stabiliser of some rows, and what that and the output
    weigh in gradients of the state."""
    BLOCKS: tl.constexpr = L // BS
    i, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_chunk, i_row = i // BLOCKS, i % BLOCKS * BS
    start, length = _span(i_chunk, T, chunks, starts, lengths, L, PACKED)
    at = i_chunk.to(tl.int64) * H + i_h
    o_s = tl.arange(0, BS)
    rows = i_row + o_s
    valid = rows < length
    tokens = i_h * R + start + rows
    h += start * sh_t + i_h * sh_h
    dh += start * sd_t + i_h * sd_h
    # dh h, minus the gradient of the denominator times that. Summed like products of dh and v: where one token makes a
    # row, h is its v, and the gradient of its score cancels exactly.
    product = _products(dh, h, sd_t, sh_t, rows, rows, length, V, BS, BV)
    u = tl.sum(tl.where(o_s[:, None] == o_s[None, :], product, 0.0), 1)
    m = tl.load(m_rows + tokens, mask=valid, other=0.0)
    den = tl.load(denominator + tokens, mask=valid, other=1.0)
    norm = tl.load(normaliser + tokens, mask=valid, other=0.0)
    sign = tl.where(norm > 0, -1.0, tl.where(norm < 0, 1.0, 0.0))
    floor = _floor(m)
    du = tl.where(tl.abs(norm) >= floor, sign * u, 0.0)
    g = tl.div_rn(tl.load(state_weight + tokens, mask=valid, other=0.0), den)
    tl.store(d_norm + tokens, du, mask=valid)
    tl.store(dC_weight + tokens, g, mask=valid)
    tl.store(dn_weight + tokens, g * du, mask=valid)
    if not SIGMOID:
        keeps = _keeps(log_f, log_f_low, peak, m_before, tokens, at, valid)
        # What eps leaves of it. Where rounding of h hides that, it would be alone with its sign.
        dm = tl.where(eps >= HALF_ULP * den, -eps * u / den, 0.0)
        # A floor at its bound does not follow the stabiliser: then all of it is left.
        dm = tl.where((tl.abs(norm) < floor) & (tl.abs(m) > LOG_FLOOR), -u, dm)
        tl.store(d_m + tokens, dm, mask=valid)
        tl.store(m_from_state + at * BLOCKS + i % BLOCKS, tl.sum(tl.where(keeps, dm, 0.0), 0))


@triton.jit(do_not_specialize=["T", "chunks", "R", "skip"])
def mlstm_bwd_scores_kernel(
    q, k, v, dh, log_f, log_f_low, log_i, m_rows, denominator, d_norm, scores, d_scores, col_sum, between,
    starts, lengths, T, chunks, R, skip, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h, sd_t, sd_h, softmax_scale, H,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """A block of scores over denominators, and of gradients of products of queries and keys. Gradients of the logs of
    their weights are summed over rows (`col_sum`), and for each row over earlier tokens in rows from it on (`between`).
    """
    BLOCKS: tl.constexpr = L // BS
    PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    i, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_chunk, pair = skip + i // PAIRS, i % PAIRS
    block = 0
    for row in tl.static_range(1, BLOCKS):
        block += tl.where(pair >= row * (row + 1) // 2, 1, 0)
    start, length = _span(i_chunk, T, chunks, starts, lengths, L, PACKED)
    if block * BS < length:
        plane = tl.cast(R, tl.int64) * H
        o_s = tl.arange(0, BS)
        rows, part = block * BS + o_s, pair - block * (block + 1) // 2
        cols = part * BS + o_s
        valid = rows < length
        tokens = i_h * R + start
        q += start * sq_t + i_h * sq_h
        k += start * sk_t + i_h * sk_h
        v += start * sv_t + i_h * sv_h
        dh += start * sd_t + i_h * sd_h
        b = tl.load(log_f + tokens + rows, mask=valid, other=0.0)
        b_low = tl.load(log_f_low + tokens + rows, mask=valid, other=0.0)
        m = tl.load(m_rows + tokens + rows, mask=valid, other=float("inf"))
        b_cols = tl.load(log_f + tokens + cols, mask=cols < length, other=0.0)
        b_low_cols = tl.load(log_f_low + tokens + cols, mask=cols < length, other=0.0)
        logi = tl.load(log_i + tokens + cols, mask=cols < length, other=float("-inf"))
        inv = tl.div_rn(tl.full([BS], 1.0, tl.float32), tl.load(denominator + tokens + rows, mask=valid, other=1.0))
        dS = _products(dh, v, sd_t, sv_t, rows, cols, length, V, BS, BV)
        dS = (dS + tl.load(d_norm + tokens + rows, mask=valid, other=0.0)[:, None]) * inv[:, None]
        S = _products(q, k, sq_t, sk_t, rows, cols, length, K, BS, BK)
        W = (
            _weights(b, b_low, m, rows, b_cols, b_low_cols, logi, cols, k.dtype.element_ty == tl.float32)
            * softmax_scale
        )
        S *= W
        inside = pair * BS * BS + o_s[:, None] * BS + o_s[None, :]
        scores = _chunk_scores(scores, i_chunk - skip, i_h, H, L, BS)
        d_scores = _chunk_scores(d_scores, i_chunk - skip, i_h, H, L, BS)
        tl.store(scores + inside, (S * inv[:, None]).to(scores.dtype.element_ty))
        tl.store(d_scores + inside, (dS * W).to(d_scores.dtype.element_ty))
        dD = S * dS
        tl.store(col_sum + plane * block + tokens + cols, tl.sum(dD, 0), mask=cols < length)
        if part < block:
            below = tl.cumsum(tl.sum(dD, 1), 0, reverse=True)
        else:
            later = tl.where(o_s[:, None] <= o_s[None, :], 1.0, 0.0).to(q.dtype.element_ty)
            below = _dot(later, dD.to(scores.dtype.element_ty), tl.zeros([BS, BS], tl.float32))
            below = tl.sum(tl.where(rows[:, None] > cols[None, :], below, 0.0), 1)
        tl.store(between + plane * part + tokens + rows, below, mask=valid)


# what comes through the state and from the chunk, for a block of rows


@triton.jit
def _combine(
    i_row, i_y, i_h, start, length, at, width,
    x, Z, y, scores, out, scale, rank_rows, rank_cols, factor, dots, denominator,
    R, H, sx_t, sx_h, sy_t, sy_h, so_t, so_h, sf_t, sf_h,
    X: tl.constexpr, Y: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr,
    BY: tl.constexpr, BJ: tl.constexpr, Z_TRANSPOSED: tl.constexpr, S_TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """`out = scale (x Z) + scores y` for a block of rows and columns; x `[R, X]`, Z `[X, Y]` of each chunk, y `[R, Y]`.
    `width` is X, or 0 where Z is zero and not in memory.

    With dots, a product of a vector of rows and one of columns is added to the part through the state, and the product
    of each row of that part with a row of `factor` is returned.
    """
    if i_row < length:
        o_s, o_x, o_y, o_j = tl.arange(0, BM), tl.arange(0, BX), i_y * BY + tl.arange(0, BY), tl.arange(0, BJ)
        rows = i_row + o_s
        valid, in_y = rows < length, o_y < Y
        tokens = i_h * R + start
        x += start * sx_t + i_h * sx_h
        y += start * sy_t + i_h * sy_h
        Z += at * X * Y
        # through the state
        acc = tl.zeros([BM, BY], tl.float32)
        for i_x in range(0, X, BX):
            in_x, in_z = i_x + o_x < X, i_x + o_x < width
            xs = tl.load(x + rows[:, None] * sx_t + i_x + o_x[None, :], mask=valid[:, None] & in_x[None, :], other=0.0)
            if Z_TRANSPOSED:
                Zs = tl.load(Z + o_y[None, :] * X + i_x + o_x[:, None], mask=in_z[:, None] & in_y[None, :], other=0.0)
            else:
                Zs = tl.load(Z + (i_x + o_x)[:, None] * Y + o_y[None, :], mask=in_z[:, None] & in_y[None, :], other=0.0)
            acc = _dot(xs, Zs, acc)
        acc *= scale[:, None]
        if dots is not None:
            acc += rank_rows[:, None] * tl.load(rank_cols + at * Y + o_y, mask=in_y, other=0.0)[None, :]
            factors = tl.load(
                factor + start * sf_t + i_h * sf_h + rows[:, None] * sf_t + o_y[None, :],
                mask=valid[:, None] & in_y[None, :], other=0.0,
            )  # fmt: skip
            tl.store(dots + i_y * R.to(tl.int64) * H + tokens + rows, tl.sum(acc * factors, 1), mask=valid)
        # from tokens of the chunk
        first = i_row if S_TRANSPOSED else 0
        end = tl.minimum(length, L if S_TRANSPOSED else i_row + BM)
        for j in range(first, end, BJ):
            if S_TRANSPOSED:
                inside, stored = _scores(j + o_j, rows, BS)
                S = tl.trans(tl.load(scores + inside, mask=stored, other=0.0))
            else:
                inside, stored = _scores(rows, j + o_j, BS)
                S = tl.load(scores + inside, mask=stored, other=0.0)
            ys = tl.load(
                y + (j + o_j)[:, None] * sy_t + o_y[None, :],
                mask=(j + o_j < length)[:, None] & in_y[None, :], other=0.0,
            )  # fmt: skip
            acc = _dot(S, ys, acc)
        if denominator is not None:
            if x.dtype.element_ty == tl.float32:  # where the last bit is seen
                acc = tl.div_rn(acc, denominator[:, None])
            else:
                acc /= denominator[:, None]
        tl.store(
            out + start * so_t + i_h * so_h + rows[:, None] * so_t + o_y[None, :],
            acc.to(out.dtype.element_ty), mask=valid[:, None] & in_y[None, :],
        )  # fmt: skip


@triton.jit
def _of_rows(numbers, i_h, start, rows, length, R, other):
    """Numbers of some rows of a chunk."""
    return tl.load(numbers + i_h * R + start + rows, mask=rows < length, other=other)


@triton.jit(do_not_specialize=["T", "chunks", "R", "skip"])
def mlstm_fwd_combine_kernel(
    q, C, v, scores, h, state_weight, denominator,
    starts, lengths, T, chunks, R, skip, sq_t, sq_h, sv_t, sv_h, sh_t, sh_h, H,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr,
    BY: tl.constexpr, BJ: tl.constexpr, HAS_FIRST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """h of a block of rows and columns."""
    STRIPS: tl.constexpr = L // BM
    COLUMNS: tl.constexpr = (V + BY - 1) // BY
    i, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_chunk, i_row, i_v = skip + i // (STRIPS * COLUMNS), i // COLUMNS % STRIPS * BM, i % COLUMNS
    start, length = _span(i_chunk, T, chunks, starts, lengths, L, PACKED)
    rows = i_row + tl.arange(0, BM)
    scale = _of_rows(state_weight, i_h, start, rows, length, R, 0.0)
    den = _of_rows(denominator, i_h, start, rows, length, R, 1.0)
    scores = _chunk_scores(scores, i_chunk - skip, i_h, H, L, BS)
    _combine(
        i_row, i_v, i_h, start, length, i_chunk.to(tl.int64) * H + i_h,
        _stored(K, i_chunk, 0, chunks, HAS_FIRST, PACKED),
        q, C, v, scores, h, scale, None, None, None, None, den, R, H, sq_t, sq_h, sv_t, sv_h, sh_t, sh_h, None, None,
        K, V, L, BS, BM, BX, BY, BJ, False, False,
    )  # fmt: skip


@triton.jit
def _state_product(C, n, dC, dn, at, size, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr):
    """The inner product of a state and a gradient of it; `size` is K V, or 0 where C or dC is not in memory."""
    o_k, o = tl.arange(0, BK), tl.arange(0, BLOCK)
    product = tl.load(n + at * K + o_k, mask=o_k < K, other=0.0) * tl.load(dn + at * K + o_k, mask=o_k < K, other=0.0)
    products = tl.zeros([BLOCK], tl.float32)
    for i in range(0, K * V, BLOCK):
        xs = tl.load(C + at * K * V + i + o, mask=i + o < size, other=0.0).to(tl.float32)
        products += xs * tl.load(dC + at * K * V + i + o, mask=i + o < size, other=0.0).to(tl.float32)
    return tl.sum(product, 0) + tl.sum(products, 0)


@triton.jit(do_not_specialize=["T", "chunks", "R", "skip"])
def mlstm_bwd_combine_kernel(
    q, k, v, dh, C, n, dC, dn, scores, d_scores, weight, scale, decay, dC_weight, dn_weight,
    dq, dk, dv, d_decay, q_dots, k_dots,
    starts, lengths, T, chunks, R, skip, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h, sd_t, sd_h, H,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BXK: tl.constexpr,
    BXV: tl.constexpr, BYK: tl.constexpr, BYV: tl.constexpr, BJ: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dq, dk or dv of a block of rows and columns, or the gradient of the log of a chunk's decay. Programs for one
    chunk follow each other: what one has read from memory the others find in the L2 cache.

    C is the state before the chunk, dC the gradient of that after it; both enter the gradient of the decay.
    """
    STRIPS: tl.constexpr = L // BM
    V_COLUMNS: tl.constexpr = (V + BYV - 1) // BYV
    K_COLUMNS: tl.constexpr = (K + BYK - 1) // BYK
    ROLES: tl.constexpr = STRIPS * (V_COLUMNS + 2 * K_COLUMNS) + 1
    i, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_chunk, role = skip + i // ROLES, i % ROLES
    start, length = _span(i_chunk, T, chunks, starts, lengths, L, PACKED)
    at = i_chunk.to(tl.int64) * H + i_h
    if role < STRIPS * V_COLUMNS:
        i_row = role // V_COLUMNS * BM
        rows = i_row + tl.arange(0, BM)
        w = _of_rows(weight, i_h, start, rows, length, R, 0.0) * tl.load(scale + at).to(tl.float32)
        _combine(
            i_row, role % V_COLUMNS, i_h, start, length, at, _stored(K, i_chunk, chunks - 1, chunks, HAS_LAST, PACKED),
            k, dC, dh, _chunk_scores(scores, i_chunk - skip, i_h, H, L, BS), dv, w, None, None, None, None, None,
            R, H, sk_t, sk_h, sd_t, sd_h, H * V, V, None, None, K, V, L, BS, BM, BXK, BYV, BJ, False, True,
        )  # fmt: skip
    elif role < STRIPS * (V_COLUMNS + K_COLUMNS):
        part = role - STRIPS * V_COLUMNS
        i_row = part // K_COLUMNS * BM
        rows = i_row + tl.arange(0, BM)
        w = _of_rows(dC_weight, i_h, start, rows, length, R, 0.0)
        rank_rows = _of_rows(dn_weight, i_h, start, rows, length, R, 0.0)
        _combine(
            i_row, part % K_COLUMNS, i_h, start, length, at, _stored(V, i_chunk, 0, chunks, HAS_FIRST, PACKED),
            dh, C, k, _chunk_scores(d_scores, i_chunk - skip, i_h, H, L, BS), dq, w, rank_rows, n, q, q_dots, None,
            R, H, sd_t, sd_h, sk_t, sk_h, H * K, K, sq_t, sq_h, V, K, L, BS, BM, BXV, BYK, BJ, True, False,
        )  # fmt: skip
    elif role < ROLES - 1:
        part = role - STRIPS * (V_COLUMNS + K_COLUMNS)
        i_row = part // K_COLUMNS * BM
        rows = i_row + tl.arange(0, BM)
        w = _of_rows(weight, i_h, start, rows, length, R, 0.0) * tl.load(scale + at).to(tl.float32)
        _combine(
            i_row, part % K_COLUMNS, i_h, start, length, at, _stored(V, i_chunk, chunks - 1, chunks, HAS_LAST, PACKED),
            v, dC, q, _chunk_scores(d_scores, i_chunk - skip, i_h, H, L, BS), dk, w, w, dn, k, k_dots, None,
            R, H, sv_t, sv_h, sq_t, sq_h, H * K, K, sk_t, sk_h, V, K, L, BS, BM, BXV, BYK, BJ, True, True,
        )  # fmt: skip
    else:
        size = _stored(K * V, i_chunk, 0, chunks, HAS_FIRST, PACKED)
        size = _stored(size, i_chunk, chunks - 1, chunks, HAS_LAST, PACKED)
        product = _state_product(C, n, dC, dn, at, size, K, V, BLOCK, BK)
        tl.store(d_decay + at, product * tl.load(decay + at).to(tl.float32))


# gradients of gates


@triton.jit
def _dots(
    dots, i_chunk, i_h, starts, lengths, T, chunks, R, H, L: tl.constexpr, PARTS: tl.constexpr, PACKED: tl.constexpr
):
    """The sum of `dots` `[PARTS, H, R]` over a chunk."""
    start, length = _span(i_chunk, T, chunks, starts, lengths, L, PACKED)
    o_t = tl.arange(0, L)
    total = tl.zeros([L], tl.float32)
    for part in tl.static_range(PARTS):
        at = (tl.cast(R, tl.int64) * H) * part + i_h * R + start + o_t
        total += tl.load(dots + at, mask=o_t < length, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["T", "chunks", "R"])
def mlstm_bwd_stabiliser_kernel(
    m_from_state, total, top, m_before, d_decay, q_dots, k_dots, d_m_last, d_m_between, d_m_first,
    starts, lengths, T, chunks, R, first_chunk, H,
    L: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, BC: tl.constexpr,
    HAS_LAST: tl.constexpr, HAS_FIRST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gradient of m after each chunk: it goes to the last row, and on where that has it from the state.

    C and n hold their values times exp(-m): at both ends m also has the product of the state with its gradient, which
    is what the decay and the tokens of the chunk have of it.
    """
    i_n, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, end = _sequence(i_n, chunks, first_chunk, PACKED)
    carry = tl.full([], 0.0, tl.float32)
    if HAS_LAST:
        carry = tl.load(d_m_last + i_n * H + i_h)
    if end > first:
        carry -= tl.load(d_decay + (end - 1) * H + i_h)
        carry -= _dots(k_dots, end - 1, i_h, starts, lengths, T, chunks, R, H, L, PARTS, PACKED)
    o_c = tl.arange(0, BC)
    for c in range(0, end - first, BC):
        chunk = end - 1 - c - o_c
        valid = chunk >= first
        at = chunk * H + i_h
        own = tl.zeros([BC], tl.float32)
        for block in tl.static_range(BLOCKS):
            own += tl.load(m_from_state + at * BLOCKS + block, mask=valid, other=0.0)
        through = tl.load(total + at, mask=valid, other=0.0) + tl.load(m_before + at, mask=valid, other=0.0)
        reached = tl.load(top + at, mask=valid, other=0.0)
        keeps = tl.where(through.to(tl.float32) >= reached.to(tl.float32), 1.0, 0.0)
        keeps_all, own_all = tl.associative_scan((keeps, own), 0, _linear)
        before = keeps_all * carry + own_all
        if c == 0:
            tl.store(d_m_between + (end - 1) * H + i_h, carry)
        tl.store(d_m_between + at - H, before, mask=chunk - 1 >= first)
        carry = tl.sum(tl.where(o_c == tl.minimum(end - first - c, BC) - 1, before, 0.0), 0)
    if HAS_FIRST:
        if end > first:
            carry += tl.load(d_decay + first * H + i_h)
            carry += _dots(q_dots, first, i_h, starts, lengths, T, chunks, R, H, L, PARTS, PACKED)
        tl.store(d_m_first + i_n * H + i_h, carry)


@triton.jit(do_not_specialize=["T", "chunks", "R", *GATE_STRIDES], do_not_specialize_on_alignment=GATES)
def mlstm_bwd_gates_kernel(
    igate, fgate, log_f, log_f_low, peak, source, m_before, d_m, d_m_between, d_decay,
    col_sum, between, q_dots, k_dots, digate, dfgate,
    starts, lengths, T, chunks, R, si_t, si_h, sf_t, sf_h, cap, H,
    L: tl.constexpr, BS: tl.constexpr, PARTS: tl.constexpr,
    SIGMOID: tl.constexpr, CAPPED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradients of gates from sums of the gradients of all weights: each is the exponential of a sum of log gates."""
    i_chunk, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, length = _span(i_chunk, T, chunks, starts, lengths, L, PACKED)
    o_t = tl.arange(0, L)
    valid, past = o_t < length, (o_t < length) & (o_t > 0)
    tokens = i_h * R + start + o_t
    at = i_chunk.to(tl.int64) * H + i_h
    plane = tl.cast(R, tl.int64) * H
    # through the state to later chunks, and from earlier ones
    from_state, to_state = tl.zeros([L], tl.float32), tl.zeros([L], tl.float32)
    to_state_past = tl.zeros([L], tl.float64)
    for part in tl.static_range(PARTS):
        from_state += tl.load(q_dots + plane * part + tokens, mask=valid, other=0.0)
        to_state += tl.load(k_dots + plane * part + tokens, mask=valid, other=0.0)
        to_state_past += tl.load(k_dots + plane * part + tokens - 1, mask=past, other=0.0)
    dlogi = to_state
    dlogf = tl.load(d_decay + at) + tl.cumsum(to_state_past, 0)
    # within the chunk: earlier tokens in the gate's own block of rows, and in later blocks
    for block in tl.static_range(L // BS):
        dlogf += tl.load(between + plane * block + tokens, mask=valid & (o_t >= block * BS), other=0.0)
        seen = valid & (o_t < tl.where(length > block * BS, (block + 1) * BS, 0))
        dlogi += tl.load(col_sum + plane * block + tokens, mask=seen, other=0.0)
        sums_past = tl.load(col_sum + plane * block + tokens - 1, mask=seen & (o_t > 0), other=0.0)
        dlogf += tl.where(o_t < block * BS, tl.cumsum(sums_past, 0), 0.0)
    if not SIGMOID:
        # through stabilisers: each comes from the state before the chunk, or from one token
        dm = tl.load(d_m + tokens, mask=valid, other=0.0)
        dm += tl.where(o_t == length - 1, tl.load(d_m_between + at), 0.0)
        keeps = _keeps(log_f, log_f_low, peak, m_before, tokens, at, valid)
        from_state += tl.where(keeps, dm, 0.0)
        token = tl.load(source + tokens, mask=valid, other=-1)
        ends = token != tl.load(source + tokens + 1, mask=o_t + 1 < length, other=-1)
        # rows of one token follow each other, the first is its own
        _, of_token = tl.associative_scan((ends.to(tl.int32), tl.where(keeps, 0.0, dm)), 0, _segment, reverse=True)
        dlogi += tl.where(token == o_t, of_token, 0.0)
        dlogf += tl.where(token == o_t, 0.0, of_token)
    dlogf += tl.cumsum(from_state.to(tl.float64), 0, reverse=True)
    igates = tl.load(igate + start * si_t + i_h * si_h + o_t * si_t, mask=valid, other=0.0).to(tl.float64)
    fgates = tl.load(fgate + start * sf_t + i_h * sf_h + o_t * sf_t, mask=valid, other=0.0).to(tl.float64)
    dlogi = tl.where((igates == float("-inf")) & (fgates == float("-inf")), 0.0, dlogi)
    if CAPPED:
        igates, fgates = _tanh(igates / cap), _tanh(fgates / cap)
        dlogi *= 1 - igates * igates
        dlogf *= 1 - fgates * fgates
        igates, fgates = cap * igates, cap * fgates
    if SIGMOID:
        dlogi /= 1 + tl.exp(igates)
    dlogf /= 1 + tl.exp(fgates)
    out = (start + o_t) * H + i_h
    tl.store(digate + out, dlogi.to(digate.dtype.element_ty), mask=valid)
    tl.store(dfgate + out, dlogf.to(dfgate.dtype.element_ty), mask=valid)
