"""sLSTM over whole sequences in Triton: how its programs work together, their launchers, and the op with gradients.

A program has `DS` channels of one head for `BB` rows, and walks over all time steps. Its part of the recurrent weights,
`[4 DS, D]`, and its part of the state stay on chip from the first step to the last. Narrow heads are one program, whose
products read what it has itself. Wide ones are cut, and a step needs h of all parts of the head, in the backward pass
the gradients of all its gates: programs exchange these through the very arrays that are results. They are filled with
a NaN that no result has, and whoever needs a number waits until it is another one. There is no barrier and no flag,
just one way through the L2 cache in a step. Results do not depend on who comes first.

Programs that wait for each other must all be running: a cooperative launch does not start otherwise, but raises, and
`obstacle` says beforehand what cannot be served. More rows than fit go in several launches.

Products with the recurrent weights are in the dtype of fewer bits, that of the gates or that of the weights: h is
rounded to it before it is multiplied, and so are gradients of gates before they go back through the weights. All else
is in float32. The gradient of the weights is one product over all tokens, after the scan.

Dims: `B` batch `T` time `H` heads `D` head dim `N` rows of the state. Letters are those of `slstm_torch`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import full_precision, product_dtype, rising
from .custom_op import op
from .slstm_triton_kernels import UNWRITTEN, slstm_bwd_kernel, slstm_fwd_kernel
from .triton_language import blocks_of, power_of_2, processors, shared_memory


class _Cut(NamedTuple):
    """How work is cut. Picked on an H100."""

    DS: int  # channels of a program
    BB: int  # rows of a program
    warps: int
    d_warps: int  # in the backward pass


CUTS = _Cut(16, 8, 4, 4), _Cut(32, 16, 8, 8)  # for few rows, and for many
NARROW = _Cut(8, 8, 4, 4), _Cut(8, 4, 4, 4)  # for weights of which no program could have as much
SPARE_MEMORY = 16 << 10  # bytes for all else that a program has there
WHOLE, WHOLE_IN_FLOAT32 = 64, 32  # channels of a head that are not cut
INTERPRETED_WHOLE = 128  # on a CPU, where programs run one after the other and cannot wait


def _padded(D: int) -> int:
    return max(16, power_of_2(D))


def _is_whole(D: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a head is one program."""
    most = WHOLE_IN_FLOAT32 if dtype == torch.float32 else WHOLE
    return (INTERPRETED_WHOLE if device.type == "cpu" else most) >= D


def _cuts(D: int, dtype: torch.dtype, device: torch.device) -> list[_Cut]:
    """What fits on a device for products in a dtype: one way, or one for few rows and one for many."""
    if _is_whole(D, dtype, device):
        return [_Cut(_padded(D), 8, 8 if D > 32 else 4, 4)]

    def fits(cut: _Cut) -> bool:
        weights, exchanged = (4 * size * _padded(D) * dtype.itemsize for size in (cut.DS, cut.BB))
        in_memory = weights + exchanged + SPARE_MEMORY <= shared_memory(device)
        return in_memory and blocks_of(D, cut.DS) <= processors(device)

    return list(filter(fits, CUTS[:1] if dtype == torch.float32 else CUTS)) or list(filter(fits, NARROW))[:1]


def obstacle(D: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why heads of D channels cannot be served on a device, if so."""
    if _cuts(D, dtype, device):
        return None
    if device.type != "cuda":
        return f"Triton's interpreter runs heads of at most {INTERPRETED_WHOLE} channels, got {D}"
    return f"the recurrent weights of a head of {D} channels in {dtype} do not fit on the chip of this GPU"


_compiled: set[tuple] = set()  # for which kinds of arguments, all that Triton tells apart


def _launch(kernel, arguments, D, H, rows, T, packed, dtype, factor, device, backward, **constants) -> None:
    """Launches a kernel for all heads and rows. Both ways to cut are compiled at the first call, so that no batch size
    is the first to need one."""
    cuts = _cuts(D, factor, device)
    groups = [H * blocks_of(rows, cut.BB) for cut in cuts]
    parts = [blocks_of(D, cut.DS) for cut in cuts]
    chosen = 0 if groups[0] * parts[0] <= processors(device) else len(cuts) - 1
    kind = (kernel.fn.__name__, device, dtype, factor, D, H, packed, *constants.items())
    for i, cut in enumerate(cuts):
        if i != chosen and kind in _compiled:
            continue
        together = parts[i] > 1
        most = max(1, processors(device) // parts[i]) if together else groups[i]
        for first in range(0, groups[i], most) if i == chosen else (0,):
            kernel.run(
                *arguments, first, rows, T, H, D=D, DK=_padded(D), DS=cut.DS, BB=cut.BB, **constants, PACKED=packed,
                num_warps=cut.d_warps if backward else cut.warps, launch_cooperative_grid=together,
                grid=(min(most, groups[i] - first) * parts[i],), warmup=i != chosen,
            )  # fmt: skip
    _compiled.add(kind)


def _clear(x: Tensor) -> None:
    """Makes memory that programs exchange numbers through unwritten."""
    x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).fill_(UNWRITTEN.value)


@op("slstm_scan_triton")
def slstm_scan(
    gates: Tensor, R: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor,
    mask: Tensor | None, cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h `[B, T, H, D]` in the dtype of gates; the final h, c, n, m; and, if `keep`, what the backward pass needs: the
    pre-activations `[B, T, H, 4, D]` and c, n, m before each step `[B, T, H, 3, D]`, both in float32, and h before
    each step as it was multiplied."""
    return _forward(gates, R, h, c, n, m, mask, cu_seqlens, keep)


def _forward(gates, R, h, c, n, m, mask, cu_seqlens, keep):
    B, T, H, _, D = gates.shape
    y, pre, before, h_before = _results(gates, R, h, keep)
    weights = R.to(product_dtype(gates, R)).contiguous()
    last = _states(h)
    first = (x.contiguous() for x in (h, c, n, m))
    mask = None if mask is None else mask.contiguous()
    bounds = None if cu_seqlens is None else rising(cu_seqlens, T)
    with torch.cuda.device_of(gates):
        if T > 1 and not _is_whole(D, weights.dtype, gates.device):
            _clear(y)
        _launch(
            slstm_fwd_kernel,
            (gates.contiguous(), weights, *first, mask, bounds, y, *last, pre, before, h_before),
            D, H, h.shape[0], T, bounds is not None, gates.dtype, weights.dtype, gates.device, False,
            KEEP=keep, HAS_MASK=mask is not None,
        )  # fmt: skip
    return y, *last, pre, before, h_before


def _states(h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for h, c, n and m, or their gradients."""
    return h.new_empty(h.shape), h.new_empty(h.shape), h.new_empty(h.shape), h.new_empty(h.shape)


def _results(gates: Tensor, R: Tensor, h: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for y, and for what is kept."""
    B, T, H, _, D = gates.shape
    y = gates.new_empty(B, T, H, D)
    if not keep:
        return y, h.new_empty(0), h.new_empty(0), y.new_empty(0)
    h_before = torch.empty_like(y, dtype=product_dtype(gates, R))
    return y, h.new_empty(B, T, H, 4, D), h.new_empty(B, T, H, 3, D), h_before


@slstm_scan.register_fake
def _(gates, R, h, c, n, m, mask, cu_seqlens, keep):
    y, pre, before, h_before = _results(gates, R, h, keep)
    return y, *_states(h), pre, before, h_before


@op("slstm_scan_triton_backward")
def slstm_scan_backward(
    dy: Tensor, dh: Tensor, dc: Tensor, dn: Tensor, dm: Tensor, R: Tensor, c: Tensor, n: Tensor, m: Tensor,
    mask: Tensor | None, cu_seqlens: Tensor | None, pre: Tensor, before: Tensor, h_before: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `slstm_scan`, of gates, R and the initial state; c, n, m are the final ones."""
    return _backward_pass(dy, dh, dc, dn, dm, R, c, n, m, mask, cu_seqlens, pre, before, h_before)


def _backward_pass(dy, dh, dc, dn, dm, R, c, n, m, mask, cu_seqlens, pre, before, h_before):
    B, T, H, D = dy.shape
    bounds = None if cu_seqlens is None else rising(cu_seqlens, T)
    mask = None if mask is None else mask.contiguous()
    weights = R.to(h_before.dtype).contiguous()
    with torch.cuda.device_of(dy):
        d_gates = dy.new_empty(B, T, H, 4, D)
        exchanged = d_gates if dy.dtype == weights.dtype else torch.empty_like(d_gates, dtype=weights.dtype)
        if not _is_whole(D, weights.dtype, dy.device):
            _clear(exchanged)
        first = _states(dh)
        d_last = (x.contiguous() for x in (dh, dc, dn, dm))
        _launch(
            slstm_bwd_kernel,
            (dy.contiguous(), *d_last, weights, c, n, m, mask, bounds, pre, before, d_gates, exchanged, *first),
            D, H, dh.shape[0], T, bounds is not None, dy.dtype, weights.dtype, dy.device, True,
            HAS_MASK=mask is not None,
        )  # fmt: skip
    return d_gates, _product(exchanged, h_before, R), *first


def _product(d_gates: Tensor, h_before: Tensor, R: Tensor) -> Tensor:
    """The gradient of R, a sum over all tokens that is rounded once."""
    x, y = d_gates.flatten(3).flatten(0, 1).permute(1, 2, 0), h_before.flatten(0, 1).transpose(0, 1)
    if R.dtype != x.dtype and x.is_cuda:
        return torch.bmm(x, y, out_dtype=torch.float32).to(R.dtype).view(R.shape)
    return torch.bmm(x, y).to(R.dtype).view(R.shape)


@slstm_scan_backward.register_fake
def _(dy, dh, dc, dn, dm, R, c, n, m, mask, cu_seqlens, pre, before, h_before):
    B, T, H, D = dy.shape
    return dy.new_empty(B, T, H, 4, D), R.new_empty(R.shape), *_states(dh)


def _setup_context(ctx, inputs, output):
    _, R, _, _, _, _, mask, cu_seqlens, ctx.keep = inputs
    y, _, *last_and_kept = output
    ctx.dtype = y.dtype
    ctx.set_materialize_grads(False)  # of what is kept they would be as large as that
    ctx.save_for_backward(R, mask, cu_seqlens, *last_and_kept)


def _backward(ctx, dy, dh, dc, dn, dm, *_):
    if not ctx.keep:
        raise RuntimeError("slstm_scan must keep its activations to be differentiated, got keep=False.")
    R, mask, cu_seqlens, c, n, m, pre, before, h_before = ctx.saved_tensors
    dy = h_before.new_zeros(h_before.shape, dtype=ctx.dtype) if dy is None else dy
    dh, dc, dn, dm = (torch.zeros_like(c) if x is None else x for x in (dh, dc, dn, dm))
    with full_precision(R.device):
        grads = slstm_scan_backward(dy, dh, dc, dn, dm, R, c, n, m, mask, cu_seqlens, pre, before, h_before)
    return *grads, None, None, None


slstm_scan.register_autograd(_backward, _setup_context)
