"""A depthwise causal convolution over time and SiLU in Triton, as one op with its gradients.

Both directions are bound by memory, so each is one kernel that reads and writes every tensor once, computes in float32
and rounds once. A program takes tiles of positions and of one warp's channels. A thread holds all rows of a tile, of
its own channels, in registers: a row is loaded once for all taps, and all rows before anything is stored. Only those
that two tiles share are read twice, from a cache.

The backward pass recomputes what enters SiLU. Its programs are of a fixed number, each with its own sums for the
gradients of weight and bias: always added in the same order, without atomics.

Dims: `B` batch `S` positions of inputs `T` of outputs `C` channels `J` taps `P` programs of a block of channels
`BT` positions of a tile `BC` channels of a block.
"""

import torch
from torch import Tensor

from .custom_op import op
from .triton_language import blocks_of, processors, rows_of, tl, triton


# How work is cut, chosen by registers and bytes in flight on an H100. A program is one warp.
POSITIONS = 16  # of a tile
CHANNELS = {"forward": {2: 128, 4: 64}, "backward": {2: 64, 4: 64}}  # of a program, by the bytes of one
REGISTERS = {"forward": 128, "backward": 168}  # of a thread at most, so that more programs fit
# Programs for each multiprocessor: as many as fit, and in the forward pass more, so that it is busy to the end.
PROGRAMS = {"forward": 64, "backward": 12}
# may have any value without another compilation
SIZES = "S T tiles padding sb st".split()


# helpers


@triton.jit
def _taps(weight, bias, channels, in_c, J: tl.constexpr):
    """Weights of some channels for each tap, and their bias."""
    w = tl.tuple(())
    for j in tl.static_range(J):
        w += (tl.load(weight + channels * J + j, mask=in_c, other=0.0).to(tl.float32),)
    return w, tl.load(bias + channels, mask=in_c, other=0.0).to(tl.float32)


@triton.jit
def _tile(i, size, BT: tl.constexpr):
    """Sequence and first position of a tile of sequences of some size."""
    tiles = tl.cdiv(size, BT)
    return tl.cast(i // tiles, tl.int64), i % tiles * BT


@triton.jit
def _inside(position, size, in_c):
    """Which channels there are at a position in a sequence of some size."""
    position = tl.broadcast_to(position, in_c.shape)  # here, as the interpreter extends numbers, but no masks
    return in_c & (position >= 0) & (position < size)


@triton.jit
def _rows(start, first, size, stride, in_c, N: tl.constexpr):
    """N rows of a sequence of some size from its position `first`, 0 outside."""
    start += tl.cast(first, tl.int64) * stride
    rows = tl.tuple(())
    for n in tl.static_range(N):
        rows += (tl.load(start + n * stride, mask=_inside(first + n, size, in_c), other=0.0),)
    return rows


@triton.jit
def _convolve(x, n, w, b, J: tl.constexpr):
    """What the taps make of the rows from the n-th."""
    for j in tl.static_range(J):
        b += w[j] * x[n + j].to(tl.float32)
    return b


# kernels


@triton.jit(do_not_specialize=SIZES)
def causal_conv_fwd_kernel(
    x, weight, bias, y, S, T, padding, tiles, sb, st, C,
    J: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """y of every P-th tile of outputs of a block of channels."""
    i_p, P = tl.program_id(1), tl.num_programs(1)
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = channels < C
    w, b = _taps(weight, bias, channels, in_c, J)
    for i in tl.range(i_p, tiles, P):
        i_b, t = _tile(i, T, BT)
        b_x = _rows(x + i_b * sb * UNIT + channels, t - padding, S, st * UNIT, in_c, BT + J - 1)
        out = y + (i_b * T + t) * C + channels
        for n in tl.static_range(BT):
            u = _convolve(b_x, n, w, b, J)
            tl.store(out + n * C, (u * tl.sigmoid(u)).to(y.dtype.element_ty), mask=_inside(t + n, T, in_c))


@triton.jit(do_not_specialize=SIZES)
def causal_conv_bwd_kernel(
    dy, x, weight, bias, dx, dweight, dbias, S, T, padding, sdy, tiles, sb, st, C,
    J: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dx of every P-th tile of inputs of a block of channels, and the sums `dweight` `[P, C, J]` and `dbias` `[P, C]`
    over the outputs whose last tap is in these tiles."""
    i_p, P = tl.program_id(1), tl.num_programs(1)
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = channels < C
    w, b = _taps(weight, bias, channels, in_c, J)
    db, dw, w_back = tl.zeros([BC], tl.float32), tl.tuple(()), tl.tuple(())
    for j in tl.static_range(J):
        dw += (tl.zeros([BC], tl.float32),)
        w_back += (w[J - 1 - j],)
    for i in tl.range(i_p, tiles, P):
        i_b, s = _tile(i, S, BT)
        t = s + padding - (J - 1)  # the output whose last tap is at s
        b_x = _rows(x + i_b * sb * UNIT + channels, s - (J - 1), S, st * UNIT, in_c, BT + 2 * (J - 1))
        b_dy = _rows(dy + i_b * T * sdy + channels, t, T, sdy, in_c, BT + J - 1)
        out = dx + (i_b * S + s) * C + channels
        du = tl.tuple(())
        for n in tl.static_range(BT + J - 1):
            u = _convolve(b_x, n, w, b, J)
            a = tl.sigmoid(u)
            d = b_dy[n].to(tl.float32) * a * (1 + u * (1 - a))
            du += (d,)
            if n >= J - 1:
                d = _convolve(du, n - (J - 1), w_back, tl.zeros_like(b), J)
                inside = _inside(s + n - (J - 1), S, in_c)
                tl.store(out + (n - (J - 1)) * C, d.to(dx.dtype.element_ty), mask=inside)
        # of a tile before they are added to those of others, which is more exact
        db_tile, sums = tl.zeros_like(db), tl.tuple(())
        for n in tl.static_range(BT):
            db_tile += du[n]
        for j in tl.static_range(J):
            dw_tile = tl.zeros_like(db)
            for n in tl.static_range(BT):
                dw_tile += du[n] * b_x[n + j].to(tl.float32)
            sums += (dw[j] + dw_tile,)
        db += db_tile
        dw = sums
    tl.store(dbias + i_p * C + channels, db, mask=in_c)
    for j in tl.static_range(J):
        tl.store(dweight + (i_p * C + channels) * J + j, dw[j], mask=in_c)


# launchers


def _checked(x: Tensor, weight: Tensor, padding: int) -> tuple[Tensor, int]:
    """x with its last axis contiguous, and T."""
    S, J = x.shape[1], weight.shape[1]
    if not 0 <= padding < J:
        raise ValueError(f"padding must be from 0 to {J - 1}, one less than the taps of weight, got {padding}.")
    if S + padding < J:
        raise ValueError(
            f"x must have at least {J - padding} positions for {J} taps and a padding of {padding}, got {S}."
        )
    return x if x.stride(-1) == 1 else x.contiguous(), S + padding - (J - 1)


def _cut(direction: str, x: Tensor, weight: Tensor, length: int) -> tuple[tuple[int, int], dict[str, int]]:
    """For tiles of sequences of some length: blocks of channels and programs of each, and arguments of a kernel."""
    B, _, C = x.shape
    BC, tiles = CHANNELS[direction][x.itemsize], B * blocks_of(length, POSITIONS)
    blocks = blocks_of(C, BC)
    programs = PROGRAMS[direction] * max(1, processors(x.device)) // blocks
    unit = 16 if x.stride(0) % 16 == x.stride(1) % 16 == 0 else 1  # of strides, for wide loads
    return (blocks, max(1, min(tiles, programs))), {
        "tiles": tiles, "sb": x.stride(0) // unit, "st": x.stride(1) // unit, "UNIT": unit, "C": C,
        "J": weight.shape[1], "BT": POSITIONS, "BC": BC, "num_warps": 1, "maxnreg": REGISTERS[direction],
    }  # fmt: skip


@op("causal_conv")
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """`y[:, t] = silu(bias + sum_j weight[:, j] * x[:, t - padding + j])`, x being 0 before its first position.

    Args:
        x: `[B, S, C]`, float16, bfloat16 or float32; rows whose last axis is contiguous are read where they are.
        weight, bias: `[C, J]` and `[C]`, any floating dtype but float64.
        padding: How many zeros come before x: J - 1 for a text from its start, 0 where x begins with J - 1 inputs of
            the past. At most J - 1.

    Returns:
        y `[B, S + padding - (J - 1), C]` in the dtype of x, computed in float32.

    Raises:
        ValueError: for another padding, and where no output is left.
    """
    B, S, C = x.shape
    x, T = _checked(x, weight, padding)
    y = x.new_empty(B, T, C)
    grid, arguments = _cut("forward", x, weight, T)
    with torch.cuda.device_of(x):
        causal_conv_fwd_kernel[grid](x, weight.contiguous(), bias.contiguous(), y, S, T, padding, **arguments)
    return y


@causal_conv.register_fake
def _(x, weight, bias, padding):
    B, S, C = x.shape
    return x.new_empty(B, S + padding - (weight.shape[1] - 1), C)


@op("causal_conv_backward")
def _causal_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    B, S, C = x.shape
    x, T = _checked(x, weight, padding)
    dys = rows_of(dy, C)
    grid, arguments = _cut("backward", x, weight, S)
    dx = x.new_empty(B, S, C)
    dweight, dbias = (x.new_empty(grid[1], *size, dtype=torch.float32) for size in (weight.shape, bias.shape))
    with torch.cuda.device_of(x):
        causal_conv_bwd_kernel[grid](
            dys, x, weight.contiguous(), bias.contiguous(), dx, dweight, dbias, S, T, padding, dys.stride(0),
            **arguments,
        )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)


@_causal_conv_backward.register_fake
def _(dy, x, weight, bias, padding):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.padding = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    return *_causal_conv_backward(dy, *ctx.saved_tensors, ctx.padding), None


causal_conv.register_autograd(_backward, _setup_context)
