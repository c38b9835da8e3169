"""Triton kernels of the sLSTM over whole sequences; `slstm_triton` says how programs work together, and launches them.

Products accumulate in float32, in which everything else is computed too. Weights in float32 are for exactness:
products run without tensor cores, a few terms at a time, and all else is in float64 and rounded for what is stored.

Dims and letters as in `slstm_triton`. `i_` program or loop index, `o_` offsets, `in_` masks. Tiles of a program are
`[DS, BB]`, channels of all rows; products have the gates of channels, `[4 DS, DK]`, on the left.
"""

from .mlstm_triton_kernels import _log_sigmoid, _max, _tanh
from .slstm_torch import MAX_LOG_WEIGHT
from .triton_language import tl, triton


LARGEST = tl.constexpr(MAX_LOG_WEIGHT)
# What memory is filled with that programs exchange numbers through: all bits set, a NaN that none of them stores.
UNWRITTEN = tl.constexpr(-1)
SIZES = ["first", "rows", "T"]  # may have any value without another compilation


# helpers


@triton.jit
def _four(x, DS: tl.constexpr, BB: tl.constexpr):
    """The parts of `[4 DS, BB]` or `[4, DS, BB]`, each of a layout that gives every thread its own numbers."""
    low, high = tl.split(tl.permute(tl.reshape(x, [2, 2, DS, BB]), [1, 2, 3, 0]))
    first, second = tl.split(tl.permute(low, [1, 2, 0]))
    third, fourth = tl.split(tl.permute(high, [1, 2, 0]))
    return first, second, third, fourth


@triton.jit
def _stored(x, dtype: tl.constexpr):
    """x rounded to a dtype, never with all bits set."""
    return tl.where(x == x, x, float("nan")).to(dtype)


@triton.jit
def _store_four(x, o_d, i, f, z, o, inside, D: tl.constexpr):
    """Stores numbers of the four gates of a token, at x."""
    tl.store(x + o_d[:, None], i, mask=inside)
    tl.store(x + (D + o_d)[:, None], f, mask=inside)
    tl.store(x + (2 * D + o_d)[:, None], z, mask=inside)
    tl.store(x + (3 * D + o_d)[:, None], o, mask=inside)


@triton.jit
def _arrived(x, mask, other):
    """What other programs store in these places, as soon as all of it is there. The numbers tell by themselves, so
    that no order of stores matters; volatile loads are not served by a cache that other programs do not write to."""
    got = tl.load(x, mask=mask, other=other, volatile=True)
    while tl.max((got == UNWRITTEN).to(tl.int32)) > 0:
        got = tl.load(x, mask=mask, other=other, volatile=True)
    return got


@triton.jit
def _sequences(o_b, bounds, rows, T, PACKED: tl.constexpr):
    """First token and length of some sequences, and the largest length."""
    if PACKED:
        start = tl.load(bounds + o_b, mask=o_b < rows, other=0)
        length = (tl.load(bounds + o_b + 1, mask=o_b < rows, other=0) - start).to(tl.int32)
        steps = tl.max(length, 0)
    else:
        start, length = o_b.to(tl.int64) * T, tl.where(o_b < rows, T, 0)
        steps = T
    return start, length, steps


# kernels


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["mask"])
def slstm_fwd_kernel(
    gates, R, h_first, c_first, n_first, m_first, mask, bounds, y, h_last, c_last, n_last, m_last,
    pre, before, h_before, first, rows, T, H,
    D: tl.constexpr, DK: tl.constexpr, DS: tl.constexpr, BB: tl.constexpr,
    KEEP: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """y, the final state and, if kept, for each step the pre-activations (`pre`) and the state that it starts from."""
    PARTS: tl.constexpr = (D + DS - 1) // DS
    dtype: tl.constexpr = y.dtype.element_ty
    BITS: tl.constexpr = tl.int32 if dtype == tl.float32 else tl.int16
    factor: tl.constexpr = R.dtype.element_ty  # of products
    EXACT: tl.constexpr = factor == tl.float32
    real_dtype: tl.constexpr = tl.float64 if EXACT else tl.float32
    SUMMED: tl.constexpr = min(DK, 32)  # terms of a sum in float32
    SUMS: tl.constexpr = DK // SUMMED
    i_part, i_group = tl.program_id(0) % PARTS, first + tl.program_id(0) // PARTS
    i_h = i_group % H
    o_d, o_k, o_b = i_part * DS + tl.arange(0, DS), tl.arange(0, DK), i_group // H * BB + tl.arange(0, BB)
    o_4d = i_part * DS + tl.arange(0, 4 * DS) % DS
    in_4d = o_4d < D
    o_4d += tl.arange(0, 4 * DS) // DS * D
    in_d, in_k, in_b = (o_d < D)[:, None], (o_k < D)[:, None], (o_b < rows)[None, :]
    head = i_h.to(tl.int64) * 4 * D * D
    if EXACT:
        o_s = (tl.arange(0, SUMS) * SUMMED)[:, None, None] + tl.arange(0, SUMMED)[None, None, :]
        weights = tl.load(R + head + o_4d[None, :, None] * D + o_s, mask=in_4d[None, :, None] & (o_s < D), other=0.0)
    else:
        in_R = in_4d[:, None] & (o_k < D)[None, :]
        weights = tl.load(R + head + o_4d[:, None] * D + o_k[None, :], mask=in_R, other=0.0)
    at = (o_b.to(tl.int64) * H + i_h)[None, :] * D
    h = tl.load(h_first + at + o_d[:, None], mask=in_d & in_b, other=0.0).to(real_dtype)
    c = tl.load(c_first + at + o_d[:, None], mask=in_d & in_b, other=0.0).to(real_dtype)
    n = tl.load(n_first + at + o_d[:, None], mask=in_d & in_b, other=0.0).to(real_dtype)
    m = tl.load(m_first + at + o_d[:, None], mask=in_d & in_b, other=0.0).to(real_dtype)
    h_whole = _stored(tl.load(h_first + at + o_k[:, None], mask=in_k & in_b, other=0.0), dtype)
    h_in, h_first_bits = h_whole.to(factor), h_whole.to(BITS, bitcast=True)
    start, length, steps = _sequences(o_b, bounds, rows, T, PACKED)
    token = (start * H + i_h)[None, :]  # of the arrays `[tokens, H, ...]`
    x = tl.load(gates + token * (4 * D) + o_4d[:, None], mask=in_4d[:, None] & (length > 0)[None, :], other=0.0)
    for t in range(steps):
        if PARTS > 1:
            came_before = in_k & (t - 1 < tl.where(t > 0, length, -1))[None, :]
            at_h = y.to(tl.pointer_type(BITS)) + (token - H) * D + o_k[:, None]
            h_in = _arrived(at_h, came_before, h_first_bits).to(dtype, bitcast=True).to(factor)
        if EXACT:
            products = tl.dot(weights, tl.reshape(h_in, [SUMS, SUMMED, BB]), input_precision="ieee")
            mixed = tl.sum(products.to(real_dtype), 0)
        else:
            mixed = tl.dot(weights, h_in)
        i, f, z, o = _four(mixed + x.to(real_dtype), DS, BB)
        comes = in_4d[:, None] & (t + 1 < length)[None, :]
        x = tl.load(gates + (token + H) * (4 * D) + o_4d[:, None], mask=comes, other=0.0)
        log_f = _log_sigmoid(f) + m
        # an empty state weighs nothing, and its m must not push the first input out of range
        m_new = tl.where(n == 0, i, _max(i, log_f))
        decay, enter = tl.exp(tl.minimum(log_f - m_new, LARGEST)), tl.exp(i - m_new)
        c_new, n_new = decay * c + enter * _tanh(z), decay * n + enter
        h_new = c_new / (n_new * (1 + tl.exp(-o)))
        inside = in_d & (t < length)[None, :]
        real = inside
        if HAS_MASK:
            real &= (tl.load(mask + start + t, mask=t < length, other=0) != 0)[None, :]
        h_new = tl.where(real, h_new, h)
        h_out = _stored(h_new, dtype)
        tl.store(y + token * D + o_d[:, None], h_out, mask=inside)
        if PARTS == 1:
            h_in = h_out.to(factor)
        if KEEP:
            _store_four(pre + token * (4 * D), o_d, i, f, z, o, inside, D)
            tl.store(before + token * (3 * D) + o_d[:, None], c, mask=inside)
            tl.store(before + token * (3 * D) + (D + o_d)[:, None], n, mask=inside)
            tl.store(before + token * (3 * D) + (2 * D + o_d)[:, None], m, mask=inside)
            tl.store(h_before + token * D + o_d[:, None], h.to(dtype).to(factor), mask=inside)
        h, c, n, m = h_new, tl.where(real, c_new, c), tl.where(real, n_new, n), tl.where(real, m_new, m)
        token += H
    tl.store(h_last + at + o_d[:, None], h, mask=in_d & in_b)
    tl.store(c_last + at + o_d[:, None], c, mask=in_d & in_b)
    tl.store(n_last + at + o_d[:, None], n, mask=in_d & in_b)
    tl.store(m_last + at + o_d[:, None], m, mask=in_d & in_b)


@triton.jit
def _kept(dy, pre, before, token, o_d, inside, D: tl.constexpr, real_dtype: tl.constexpr):
    """What a step of the backward pass reads: dy, pre-activations i f z o, and c, n, m before the step."""
    return (
        tl.load(dy + token * D + o_d[:, None], mask=inside, other=0.0).to(real_dtype),
        tl.load(pre + token * (4 * D) + o_d[:, None], mask=inside, other=0.0).to(real_dtype),
        tl.load(pre + token * (4 * D) + (D + o_d)[:, None], mask=inside, other=0.0).to(real_dtype),
        tl.load(pre + token * (4 * D) + (2 * D + o_d)[:, None], mask=inside, other=0.0).to(real_dtype),
        tl.load(pre + token * (4 * D) + (3 * D + o_d)[:, None], mask=inside, other=0.0).to(real_dtype),
        tl.load(before + token * (3 * D) + o_d[:, None], mask=inside, other=0.0).to(real_dtype),
        tl.load(before + token * (3 * D) + (D + o_d)[:, None], mask=inside, other=1.0).to(real_dtype),
        tl.load(before + token * (3 * D) + (2 * D + o_d)[:, None], mask=inside, other=0.0).to(real_dtype),
    )


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["mask"])
def slstm_bwd_kernel(
    dy, dh_last, dc_last, dn_last, dm_last, R, c_last, n_last, m_last, mask, bounds, pre, before,
    d_gates, exchanged, dh_first, dc_first, dn_first, dm_first, first, rows, T, H,
    D: tl.constexpr, DK: tl.constexpr, DS: tl.constexpr, BB: tl.constexpr,
    HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradients of gates and of the initial state, from the last step to the first. h does not depend on the
    stabiliser, so m carries a gradient only from a loss on the final state, to the gate that set it. `exchanged` has
    gradients of gates as they are multiplied: `d_gates`, unless that has another dtype."""
    PARTS: tl.constexpr = (D + DS - 1) // DS
    dtype: tl.constexpr = d_gates.dtype.element_ty
    factor: tl.constexpr = R.dtype.element_ty  # of products
    BITS: tl.constexpr = tl.int32 if factor == tl.float32 else tl.int16
    EXACT: tl.constexpr = factor == tl.float32
    real_dtype: tl.constexpr = tl.float64 if EXACT else tl.float32
    SUMMED: tl.constexpr = min(DK, 32)  # terms of a sum in float32
    SUMS: tl.constexpr = DK // SUMMED
    i_part, i_group = tl.program_id(0) % PARTS, first + tl.program_id(0) // PARTS
    i_h = i_group % H
    o_d, o_k, o_b = i_part * DS + tl.arange(0, DS), tl.arange(0, DK), i_group // H * BB + tl.arange(0, BB)
    o_4 = tl.arange(0, 4)[:, None, None]
    in_d, in_k, in_b = (o_d < D)[:, None], (o_k < D)[None, :, None], (o_b < rows)[None, :]
    head = i_h.to(tl.int64) * 4 * D * D
    if EXACT:
        o_s = tl.arange(0, 4 * SUMS)[:, None, None]
        o_s, o_g = o_s % SUMS * SUMMED + tl.arange(0, SUMMED)[None, None, :], o_s // SUMS * D
        weights = tl.load(R + head + (o_g + o_s) * D + o_d[None, :, None], mask=in_d[None, :, :] & (o_s < D), other=0.0)
    else:
        in_R = in_d[None, :, :] & (o_k < D)[None, None, :]
        weights = tl.load(R + head + (o_4 * D + o_k[None, None, :]) * D + o_d[None, :, None], mask=in_R, other=0.0)
    at = (o_b.to(tl.int64) * H + i_h)[None, :] * D + o_d[:, None]
    dh = tl.load(dh_last + at, mask=in_d & in_b, other=0.0).to(real_dtype)
    dc = tl.load(dc_last + at, mask=in_d & in_b, other=0.0).to(real_dtype)
    dn = tl.load(dn_last + at, mask=in_d & in_b, other=0.0).to(real_dtype)
    c = tl.load(c_last + at, mask=in_d & in_b, other=0.0).to(real_dtype)
    n = tl.load(n_last + at, mask=in_d & in_b, other=1.0).to(real_dtype)
    m = tl.load(m_last + at, mask=in_d & in_b, other=0.0).to(real_dtype)
    dm = tl.load(dm_last + at, mask=in_d & in_b, other=0.0) - dc * c - dn * n
    start, length, steps = _sequences(o_b, bounds, rows, T, PACKED)
    d_in = tl.zeros([4, DK, BB], factor)
    token = ((start + steps - 1) * H + i_h)[None, :]
    comes = in_d & (steps - 1 < tl.where(steps > 0, length, -1))[None, :]
    dy_next, i_next, f_next, z_next, o_next, c_next, n_next, m_next = _kept(
        dy, pre, before, token, o_d, comes, D, real_dtype
    )
    for back in range(steps + 1):
        t = steps - 1 - back  # -1 at last, for the gradient of the initial h
        dy_t, i, f, z, o, c_old, n_old, m_old = dy_next, i_next, f_next, z_next, o_next, c_next, n_next, m_next
        comes = in_d & (t - 1 < tl.where(t > 0, length, t - 1))[None, :]
        dy_next, i_next, f_next, z_next, o_next, c_next, n_next, m_next = _kept(
            dy, pre, before, token - H, o_d, comes, D, real_dtype
        )
        # what the step multiplies gradients with
        log_f = _log_sigmoid(f) + m_old
        by_state = (log_f >= i) & (n_old != 0)
        # of a state that is not empty at most 1, although m was rounded where it was kept
        largest = tl.where(n_old == 0, LARGEST, 0.0)
        decay, enter = tl.exp(tl.minimum(log_f - m, largest)), tl.exp(i - m)
        d_log_f = 1 / (1 + tl.exp(f))
        z, o = _tanh(z), 1 / (1 + tl.exp(-o))
        n_after = tl.where(n == 0, 1.0, n)  # zero before the first step, where nothing is left to do
        h_to_c, ratio = o / n_after, c / n_after
        alive = t < tl.where(t >= 0, length, t)
        inside = in_d & alive[None, :]
        real = inside
        if HAS_MASK:
            real &= (tl.load(mask + start + t, mask=alive, other=0) != 0)[None, :]
        if PARTS > 1:
            came_after = in_k & (t + 1 < length)[None, None, :]
            at_d = (
                exchanged.to(tl.pointer_type(BITS)) + ((token + H) * (4 * D))[None, :, :] + o_4 * D + o_k[None, :, None]
            )
            d_in = _arrived(at_d, came_after, 0).to(factor, bitcast=True)
        if EXACT:
            products = tl.dot(weights, tl.reshape(d_in, [4 * SUMS, SUMMED, BB]), input_precision="ieee")
            dh += tl.sum(products.to(real_dtype), 0)
        else:
            into_i, into_f, into_z, into_o = _four(tl.dot(weights, d_in), DS, BB)
            dh += (into_i + into_f) + (into_z + into_o)
        dh += dy_t
        dc_new = dc + dh * h_to_c
        dn_new = dn - dh * h_to_c * ratio
        d_i = enter * (z * dc_new + dn_new) + tl.where(by_state, 0.0, dm)
        d_f = decay * d_log_f * (c_old * dc_new + n_old * dn_new) + tl.where(by_state, dm * d_log_f, 0.0)
        d_z = enter * (1 - z * z) * dc_new
        d_o = o * (1 - o) * ratio * dh
        d_i, d_f = _stored(tl.where(real, d_i, 0.0), dtype), _stored(tl.where(real, d_f, 0.0), dtype)
        d_z, d_o = _stored(tl.where(real, d_z, 0.0), dtype), _stored(tl.where(real, d_o, 0.0), dtype)
        g_i, g_f, g_z, g_o = d_i.to(factor), d_f.to(factor), d_z.to(factor), d_o.to(factor)
        _store_four(exchanged + token * (4 * D), o_d, g_i, g_f, g_z, g_o, inside, D)
        if factor != dtype:
            _store_four(d_gates + token * (4 * D), o_d, d_i, d_f, d_z, d_o, inside, D)
        if PARTS == 1:
            joined = tl.join(tl.join(g_i, g_z), tl.join(g_f, g_o))
            d_in = tl.permute(tl.reshape(joined, [DS, BB, 4]), [2, 0, 1])
        dh = tl.where(real, 0.0, dh)
        dc, dn = tl.where(real, dc_new * decay, dc), tl.where(real, dn_new * decay, dn)
        dm = tl.where(real & ~by_state, 0.0, dm)
        c, n, m = tl.where(inside, c_old, c), tl.where(inside, n_old, n), tl.where(inside, m_old, m)
        token -= H
    tl.store(dh_first + at, dh, mask=in_d & in_b)
    tl.store(dc_first + at, dc, mask=in_d & in_b)
    tl.store(dn_first + at, dn, mask=in_d & in_b)
    tl.store(dm_first + at, dm + dc * c + dn * n, mask=in_d & in_b)
