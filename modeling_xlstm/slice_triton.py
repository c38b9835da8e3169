"""What a slice of a text adds to the state of an mLSTM, in Triton: sums of weighted tokens, and their gradients.

A GPU has to multiply as much here as half precision lets it, but with weights and gradients of states in float32. So
what is in float32 is a sum of two bfloat16 numbers, which have 16 bits of it, wherever the other factor is bfloat16:
two products on tensor cores. Other dtypes are multiplied in float32, float16 too, as weights are less than it can hold.
Results have the same bits whenever they are computed: what programs sum up is added in a fixed order.

Dims: `B` batch `T` time `H` heads `K` query and key dim `V` value dim `S` segments `X`, `Y` those summed over and not.
"""

import torch
from torch import Tensor

from .custom_op import op
from .triton_language import blocks_of, power_of_2, shared_memory, tl, triton


# K, V (backward: tokens, Y), what is summed over in a block, warps, and blocks on their way at once
FORWARD, BACKWARD = (64, 256, 64, 4, 2), (128, 128, 32, 4, 4)  # picked on an H100
FORWARD_FLOAT32, BACKWARD_FLOAT32 = (64, 64, 32, 4, 2), (64, 64, 32, 4, 2)
PROGRAMS = 264  # that keep an H100 busy
SEGMENT = 4096  # tokens that are summed up at most: tensor cores do not round what they add


# kernels


@triton.jit
def _low(x, high):
    """What a bfloat16 leaves of float32 x, which it is the nearest of."""
    return (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit(do_not_specialize=["T", "tokens"])
def slice_fwd_kernel(
    k, v, w, C, n, T, tokens, sk_b, sk_t, sk_h, sv_b, sv_t, sv_h, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A block of C, and of n, of a segment of `tokens`: C `[S, B, H, K, V]`, n `[S, B, H, K]`."""
    KB: tl.constexpr = (K + BK - 1) // BK
    VB: tl.constexpr = (V + BV - 1) // BV
    i, i_s, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(0).to(tl.int64) // (KB * VB)
    i_k, i_v = i // VB % KB, i % VB
    o_k, o_v, o_t = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    in_k, in_v = o_k < K, o_v < V
    k += i_bh // H * sk_b + i_bh % H * sk_h
    v += i_bh // H * sv_b + i_bh % H * sv_h
    w += i_bh * T
    start = i_s * tokens
    C_sum, n_sum = tl.zeros([BK, BV], tl.float32), tl.zeros([BK], tl.float32)
    for t in tl.range(start, tl.minimum(start + tokens, T), BT, num_stages=STAGES):
        in_t = t + o_t < T
        row = tl.cast(t, tl.int64)
        b_k = tl.load(
            k + row * sk_t + (o_k[:, None] + o_t[None, :] * sk_t), mask=in_k[:, None] & in_t[None, :], other=0.0
        )
        b_v = tl.load(
            v + row * sv_t + (o_t[:, None] * sv_t + o_v[None, :]), mask=in_t[:, None] & in_v[None, :], other=0.0
        )
        weighted = b_k.to(tl.float32) * tl.load(w + t + o_t, mask=in_t, other=0.0)[None, :]
        n_sum += tl.sum(weighted, 1)
        if SPLIT:
            high = weighted.to(tl.bfloat16)
            C_sum = tl.dot(high, b_v, C_sum)
            C_sum = tl.dot(_low(weighted, high), b_v, C_sum)
        else:
            C_sum = tl.dot(weighted, b_v.to(tl.float32), C_sum, input_precision="ieee")
    at = (i_s.to(tl.int64) * (tl.num_programs(0) // (KB * VB)) + i_bh) * K
    tl.store(C + at * V + (o_k[:, None] * V + o_v[None, :]), C_sum, mask=in_k[:, None] & in_v[None, :])
    if i_v == 0:
        tl.store(n + at + o_k, n_sum, mask=in_k)


@triton.jit
def _finish(acc, o_t, o_y, in_t, weights, out, bias, factor, sf_t, H, Y: tl.constexpr):
    """Stores some columns of `weights (acc + bias)`, and returns for each token what is weighted times the factor."""
    inside = in_t[:, None] & (o_y < Y)[None, :]
    dot = tl.zeros_like(weights)
    if factor is not None:
        acc += tl.load(bias + o_y, mask=o_y < Y, other=0.0)[None, :]
        factors = tl.load(factor + (o_t[:, None] * sf_t + o_y[None, :]), mask=inside, other=0.0)
        dot = tl.sum(acc * factors.to(tl.float32), 1)
    acc *= weights[:, None]
    tl.store(out + (o_t[:, None] * (H * Y) + o_y[None, :]), acc.to(out.dtype.element_ty), mask=inside)
    return dot


@triton.jit(do_not_specialize=["T"])
def slice_bwd_kernel(
    x, Z, Z_low, w, out, bias, factor, dots, T, sx_b, sx_t, sx_h, sf_b, sf_t, sf_h, H,
    X: tl.constexpr, Y: tl.constexpr, BT: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr,
    TRANSPOSED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`out = w (x Z + bias)` for a block of tokens: x `[B, T, H, X]`, Z `[B, H, X, Y]`, or `[B, H, Y, X]` transposed;
    with `Z_low` their sum. With `dots` `[., B, H, T]` what is weighted there times `factor` `[B, T, H, Y]`."""
    YB: tl.constexpr = (Y + BY - 1) // BY
    SZ_X: tl.constexpr = 1 if TRANSPOSED else Y
    SZ_Y: tl.constexpr = X if TRANSPOSED else 1
    i, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_y, t = i % YB, i // YB * BT
    i_b, i_h, row = i_bh // H, i_bh % H, tl.cast(t, tl.int64)
    o_t, o_x, o_y = tl.arange(0, BT), tl.arange(0, BX), i_y * BY + tl.arange(0, BY)
    in_t, in_y = t + o_t < T, o_y < Y
    x += i_b * sx_b + row * sx_t + i_h * sx_h
    Z += i_bh * X * Y
    if Z_low is not None:
        Z_low += i_bh * X * Y
    acc = tl.zeros([BT, BY], tl.float32)
    for i_x in tl.range(0, X, BX, num_stages=STAGES):
        in_x = i_x + o_x < X
        in_z = in_x[:, None] & in_y[None, :]
        at = (i_x + o_x)[:, None] * SZ_X + o_y[None, :] * SZ_Y
        b_x = tl.load(x + (o_t[:, None] * sx_t + (i_x + o_x)[None, :]), mask=in_t[:, None] & in_x[None, :], other=0.0)
        b_Z = tl.load(Z + at, mask=in_z, other=0.0)
        if Z_low is not None:
            acc = tl.dot(b_x, tl.load(Z_low + at, mask=in_z, other=0.0), acc)
            acc = tl.dot(b_x, b_Z, acc)
        else:
            acc = tl.dot(b_x.to(tl.float32), b_Z, acc, input_precision="ieee")
    weights = tl.load(w + i_bh * T + t + o_t, mask=in_t, other=0.0)
    out += ((i_b * T + row) * H + i_h) * Y
    if dots is not None:
        bias += i_bh * Y
        factor += i_b * sf_b + row * sf_t + i_h * sf_h
    # in two halves, as threads have not registers for as many factors as there are sums
    left, right = tl.split(tl.permute(tl.reshape(acc, [BT, 2, BY // 2]), (0, 2, 1)))
    o_y = i_y * BY + tl.arange(0, BY // 2)
    dot = _finish(left, o_t, o_y, in_t, weights, out, bias, factor, sf_t, H, Y)
    dot += _finish(right, o_t, o_y + BY // 2, in_t, weights, out, bias, factor, sf_t, H, Y)
    if dots is not None:
        tl.store(dots + (i_y * tl.num_programs(1) + i_bh) * T + t + o_t, dot, mask=in_t)


# launchers


def _rows(x: Tensor) -> Tensor:
    """`[B, T, H, .]` with the last axis contiguous: x itself where it is so."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _block(size: int, most: int) -> int:
    return min(most, max(16, power_of_2(size)))


def _memory(device: torch.device) -> int:
    """Bytes for blocks."""
    return (shared_memory(device) or 1 << 18) - 4096


@op("slice_sum")
def slice_sum(k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """C `[B, H, K, V]`, the sum over t of `w k v^T`, and n `[B, H, K]`, that of `w k`, in float32. Without gradients.

    Args:
        k, v: `[B, T, H, K]` and `[B, T, H, V]`, float16, bfloat16 or float32.
        w: `[B, H, T]`, float32.
    """
    k, v, w = _rows(k), _rows(v), w.contiguous()
    (B, T, H, K), V = k.shape, v.shape[-1]
    split = k.dtype == v.dtype == torch.bfloat16
    most_K, most_V, BT, warps, stages = FORWARD if split else FORWARD_FLOAT32
    BK, BV, memory = _block(K, most_K), _block(V, most_V), _memory(k.device)
    if memory < 6 * BK * BV:  # before Hopper, whose products need fewer registers: C is stored by way of this memory
        BV //= 2
    programs = blocks_of(K, BK) * blocks_of(V, BV) * B * H
    S = max(blocks_of(T, SEGMENT), min(PROGRAMS // programs, blocks_of(T, 4 * BT)), 1)
    tokens = blocks_of(blocks_of(T, S), BT) * BT
    S = blocks_of(T, tokens)
    C, n = w.new_empty(S, B, H, K, V), w.new_empty(S, B, H, K)
    with torch.cuda.device_of(k):
        slice_fwd_kernel[(programs, S)](
            k, v, w, C, n, T, tokens, *k.stride()[:3], *v.stride()[:3], H,
            K=K, V=V, BK=BK, BV=BV, BT=BT, SPLIT=split,
            STAGES=max(1, min(stages, memory // ((BK + BV) * BT * k.element_size()))), num_warps=warps,
        )  # fmt: skip
    return (C.sum(0), n.sum(0)) if S > 1 else (C[0], n[0])


@slice_sum.register_fake
def _(k, v, w):
    B, _, H, K = k.shape
    return w.new_empty(B, H, K, v.shape[-1]), w.new_empty(B, H, K)


@op("slice_sum_backward")
def slice_sum_backward(dC: Tensor, dn: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, v and w."""
    k, v, w, dC, dn = _rows(k), _rows(v), w.contiguous(), dC.contiguous(), dn.contiguous()
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    low = None
    if k.dtype == v.dtype == torch.bfloat16:
        high = dC.to(torch.bfloat16)
        dC, low = high, (dC - high).to(torch.bfloat16)
    dw = _backward(v, dC, low, w, dk, bias=dn, factor=k)
    _backward(k, dC, low, w, dv)
    return dk, dv, dw


def _backward(
    x: Tensor, Z: Tensor, low: Tensor | None, w: Tensor, out: Tensor,
    *, bias: Tensor | None = None, factor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launches `slice_bwd_kernel`, with Z transposed where there is a factor, and returns its dots."""
    (B, T, H, X), Y = x.shape, out.shape[-1]
    BT, most_Y, most_X, warps, stages = BACKWARD_FLOAT32 if low is None else BACKWARD
    BY, BX = _block(Y, most_Y), _block(X, most_X)
    parts = blocks_of(Y, BY)
    dots = None if factor is None else w.new_empty(parts, B, H, T)
    stage = (BT + BY * (1 if low is None else 2)) * BX * Z.element_size()  # bytes
    with torch.cuda.device_of(x):
        slice_bwd_kernel[(blocks_of(T, BT) * parts, B * H)](
            x, Z, low, w, out, bias, factor, dots, T, *x.stride()[:3], *(x if factor is None else factor).stride()[:3],
            H, X=X, Y=Y, BT=BT, BY=BY, BX=BX, TRANSPOSED=factor is not None,
            STAGES=max(1, min(stages, _memory(x.device) // stage)), num_warps=warps,
        )  # fmt: skip
    if dots is None:
        return w
    return dots.sum(0) if parts > 1 else dots[0]


@slice_sum_backward.register_fake
def _(dC, dn, k, v, w):
    return k.new_empty(k.shape), v.new_empty(v.shape), w.new_empty(w.shape)
