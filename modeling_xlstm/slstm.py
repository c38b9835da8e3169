"""Public sLSTM ops: contract, validation and dispatch to a backend.

`slstm_scan` serves training and prefill, `slstm_step` decoding. Both compute the sLSTM of
https://arxiv.org/abs/2405.04517 (equations 8 to 18); the definition is `slstm_torch.slstm_step`.
"""

import torch
from torch import Tensor

from .backends import HAS_TRITON, resolve
from .checks import autocasts, check_float, check_like, check_sequence, full_precision, product_dtype, state_dtype
from .slstm_torch import SLSTMState, hold_padding
from .slstm_torch import slstm_scan as slstm_scan_torch
from .slstm_torch import slstm_step as slstm_step_torch


if HAS_TRITON:
    from .slstm_triton import slstm_scan as slstm_scan_triton


def slstm_scan(
    gates: Tensor,
    R: Tensor,
    state: SLSTMState | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SLSTMState]:
    """sLSTM over whole sequences of any length, with exact gradients for gates, R and `state`.

    Args:
        gates: Input parts of the gate pre-activations, `W x + b`, `[B, T, H, 4, D]`, in the order i, f, z, o. A forget
            gate of minus infinity empties the state; input gates must be finite.
        R: Recurrent weights `[H, 4, D_out, D_in]`, any floating dtype: head h adds `R[h, g] @ h[t - 1]` to its gate g.
            On Triton that product is in the dtype of gates or R that has fewer bits, where autocast sets that of R;
            all else is in float32.
        state: State to start from, of batch B (N with `cu_seqlens`); zeros when omitted. Differentiable.
        mask: `[B, T]` bool, False at padded positions, which leave the whole state as it was; h repeats there.
        cu_seqlens: `[N + 1]` int32 boundaries of N sequences packed into a batch of 1; the state restarts at each.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        h `[B, T, H, D]` in the dtype of gates, and the final `SLSTMState` (float32, float64 for float64 inputs).

    Raises:
        TypeError, ValueError: An input does not fit; the message says what, got and expected.
        NotImplementedError: The named backend cannot run here.

    ```python
    >>> gates, R = torch.randn(2, 100, 4, 4, 32), torch.randn(4, 4, 32, 32) / 32**0.5
    >>> h, state = slstm_scan(gates, R)
    ```
    """
    check_float("gates", gates, "B T H 4 D")
    B, T = gates.shape[:2]
    _check_inputs(gates, R)
    sequences = check_sequence(B, T, gates.device, mask, cu_seqlens)
    weights = _under_autocast(R)
    backend = _resolve(backend, gates, weights)
    state = _check_state(state, gates, sequences)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (gates, R, *state))
    with full_precision(gates.device):
        if backend == "triton":
            h, *last, _, _, _ = slstm_scan_triton(gates, weights, *state, mask, cu_seqlens, keep)
        else:
            h, *last, _, _ = slstm_scan_torch(gates, R, *state, mask, cu_seqlens, keep)
    return h, SLSTMState(*last)


def slstm_step(
    gates: Tensor,
    R: Tensor,
    state: SLSTMState | None = None,
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SLSTMState]:
    """One time step of `slstm_scan`: the same inputs without the time axis.

    Args:
        gates: `[B, H, 4, D]`.
        R: `[H, 4, D_out, D_in]`.
        state: State before the step; zeros when omitted. Differentiable, and not modified.
        mask: `[B]` bool, False where the step is padding.
        backend: As in `slstm_scan`.

    Returns:
        h `[B, H, D]` in the dtype of gates, and the new `SLSTMState`.

    Raises:
        As `slstm_scan`.
    """
    check_float("gates", gates, "B H 4 D")
    _check_inputs(gates, R)
    backend = _resolve(backend, gates, _under_autocast(R))
    state = _check_state(state, gates, gates.shape[0])
    if mask is not None:
        check_like("mask", mask, gates.shape[:1], gates.device, (torch.bool,))
    if backend == "triton":
        h, new = slstm_scan(gates[:, None], R, state, mask=None if mask is None else mask[:, None], backend=backend)
        return h[:, 0], new
    with full_precision(gates.device):
        _, new = slstm_step_torch(gates, R, state)
    if mask is not None:
        new = hold_padding(new, state, mask)
    return new.h.to(gates.dtype), new


def _check_inputs(gates: Tensor, R: Tensor) -> None:
    H, G, D = gates.shape[-3:]
    if G != 4:
        raise ValueError(
            f"gates must hold the 4 gates i, f, z, o in the axis before the last, got {tuple(gates.shape)}."
        )
    check_like("R", R, (H, 4, D, D), gates.device)


def _under_autocast(R: Tensor) -> Tensor:
    """R as a product takes it."""
    return R.to(torch.get_autocast_dtype(R.device.type)) if autocasts(R.device) else R


def _resolve(backend: str, gates: Tensor, R: Tensor) -> str:
    return resolve(backend, R if product_dtype(gates, R) == R.dtype else gates, "sLSTM")


def _check_state(state: SLSTMState | None, gates: Tensor, batch: int) -> SLSTMState:
    shape = batch, gates.shape[-3], gates.shape[-1]
    dtype = state_dtype(gates.dtype)
    if state is None:
        return SLSTMState(*(torch.zeros(shape, dtype=dtype, device=gates.device) for _ in range(4)))
    if len(state) != 4:
        raise ValueError(f"state must be an SLSTMState of h, c, n and m, got {len(state)} tensors.")
    for name, x in zip(SLSTMState._fields, state, strict=True):
        check_like(f"state.{name}", x, shape, gates.device, (dtype,))
    return SLSTMState(*state)
