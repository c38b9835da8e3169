"""Public mLSTM ops: contract, validation and dispatch to a backend.

`mlstm_chunkwise` serves training and prefill, `mlstm_step` decoding. Both compute the mLSTM of
https://arxiv.org/abs/2405.04517 (equations 19 to 27); the definition is `mlstm_torch.mlstm_step`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .backends import HAS_TRITON, resolve
from .checks import check_float, check_like, check_same_dtype, check_sequence, full_precision, state_dtype
from .fused import soft_cap
from .mlstm_torch import MLSTMState, clear_closed, hold_padding
from .mlstm_torch import mlstm_chunkwise as mlstm_chunkwise_torch
from .mlstm_torch import mlstm_step as mlstm_step_torch


if HAS_TRITON:
    from .mlstm_triton import mlstm_chunkwise as mlstm_chunkwise_triton
    from .mlstm_triton_step import mlstm_step as mlstm_step_triton
    from .mlstm_triton_step import mlstm_steps_ as mlstm_steps_triton_
    from .mlstm_triton_step import mlstm_steps_gated_ as mlstm_steps_gated_triton_


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
    gate_soft_cap: float | None = None,
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
        gate_soft_cap: Gates are `cap * tanh(gate / cap)` first, where a cap is given.
        chunk_size: Tokens handled in parallel, 64 when omitted. Changes speed and memory, not the result. The Triton
            kernels are built for chunks of their own.
        eps: Added to the (stabilised) denominator.
        backend: `"torch"`, `"triton"` (float16, bfloat16 and float32 on a GPU), or `"auto"`: Triton where it can run.

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
    _check_inputs(q, k, v, igate, fgate, (B, T, H), input_gate, gate_soft_cap, eps)
    sequences = check_sequence(B, T, q.device, mask, cu_seqlens)
    chunk_size = 64 if chunk_size is None else chunk_size
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size}.")
    backend = resolve(backend, q)
    if state is not None or backend == "torch":
        state = _check_state(state, q, v, sequences)
    if backend == "torch" or mask is not None:
        igate, fgate, gate_soft_cap = soft_cap(igate, gate_soft_cap), soft_cap(fgate, gate_soft_cap), None
    q, k, v, igate, fgate = hold_padding(q, k, v, igate, fgate, mask)
    with full_precision(q.device):
        if backend == "triton":
            h, *last, _, _, _, _, _ = mlstm_chunkwise_triton(
                q, k, v, igate, fgate, *(state or (None, None, None)), cu_seqlens, input_gate, gate_soft_cap, eps
            )
        else:
            k, igate = clear_closed(k, igate, fgate)
            h, *last = mlstm_chunkwise_torch(q, k, v, igate, fgate, *state, cu_seqlens, input_gate, chunk_size, eps)
    return h, MLSTMState(*last)


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
    gate_soft_cap: float | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """One time step of `mlstm_chunkwise`: the same inputs without the time axis.

    Args:
        q, k, v: `[B, H, K]`, `[B, H, K]` and `[B, H, V]`.
        igate, fgate: Gate pre-activations `[B, H]`.
        state: State before the step; zeros when omitted. Differentiable, and not modified.
        mask: `[B]` bool, False where the step is padding.
        input_gate, gate_soft_cap, eps, backend: As in `mlstm_chunkwise`.

    Returns:
        h `[B, H, V]` in the dtype of v, and the new `MLSTMState`.

    Raises:
        As `mlstm_chunkwise`.
    """
    options: dict[str, Any] = {"dims": "B H K", "backend": backend}
    backend, state = _check_steps(q, k, v, igate, fgate, state, mask, input_gate, gate_soft_cap, eps, **options)
    with full_precision(q.device):
        if backend == "triton":
            h, *last = mlstm_step_triton(q, k, v, igate, fgate, *state, mask, input_gate, gate_soft_cap, eps)
            return h, MLSTMState(*last)
        igate, fgate = soft_cap(igate, gate_soft_cap), soft_cap(fgate, gate_soft_cap)
        q, k, v, igate, fgate = hold_padding(q, k, v, igate, fgate, mask)
        h, state = mlstm_step_torch(q, k, v, igate, fgate, state, input_gate, eps)
    return h.to(v.dtype), state


def mlstm_steps_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    state: MLSTMState,
    *,
    mask: Tensor | None = None,
    input_gate: str = "exp",
    gate_soft_cap: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """A few steps of `mlstm_chunkwise` that overwrite the state: Triton only, no gradients.

    Args:
        q, k, v: `[B, T, H, K]`, `[B, T, H, K]` and `[B, T, H, V]`. Time is walked over: T should be small.
        igate, fgate: Gate pre-activations `[B, T, H]`.
        state: State before the steps, contiguous; that after them when this returns.
        mask: `[B, T]` bool, False where a step is padding.
        input_gate, gate_soft_cap, eps: As in `mlstm_chunkwise`.

    Returns:
        h `[B, T, H, V]` in the dtype of v.

    Raises:
        As `mlstm_chunkwise`; NotImplementedError where Triton cannot run.
    """
    _check_steps(q, k, v, igate, fgate, state, mask, input_gate, gate_soft_cap, eps)
    with full_precision(q.device):
        return mlstm_steps_triton_(q, k, v, igate, fgate, *state, mask, input_gate, gate_soft_cap, eps)


def mlstm_steps_gated_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    ogate: Tensor,
    state: MLSTMState,
    weight: Tensor,
    bias: Tensor | None,
    *,
    offset: float,
    norm_eps: float,
    mask: Tensor | None = None,
    input_gate: str = "exp",
    gate_soft_cap: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`mlstm_steps_` and what follows it in xLSTM-7B.

    Args:
        ogate: Pre-activation of the output gate `[B, T, H V]`, of the dtype of v.
        weight, bias: Of the norm of heads, `[H V]`, any floating dtype; `offset` is added to the weight.
        norm_eps: Added to the variance.
        Others as in `mlstm_steps_`.

    Returns:
        y `[B, T, H V]` = `sigmoid(ogate) * (layer_norm(h) * (weight + offset) + bias)`, in the dtype of v.

    Raises:
        As `mlstm_steps_`.
    """
    _check_steps(q, k, v, igate, fgate, state, mask, input_gate, gate_soft_cap, eps)
    channels = v.shape[2] * v.shape[3]
    check_like("ogate", ogate, (*q.shape[:2], channels), q.device, (v.dtype,))
    check_like("weight", weight, (channels,), q.device)
    if bias is not None:
        check_like("bias", bias, (channels,), q.device)
    with full_precision(q.device):
        return mlstm_steps_gated_triton_(
            q, k, v, igate, fgate, ogate, *state, weight, bias,
            mask, input_gate, gate_soft_cap, eps, norm_eps, offset,
        )  # fmt: skip


def _check_steps(
    q, k, v, igate, fgate, state, mask, input_gate: str, gate_soft_cap: float | None, eps: float,
    *, dims: str = "B T H K", backend: str = "triton",
) -> tuple[str, MLSTMState]:  # fmt: skip
    """The backend that serves one step or a few, q of `dims`, and their state."""
    check_float("q", q, dims)
    _check_inputs(q, k, v, igate, fgate, q.shape[:-1], input_gate, gate_soft_cap, eps)
    backend = resolve(backend, q)
    state = _check_state(state, q, v, q.shape[0])
    if mask is not None:
        check_like("mask", mask, q.shape[:-2], q.device, (torch.bool,))
    return backend, state


def _check_inputs(
    q, k, v, igate, fgate, leading: tuple, input_gate: str, gate_soft_cap: float | None, eps: float
) -> None:
    check_like("k", k, q.shape, q.device)
    check_float("v", v, "B T H V" if q.dim() == 4 else "B H V")
    check_like("v", v, (*leading, v.shape[-1]), q.device)
    check_same_dtype(q=q, k=k, v=v)
    check_like("igate", igate, leading, q.device)
    check_like("fgate", fgate, leading, q.device)
    if input_gate not in ("exp", "sigmoid"):
        raise ValueError(f"input_gate must be 'exp' or 'sigmoid', got {input_gate!r}.")
    if gate_soft_cap is not None and not 0 < gate_soft_cap < math.inf:
        raise ValueError(f"gate_soft_cap must be finite and more than 0, or None, got {gate_soft_cap}.")
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
