"""Public mLSTM ops: contract, validation and dispatch to a backend.

`mlstm_chunkwise` serves training and prefill, `mlstm_step` decoding. Both compute the mLSTM of
https://arxiv.org/abs/2405.04517 (equations 19 to 27); the definition is `mlstm_torch.mlstm_step`.
"""

import math

import torch
from torch import Tensor

from .backends import resolve
from .checks import check_float, check_like, check_same_dtype, check_sequence, full_precision, state_dtype
from .mlstm_torch import MLSTMState, clear_closed, hold_padding
from .mlstm_torch import mlstm_chunkwise as mlstm_chunkwise_torch
from .mlstm_torch import mlstm_step as mlstm_step_torch


def mlstm_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    state: MLSTMState | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    input_gate: str = "exp",
    chunk_size: int | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """mLSTM over whole sequences of any length, with exact gradients for every input and for `state`.

    Args:
        q, k: Queries and keys `[B, T, H, K]`, one floating dtype; q is scaled by `K ** -0.5` inside.
        v: Values `[B, T, H, V]`, of the dtype of q.
        igate, fgate: Gate pre-activations `[B, T, H]`, any floating dtype (float32 recommended). An input gate of
            minus infinity lets nothing in, a forget gate of minus infinity empties the state.
        state: State to start from, of batch B (N with `cu_seqlens`); zeros when omitted. Differentiable.
        mask: `[B, T]` bool, False at padded positions, which leave the state as it was and do not enter it.
        cu_seqlens: `[N + 1]` int32 boundaries of N sequences packed into a batch of 1; the state restarts at each.
        input_gate: `"exp"`, or `"sigmoid"` for mLSTMsig (https://arxiv.org/abs/2503.14376), whose m stays 0.
        chunk_size: Tokens handled in parallel, 64 when omitted. Changes speed and memory, not the result.
        eps: Added to the (stabilised) denominator.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        h `[B, T, H, V]` in the dtype of v, and the final `MLSTMState` (float32, float64 for float64 inputs).

    Raises:
        TypeError, ValueError: An input does not fit; the message says what, got and expected.
        NotImplementedError: The named backend cannot run here.

    ```python
    >>> q, k, v = torch.randn(3, 2, 100, 4, 32).unbind(0)
    >>> igate, fgate = torch.randn(2, 2, 100, 4).unbind(0)
    >>> h, state = mlstm_chunkwise(q, k, v, igate, fgate)
    ```
    """
    check_float("q", q, "B T H K")
    B, T, H, K = q.shape
    _check_inputs(q, k, v, igate, fgate, (B, T, H), input_gate, eps)
    sequences = check_sequence(B, T, q.device, mask, cu_seqlens)
    chunk_size = 64 if chunk_size is None else chunk_size
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size}.")
    resolve(backend, q)
    state = _check_state(state, q, v, sequences)
    q, k, v, igate, fgate = hold_padding(q, k, v, igate, fgate, mask)
    k, igate = clear_closed(k, igate, fgate)
    with full_precision(q.device):
        h, *state = mlstm_chunkwise_torch(q, k, v, igate, fgate, *state, cu_seqlens, input_gate, chunk_size, eps)
    return h, MLSTMState(*state)


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    state: MLSTMState | None = None,
    *,
    mask: Tensor | None = None,
    input_gate: str = "exp",
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """One time step of `mlstm_chunkwise`: the same inputs without the time axis.

    Args:
        q, k, v: `[B, H, K]`, `[B, H, K]` and `[B, H, V]`.
        igate, fgate: Gate pre-activations `[B, H]`.
        state: State before the step; zeros when omitted. Differentiable, and not modified.
        mask: `[B]` bool, False where the step is padding.
        input_gate, eps, backend: As in `mlstm_chunkwise`.

    Returns:
        h `[B, H, V]` in the dtype of v, and the new `MLSTMState`.

    Raises:
        As `mlstm_chunkwise`.
    """
    check_float("q", q, "B H K")
    _check_inputs(q, k, v, igate, fgate, q.shape[:2], input_gate, eps)
    resolve(backend, q)
    state = _check_state(state, q, v, q.shape[0])
    if mask is not None:
        check_like("mask", mask, q.shape[:1], q.device, (torch.bool,))
        q, k, v, igate, fgate = hold_padding(q, k, v, igate, fgate, mask)
    with full_precision(q.device):
        h, state = mlstm_step_torch(q, k, v, igate, fgate, state, input_gate, eps)
    return h.to(v.dtype), state


def _check_inputs(q, k, v, igate, fgate, leading: tuple, input_gate: str, eps: float) -> None:
    check_like("k", k, q.shape, q.device)
    check_float("v", v, "B T H V" if q.dim() == 4 else "B H V")
    check_like("v", v, (*leading, v.shape[-1]), q.device)
    check_same_dtype(q=q, k=k, v=v)
    check_like("igate", igate, leading, q.device)
    check_like("fgate", fgate, leading, q.device)
    if input_gate not in ("exp", "sigmoid"):
        raise ValueError(f"input_gate must be 'exp' or 'sigmoid', got {input_gate!r}.")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}.")


def _check_state(state: MLSTMState | None, q: Tensor, v: Tensor, batch: int) -> MLSTMState:
    H, K, V = q.shape[-2], q.shape[-1], v.shape[-1]
    shapes = (batch, H, K, V), (batch, H, K), (batch, H)
    dtype = state_dtype(q.dtype)
    if state is None:
        return MLSTMState(*(torch.zeros(shape, dtype=dtype, device=q.device) for shape in shapes))
    if len(state) != 3:
        raise ValueError(f"state must be an MLSTMState of C, n and m, got {len(state)} tensors.")
    for name, x, shape in zip(MLSTMState._fields, state, shapes, strict=True):
        check_like(f"state.{name}", x, shape, q.device, (dtype,))
    return MLSTMState(*state)
