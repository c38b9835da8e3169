"""What xLSTM blocks are made of: norms, projections, convolution, feed-forward and the three mixers.

Dims: `B` batch `T` time `D` hidden size `H` heads `K` query and key head dim `V` value head dim. Every mixer is called
like `nn.LSTM`: `y, state = layer(x, state)`, x and y `[B, T, D]`. With `keep`, y is of the last `keep` positions only;
`on_gates` is called with the gates of all.

Papers: https://arxiv.org/abs/2405.04517 (xLSTM[a:b]) and https://arxiv.org/abs/2503.13427 (xLSTM-7B).
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .backends import HAS_TRITON, needs_triton, resolve
from .cache_xlstm import LayerState
from .checks import check_float, check_like, check_sequence, full_precision, state_dtype
from .configuration_xlstm import XLSTMConfig
from .fused import rms_norm, soft_cap
from .linear import is_alone, is_itself, linear, own_part
from .mlstm import mlstm_chunkwise, mlstm_step, mlstm_steps_, mlstm_steps_gated_
from .mlstm_torch import MLSTMState, hold_padding
from .mlstm_torch import mlstm_step as mlstm_step_
from .slstm import slstm_scan, slstm_step


if HAS_TRITON:
    from .conv_triton import causal_conv
    from .gates_triton import gates
    from .head_norm_triton import gated_head_norm
    from .qkv_triton import WIDTHS, qkv_and_gates


def small_std(config: XLSTMConfig) -> float:
    """Initial standard deviation of most weights, https://aclanthology.org/2019.iwslt-1.17."""
    return math.sqrt(2 / (5 * config.hidden_size))


def wang_std(config: XLSTMConfig) -> float:
    """Initial standard deviation of projections back into the residual stream."""
    return 2 / (config.num_hidden_layers * math.sqrt(config.hidden_size))


class XLSTMNorm(nn.Module):
    """The norm of the residual stream: RMSNorm, or LayerNorm without bias, its weight stored as an offset from 1."""

    def __init__(self, config: XLSTMConfig):
        super().__init__()
        self.rms, self.eps, self.backend = config.norm_type == "rms_norm", config.norm_eps, config.backend
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if self.rms and config.use_bias else None
        self.reset_parameters()

    def reset_parameters(self):
        init.constant_(self.weight, 1.0 if self.rms else 0.0)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.rms and needs_triton(self.backend, x):
            return gated_head_norm(x.unsqueeze(-2), None, self.weight, None, 1.0, self.eps, None, None)
        if not self.rms:
            return F.layer_norm(x, self.weight.shape, 1 + self.weight, None, self.eps)
        y = rms_norm(x, self.weight, self.eps)
        return y if self.bias is None else y + self.bias


class HeadNorm(nn.Module):
    """LayerNorm over each head `[B, T, H, V]` to `[B, T, H V]`, with a weight (and bias) for each channel."""

    def __init__(self, config: XLSTMConfig, size: int):
        super().__init__()
        self.offset = 0.0 if config.norm_type == "rms_norm" else 1.0
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if self.offset == 0 and config.use_bias else None
        self.reset_parameters()

    def reset_parameters(self):
        init.constant_(self.weight, 1.0 - self.offset)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(
        self,
        h: Tensor,
        ogate: Tensor | None = None,
        backend: str = "torch",
        c: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """With `ogate` `[B, T, H V]`, the pre-activation of an output gate, y is gated too: by a sigmoid, or, with c
        `[B, T, H V]` and skip `[H V]`, `skip * c` is added and the gate is SiLU.
        """
        if backend == "triton":
            return gated_head_norm(h, ogate, self.weight, self.bias, self.offset, self.eps, c, skip)
        y = F.layer_norm(h, h.shape[-1:], eps=self.eps).flatten(-2).to(h.dtype)
        y = y * (self.weight + self.offset if self.offset else self.weight)
        y = y if self.bias is None else y + self.bias
        if c is not None:
            return (y + skip * c) * F.silu(ogate)
        return y if ogate is None else torch.sigmoid(ogate) * y


def init_linear_(weight: Tensor, bias: Tensor | None, std: float) -> None:
    """A normal weight and no bias."""
    init.normal_(weight, std=std)
    if bias is not None:
        init.zeros_(bias)


def projection(inputs: int, outputs: int, bias: bool, std: float) -> nn.Linear:
    """A linear map that starts with standard deviation `std`. Of no own class: quantisers replace only `nn.Linear`."""
    module = nn.Linear(inputs, outputs, bias=bias)
    module.init_std = std  # type: ignore[assignment]
    init_linear_(module.weight, module.bias, std)
    return module


def gate_dtype(config: XLSTMConfig) -> torch.dtype:
    """Dtype of the weights of gates in a new model."""
    dtype = torch.get_default_dtype()
    return state_dtype(dtype) if config.keep_gates_in_fp32 else dtype


class GateLinear(nn.Linear):
    """Scalar gates, always computed in float32 or better: their rounding is compounded over the whole sequence.

    Rows [i | f]. Input gates start from a normal distribution, forget gates from 3 (first head) to 6 (last).
    """

    def __init__(self, config: XLSTMConfig, inputs: int, igate_mean: float, igate_std: float):
        self.igate_mean, self.igate_std, self.backend = igate_mean, igate_std, config.backend
        super().__init__(inputs, 2 * config.num_heads, dtype=gate_dtype(config))

    def reset_parameters(self):
        heads, device = self.out_features // 2, self.bias.device
        igate = torch.normal(self.igate_mean, self.igate_std, (heads,), device=device)
        fgate = torch.linspace(3.0, 6.0, heads, device=device)
        init.zeros_(self.weight)
        init.copy_(self.bias, torch.cat((igate, fgate)))

    def forward(self, x: Tensor) -> Tensor:
        return gate_linear(x, self.weight, self.bias, self.backend)


def gate_linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """`x @ weight.T + bias` in float32 or better."""
    if HAS_TRITON and x.dtype in (torch.float16, torch.bfloat16) and resolve(backend, x) == "triton":
        return gates(x, weight, bias)
    dtype = state_dtype(x.dtype)
    with full_precision(x.device):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def check_layer_input(
    x: Tensor, size: int, mask: Tensor | None, cu_seqlens: Tensor | None, keep: int | None
) -> None:  # fmt: skip
    """x is `[B, T, size]`, padding or boundaries fit it, and some of it is kept."""
    check_float("x", x, "B T D")
    if x.shape[-1] != size:
        raise ValueError(f"x must have shape [B, T, {size}], got {tuple(x.shape)}.")
    check_sequence(x.shape[0], x.shape[1], x.device, mask, cu_seqlens)
    if keep is not None and (not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep must be at least 1, or None for all positions, got {keep!r}.")


def last(x: Tensor, keep: int | None) -> Tensor:
    """The last `keep` positions of x `[B, T, ...]`, or all."""
    return x if keep is None else x[:, -keep:]


def unpack_state(state: LayerState | None, conv: nn.Module | None) -> tuple[Any, Tensor | None, bool]:
    """States of the cell and of the convolution, which a layer has if it has one, and whether to overwrite them."""
    if state is None:
        return None, None, False
    if not isinstance(state, LayerState):
        raise TypeError(f"state must be a LayerState, as the layer returned it, got {type(state).__name__}.")
    if (state.conv is None) != (conv is None):
        expected, got = ("None", "one") if conv is None else ("that of the layer's convolution", "None")
        raise ValueError(f"state.conv must be {expected}, got {got}: the state is of another model.")
    return state


class BlockDiagonalLinear(nn.Module):
    """A linear map within blocks of `block_size` channels; weight `[blocks, out, in]`."""

    # Blocks are multiplied together until they are this wide: a few small dense products beat many tiny ones.
    TILE = 64

    def __init__(self, size: int, block_size: int, bias: bool, std: float):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(size // block_size, block_size, block_size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        init_linear_(self.weight, self.bias, self.std)

    def forward(self, x: Tensor) -> Tensor:
        squares = in_squares(self.weight, self.merged)
        y = torch.einsum("bthi,hoi->btho", x.unflatten(-1, (squares.shape[0], -1)), squares).flatten(-2)
        return y if self.bias is None else y + self.bias

    @property
    def merged(self) -> int:
        """How many blocks are multiplied as one."""
        blocks, out, _ = self.weight.shape
        return math.gcd(blocks, max(1, self.TILE // out))


def in_squares(weight: Tensor, merged: int) -> Tensor:
    """Blocks `[blocks, out, in]` on the diagonals of larger ones, `[blocks / merged, merged out, merged in]`."""
    squares = torch.diag_embed(weight.unflatten(0, (-1, merged)).movedim(1, -1), dim1=1, dim2=3)
    return squares.flatten(3, 4).flatten(1, 2)


class CausalConv1d(nn.Module):
    """Depthwise causal convolution over time and SiLU, with state: `y, state = conv(x, state)`, x and y `[B, T, C]`."""

    def __init__(self, channels: int, kernel_size: int, backend: str = "auto"):
        super().__init__()
        self.kernel_size, self.backend = kernel_size, backend
        self.weight = nn.Parameter(torch.empty(channels, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self):
        bound = 1 / math.sqrt(self.kernel_size)  # that of nn.Conv1d
        init.uniform_(self.weight, -bound, bound)
        init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`state` holds the last `kernel_size - 1` real inputs of each sequence `[B, kernel_size - 1, C]`, float32.

        At padding y is zero: it must not show the first real token to what may have to predict it.
        """
        B, T, C = x.shape
        past = self.kernel_size - 1
        sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
        dtype = state_dtype(x.dtype)
        if state is None and self._starts(x, mask, cu_seqlens):
            return causal_conv(x, self.weight, self.bias, past), x[:, T - past :].to(dtype, copy=True)
        if state is None:
            state = x.new_zeros(sequences, past, C, dtype=dtype)
        check_like("the state of the convolution", state, (sequences, past, C), x.device, (dtype,))
        if T == 1 and cu_seqlens is None:  # which is faster as the sum that it is
            window = torch.cat((state, x.to(dtype)), 1)
            y = F.silu(((window * self.weight.mT).sum(1, keepdim=True) + self.bias).to(x.dtype))
            new = window[:, 1:]
            if mask is not None:
                y, new = y.masked_fill(~mask[..., None], 0.0), torch.where(mask[..., None], new, state)
        elif cu_seqlens is not None:
            y, new = self._packed(x, state.to(x.dtype), cu_seqlens)
        elif mask is not None:
            y, new = self._padded(x, state.to(x.dtype), mask)
        else:
            x = torch.cat((state.to(x.dtype), x), 1)
            y, new = self._convolve(x), x[:, T:]
        return y, new.to(dtype, copy=True)

    def _starts(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> bool:
        """Whether x are the first tokens of texts, enough for a state, to Triton, which needs no zeros before them."""
        enough = x.shape[1] > self.kernel_size and mask is None and cu_seqlens is None
        return HAS_TRITON and enough and resolve(self.backend, x) == "triton"

    def _packed(self, x: Tensor, before: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Each sequence behind its own past: [past of 0 | tokens of 0 | past of 1 | tokens of 1 ...]."""
        sequences, past, C = before.shape
        bounds = cu_seqlens.to(torch.int64)
        token, offsets = torch.arange(x.shape[1], device=x.device), torch.arange(past, device=x.device)
        slot = token + (torch.searchsorted(bounds[1:], token, right=True) + 1) * past
        starts = torch.arange(sequences, device=x.device) * past
        x = x.new_zeros(len(token) + sequences * past, C).index_put((slot,), x[0])
        x = x.index_put(((bounds[:-1] + starts)[:, None] + offsets,), before)
        return self._convolve(x[None])[:, slot - past], x[(bounds[1:] + starts)[:, None] + offsets]

    def _padded(self, x: Tensor, before: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Real tokens together, in order, behind the past; padding after them."""
        order = torch.argsort(mask.long(), dim=1, descending=True, stable=True)
        rank = (mask.long().cumsum(1) - 1).clamp(min=0)
        newest = mask.sum(1, keepdim=True) + torch.arange(before.shape[1], device=x.device)
        x = torch.cat((before, _gather(x, order)), 1)
        return _gather(self._convolve(x), rank).masked_fill(~mask[..., None], 0.0), _gather(x, newest)

    def _convolve(self, x: Tensor) -> Tensor:
        """x, with its past in front, to what comes after the past, activated."""
        if HAS_TRITON and resolve(self.backend, x) == "triton":
            return causal_conv(x, self.weight, self.bias, 0)
        # on a CPU, PyTorch has no fast convolution in half precision
        dtype = state_dtype(x.dtype) if x.device.type == "cpu" else x.dtype
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.silu(F.conv1d(x.to(dtype).mT, weight[:, None], bias, groups=x.shape[-1]).mT.to(x.dtype))


def _convolved(
    conv: CausalConv1d | None, x: Tensor, state: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x after a convolution, and its state; x itself where there is none."""
    return (x, state) if conv is None else conv(x, state, mask=mask, cu_seqlens=cu_seqlens)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Positions `index` `[B, N]` of x `[B, T, C]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class GatedFeedForward(nn.Module):
    """`down(act(gate) * up)` with gate and up in one projection: SwiGLU or GeGLU."""

    def __init__(self, config: XLSTMConfig, size: int, activation: str):
        super().__init__()
        self.up_proj = projection(config.hidden_size, 2 * size, config.use_bias, small_std(config))  # rows [gate | up]
        self.down_proj = projection(size, config.hidden_size, config.use_bias, wang_std(config))
        self.activation, self.backend = activation, config.backend

    def forward(self, x: Tensor) -> Tensor:
        y = linear(self.up_proj, x, activation=self.activation, backend=self.backend)
        return linear(self.down_proj, y, backend=self.backend)


class GateActivations(NamedTuple):
    """What the gates of a mixer let through at each token, in float32 (float64 of a model in float64), differentiable.

    Of an mLSTM, `input` and `forget` are one number for each head, and `output` one for each channel of its inner size;
    of an sLSTM all are one for each channel of its heads, the recurrent part included. Input gates are exponential, and
    infinite where the exponent is above 88; with `mlstm_input_gate="sigmoid"` those of an mLSTM are from 0 to 1. Forget
    gates are, and output gates, but for those of the first paper's mLSTM: the SiLU of a projection. At padding nothing
    enters, nothing is forgotten and nothing goes out: 0, 1 and 0.
    """

    input: Tensor  # [B, T, H], of an sLSTM [B, T, H, D / H]
    forget: Tensor  # as input
    output: Tensor  # [B, T, H, V], of an sLSTM [B, T, H, D / H]

    def at(self, mask: Tensor | None) -> "GateActivations":
        """These where `mask` `[B, T]` is True, or everywhere without one; as at padding elsewhere."""
        if mask is None:
            return self
        pairs = zip(self, (0.0, 1.0, 0.0), strict=True)
        return GateActivations(*(x.masked_fill(~mask.view(*mask.shape, *[1] * (x.dim() - 2)), y) for x, y in pairs))


OnGates = Callable[[GateActivations], None]  # what a mixer shows its gates to

# More steps than that are always taken in parallel.
FEW_STEPS = 16


def is_few(batch_size: int, steps: int) -> bool:
    """Whether steps are faster one after the other than in parallel, where the state may be overwritten (H100)."""
    return steps <= FEW_STEPS // 2 or (steps <= FEW_STEPS and batch_size * steps <= 8 * FEW_STEPS)


class _MLSTMMixer(nn.Module):
    """What both mLSTM layers share: gates, the cell, and the norm of its heads."""

    group: Any = None  # of the processes that share its heads

    def __init__(self, config: XLSTMConfig, gate_inputs: int, igate_mean: float, igate_std: float):
        super().__init__()
        config.check_mlstm()
        self.config = config
        self.backend = config.backend
        self.head_sizes = config.qk_size // config.num_heads, config.inner_size // config.num_heads
        self.gate_proj = GateLinear(config, gate_inputs, igate_mean, igate_std)
        self.head_norm = HeadNorm(config, config.inner_size)

    def _cell(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        state: MLSTMState | None,
        in_place: bool,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        keep: int | None,
        *gating: Tensor,
    ) -> tuple[Tensor, MLSTMState]:
        """q, k, v `[B, T, H K]` or `[B, T, H V]` to the heads `[B, T or keep, H V]`, normalised and gated.

        `gating` is the output gate, or output gate, c and skip, as for `HeadNorm`. A few steps overwrite the state
        where they may.
        """
        if self._is_step_(q, in_place, cu_seqlens):
            return self._step_(q, k, v, gates, state, mask, *gating).to(v.dtype), state
        config, (K, V), T = self.config, self.head_sizes, q.shape[1]
        backend = resolve(self.backend, q)
        q, k, v = q.unflatten(-1, (-1, K)), k.unflatten(-1, (-1, K)), v.unflatten(-1, (-1, V))
        options: dict[str, Any] = {
            "mask": mask,
            "input_gate": config.mlstm_input_gate,
            "gate_soft_cap": config.gate_soft_cap,
            "eps": config.eps,
        }
        if backend == "torch":  # both at once
            gates, options["gate_soft_cap"] = soft_cap(gates, config.gate_soft_cap), None
        igate, fgate = gates.chunk(2, -1)
        if in_place and backend == "triton" and is_few(*q.shape[:2]) and not torch.is_grad_enabled():
            if len(gating) > 1 or not is_itself(self.head_norm, HeadNorm):
                h = mlstm_steps_(q, k, v, igate, fgate, state, **options)
                return self._gated(h, backend, keep, *gating), state
            (ogate,), norm = gating, self.head_norm
            options |= {"offset": norm.offset, "norm_eps": norm.eps}
            weight, bias = own_part(norm.weight), own_part(norm.bias)
            y = mlstm_steps_gated_(q, k, v, igate, fgate, ogate, state, weight, bias, **options)
            return last(y, keep), state
        if T == 1 and cu_seqlens is None:
            q, k, v, igate, fgate = (x.squeeze(1) for x in (q, k, v, igate, fgate))
            options["mask"] = None if mask is None else mask[:, 0]
            h, state = mlstm_step(q, k, v, igate, fgate, state, backend=backend, **options)
            h = h.unsqueeze(1)
        else:
            options |= {"cu_seqlens": cu_seqlens, "chunk_size": config.chunk_size}
            h, state = mlstm_chunkwise(q, k, v, igate, fgate, state, backend=backend, **options)
        return self._gated(h, backend, keep, *gating), state

    def _activations(
        self, gates: Tensor, ogate: Tensor, function: Callable[[Tensor], Tensor], mask: Tensor | None
    ) -> GateActivations:
        """Of gates `[B, T, 2 H]` before the soft cap, and of an output gate `[B, T, H V]` before its function."""
        igate, fgate = soft_cap(gates, self.config.gate_soft_cap).chunk(2, -1)
        igate = torch.sigmoid(igate) if self.config.mlstm_input_gate == "sigmoid" else torch.exp(igate)
        output = function(ogate.to(state_dtype(ogate.dtype))).unflatten(-1, (-1, self.head_sizes[1]))
        return GateActivations(igate, torch.sigmoid(fgate), output).at(mask)

    def _gated(
        self,
        h: Tensor,
        backend: str,
        keep: int | None,
        ogate: Tensor,
        c: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        c = None if c is None else last(c, keep)
        return self.head_norm(last(h, keep), last(ogate, keep), backend, c, skip)

    def _is_step_(self, x: Tensor, in_place: bool, cu_seqlens: Tensor | None) -> bool:
        """Whether `_step_` serves x `[B, T, ...]`."""
        alone = in_place and x.shape[1] == 1 and cu_seqlens is None
        return alone and not torch.is_grad_enabled() and resolve(self.backend, x) == "torch"

    def _step_(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, state: Any, mask: Tensor | None, *gating: Tensor
    ) -> Tensor:
        """`_cell` of one token in PyTorch, in the dtype of the state, which is overwritten. The cache that has it was
        checked."""
        config, (K, V), B = self.config, self.head_sizes, len(q)
        q, k, v = q.view(B, -1, K), k.view(B, -1, K), v.view(B, -1, V)
        igate, fgate = soft_cap(gates, config.gate_soft_cap).view(B, 2, -1).unbind(1)
        tokens = hold_padding(q, k, v, igate, fgate, None if mask is None else mask[:, 0])
        with full_precision(q.device):
            h, _ = mlstm_step_(*tokens, state, config.mlstm_input_gate, config.eps, in_place=True)
        return self._gated(h.unsqueeze(1), "torch", None, *gating)


class MLSTMLayer(_MLSTMMixer):
    """The mLSTM mixer of xLSTM-7B ("post-up"): dense q, k, v and a sigmoid output gate, at model width.

    `y, state = layer(x, state)` with x, y `[B, T, hidden_size]`; `state` is a `LayerState`, `None` to start.
    """

    def __init__(self, config: XLSTMConfig):
        super().__init__(config, config.hidden_size, igate_mean=-10.0, igate_std=0.0)
        self.splits = (config.qk_size, config.qk_size, config.inner_size, config.inner_size)
        # rows [q | k | v | o]
        self.qkvo_proj = projection(config.hidden_size, sum(self.splits), config.use_bias, small_std(config))
        self.out_proj = projection(config.inner_size, config.hidden_size, config.use_bias, wang_std(config))

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        keep: int | None = None,
        on_gates: OnGates | None = None,
    ) -> tuple[Tensor, LayerState]:
        check_layer_input(x, self.config.hidden_size, mask, cu_seqlens, keep)
        cell, _, in_place = unpack_state(state, None)
        qkvo, gates = linear(self.qkvo_proj, x, backend=self.backend), self.gate_proj(x)
        if on_gates is not None:
            on_gates(self._activations(gates, qkvo.split(self.splits, -1)[3], torch.sigmoid, mask))
        y, cell = self.heads(qkvo, gates, cell, in_place, mask, cu_seqlens, keep)
        return linear(self.out_proj, y, backend=self.backend), LayerState(cell)

    def heads(
        self,
        qkvo: Tensor,
        gates: Tensor,
        state: MLSTMState | None,
        in_place: bool = False,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        keep: int | None = None,
    ) -> tuple[Tensor, MLSTMState]:
        """What is between the projections: rows [q | k | v | o] and gates [i | f] to y `[B, T or keep, H V]`."""
        if self._is_step_(qkvo, in_place, cu_seqlens):  # which one conversion each way is enough for
            q, k, v, o = qkvo.to(state_dtype(qkvo.dtype)).split(self.splits, -1)
            return self._step_(q, k, v, gates, state, mask, o).to(qkvo.dtype), state
        q, k, v, o = qkvo.split(self.splits, -1)
        return self._cell(q, k, v, gates, state, in_place, mask, cu_seqlens, keep, o)


class MLSTMPreUpLayer(_MLSTMMixer):
    """The mLSTM mixer of the first paper ("pre-up"): the cell works at a wider inner size.

    `y, state = layer(x, state)` with x, y `[B, T, hidden_size]`; `state` is a `LayerState`, `None` to start.
    """

    def __init__(self, config: XLSTMConfig):
        inner, std = config.inner_size, small_std(config)
        super().__init__(config, 3 * inner, igate_mean=0.0, igate_std=0.1)
        self.up_proj = projection(config.hidden_size, 2 * inner, config.use_bias, std)  # rows [x | z]
        kernel_size = config.conv_kernel_size
        self.conv = CausalConv1d(inner, kernel_size, config.backend) if kernel_size else None
        self.q_proj = BlockDiagonalLinear(inner, config.mlstm_qkv_block_size, config.use_bias, std)
        self.k_proj = BlockDiagonalLinear(inner, config.mlstm_qkv_block_size, config.use_bias, std)
        self.v_proj = BlockDiagonalLinear(inner, config.mlstm_qkv_block_size, config.use_bias, std)
        self.skip = nn.Parameter(torch.empty(inner))
        self.down_proj = projection(inner, config.hidden_size, config.use_bias, wang_std(config))
        self.reset_parameters()

    def reset_parameters(self):
        init.ones_(self.skip)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        keep: int | None = None,
        on_gates: OnGates | None = None,
    ) -> tuple[Tensor, LayerState]:
        check_layer_input(x, self.config.hidden_size, mask, cu_seqlens, keep)
        cell, conv, in_place = unpack_state(state, self.conv)
        x, z = linear(self.up_proj, x, backend=self.backend).chunk(2, -1)
        c, conv = _convolved(self.conv, x, conv, mask, cu_seqlens)
        q, k, v, gates = self._qkv_and_gates(c, x)
        if on_gates is not None:
            on_gates(self._activations(gates, z, F.silu, mask))
        y, cell = self._cell(q, k, v, gates, cell, in_place, mask, cu_seqlens, keep, z, c, self.skip)
        return linear(self.down_proj, y, backend=self.backend), LayerState(cell, conv)

    def _qkv_and_gates(self, c: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        maps, gate = (self.q_proj, self.k_proj, self.v_proj), self.gate_proj
        width = self.q_proj.merged * self.config.mlstm_qkv_block_size
        if (
            HAS_TRITON
            and c.dtype in (torch.float16, torch.bfloat16)
            and resolve(self.backend, c) == "triton"
            and width in WIDTHS
            and all(is_alone(module, BlockDiagonalLinear) and module.bias is None for module in maps)
            and is_alone(gate, GateLinear)
        ):
            squares = in_squares(torch.cat([module.weight for module in maps]).to(c.dtype), self.q_proj.merged)
            return qkv_and_gates(c, x, squares.unflatten(0, (3, -1)), gate.weight, gate.bias)
        q, k, v = self.q_proj(c), self.k_proj(c), self.v_proj(x)
        return q, k, v, gate(torch.cat((q, k, v), -1))


class SLSTMLayer(nn.Module):
    """The sLSTM mixer: memory mixing between the channels of a head, one step after the other.

    `y, state = layer(x, state)` with x, y `[B, T, hidden_size]`; `state` is a `LayerState`, `None` to start.
    `layer_idx` (of `config.num_hidden_layers`) shapes the initial forget gates.
    """

    def __init__(self, config: XLSTMConfig, layer_idx: int = 0):
        super().__init__()
        config.check_slstm()
        self.config, self.layer_idx, self.backend = config, layer_idx, config.backend
        H = config.slstm_num_heads
        D = config.hidden_size // H
        kernel_size = config.slstm_conv_kernel_size
        self.conv = CausalConv1d(config.hidden_size, kernel_size, config.backend) if kernel_size else None
        # gates in the order i f z o
        dtype = gate_dtype(config)
        self.gate_weight = nn.Parameter(torch.empty(H, 4, D, D, dtype=dtype))  # [H, 4, D_out, D_in]
        self.gate_bias = nn.Parameter(torch.empty(H, 4, D, dtype=dtype))
        self.recurrent_weight = nn.Parameter(torch.empty(H, 4, D, D))  # [H, 4, D_out, D_in]
        self.head_norm = HeadNorm(config, config.hidden_size)
        self.reset_parameters()

    def reset_parameters(self):
        H, _, D = self.gate_bias.shape
        init.normal_(self.gate_weight, std=small_std(self.config))
        bound = 1 / math.sqrt(self.config.hidden_size)
        if self.config.slstm_recurrent_init == "standard":
            init.uniform_(self.recurrent_weight, -bound, bound)
        else:
            init.zeros_(self.recurrent_weight)
        bias = torch.zeros(H, 4, D, device=self.gate_bias.device)
        kind = self.config.slstm_bias_init
        if kind == "standard":
            bias.uniform_(-bound, bound)
        elif kind == "small_init":
            bias[:, 1] = torch.linspace(3.0, 6.0, D, device=bias.device)
        elif kind == "powerlaw_blockdependent":
            depth = self.layer_idx / max(1, self.config.num_hidden_layers - 1)
            channel = torch.arange(D, device=bias.device) / max(1, D - 1)
            bias[:, 1] = 5 - 12 * channel ** (0.3 + 1.3 * depth)
        init.copy_(self.gate_bias, bias)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        keep: int | None = None,
        on_gates: OnGates | None = None,
    ) -> tuple[Tensor, LayerState]:
        H, _, D, _ = self.gate_weight.shape
        check_layer_input(x, H * D, mask, cu_seqlens, keep)
        cell, conv, _ = unpack_state(state, self.conv)
        c, conv = _convolved(self.conv, x, conv, mask, cu_seqlens)
        gates, before = self._gates(c, x), cell
        if x.shape[1] == 1 and cu_seqlens is None:
            real = None if mask is None else mask[:, 0]
            h, cell = slstm_step(gates.squeeze(1), self.recurrent_weight, cell, mask=real, backend=self.backend)
            h = h.unsqueeze(1)
        else:
            options: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens, "backend": self.backend}
            h, cell = slstm_scan(gates, self.recurrent_weight, cell, **options)
        if on_gates is not None:
            on_gates(self._activations(gates, h, None if before is None else before.h, cu_seqlens).at(mask))
        return self.head_norm(last(h, keep).to(x.dtype)).to(x.dtype), LayerState(cell, conv)

    def _activations(
        self, gates: Tensor, h: Tensor, first: Tensor | None, cu_seqlens: Tensor | None
    ) -> GateActivations:
        """Of gates without their recurrent part, which h `[B, T, H, D / H]` and the h before the first adds."""
        dtype = state_dtype(gates.dtype)
        h = h.to(dtype)
        first = h.new_zeros(1, *h.shape[2:]) if first is None else first
        if cu_seqlens is None:
            h = torch.cat((first.expand(len(h), -1, -1)[:, None], h[:, :-1]), 1)
        else:
            token, bounds = torch.arange(h.shape[1], device=h.device), cu_seqlens.long()
            row = torch.searchsorted(bounds[1:], token, right=True)
            starts = (token == bounds[row])[:, None, None]
            h = torch.where(starts, first.expand(len(bounds) - 1, -1, -1)[row], h.roll(1, 1))
        with full_precision(h.device):
            gates = gates.to(dtype) + torch.einsum("bthd,hgod->bthgo", h, self.recurrent_weight.to(dtype))
        i, f, _, o = gates.unbind(-2)
        return GateActivations(torch.exp(i), torch.sigmoid(f), torch.sigmoid(o))

    def _gates(self, c: Tensor, x: Tensor) -> Tensor:
        """Pre-activations without their recurrent part, of i and f from c, of z and o from x: `[B, T, H, 4, D / H]`."""
        H, _, D, _ = self.gate_weight.shape
        in_full = self.config.keep_gates_in_fp32
        dtype = state_dtype(x.dtype) if in_full else x.dtype
        inputs = torch.stack((c.reshape(-1, H, D), x.reshape(-1, H, D)), 2).to(dtype)
        weight = self.gate_weight.to(dtype).view(2 * H, 2 * D, D)
        with full_precision(x.device) if in_full else nullcontext():
            y = torch.bmm(inputs.flatten(1, 2).transpose(0, 1), weight.mT)  # [2 H, B T, 2 D]
        return y.transpose(0, 1).reshape(*x.shape[:2], H, 4, D) + self.gate_bias
