"""A block of xLSTM-7B for a few tokens in six kernels: what `XLSTMBlock` computes, for inference.

| kernel | reads | computes |
|---|---|---|
| product | q, k, v, o and gates | norm before it |
| steps of the cell | its state | h |
| the rest of the cell | h | n and m of the state, norm of heads and output gate |
| product | output projection | residual |
| product | gate and up projection | norm before it, SwiGLU behind it |
| product | down projection | residual |

With more than one row half of a norm is computed behind the product before it, even that of the block before, and the
first is a kernel of its own. Weights and states are read once, and nothing else of their size.
"""

from typing import Any

import torch
from torch import Tensor

from .cache_xlstm import LayerState
from .layers_xlstm import FEW_STEPS, MLSTMLayer
from .linear import is_for_triton, is_hooked
from .linear_triton import Gates, Norm, Rows, multiply


def takes(block: Any, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None) -> bool:
    """Whether `block_steps` serves this: a plain block of xLSTM-7B in half precision, and a state to overwrite."""
    mixer = block.mixer
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or block.training:
        return False
    if not isinstance(mixer, MLSTMLayer):
        return False
    if state is None or not state.in_place or cu_seqlens is not None or x.shape[1] > FEW_STEPS:
        return False
    products = (mixer.qkvo_proj, mixer.out_proj, block.ffn.up_proj, block.ffn.down_proj)
    return (
        mixer.config.norm_type == "rms_norm"
        and block.mixer_norm.bias is None
        and mixer.gate_proj.bias is not None
        and all(is_for_triton(module, x, mixer.backend) for module in products)
        and not any(is_hooked(module) for module in block.modules())
    )


def block_steps(block: Any, rows: Rows, state: LayerState, mask: Tensor | None, next_norm: Tensor | None) -> Rows:
    """Rows `[B T, D]` to those behind the block; the state becomes the new one.

    `next_norm` is the weight of the norm that follows, if that is known.
    """
    mixer, ffn, B = block.mixer, block.ffn, state.cell[0].shape[0]
    gate_proj = mixer.gate_proj
    out = rows.x.new_empty(len(rows.x), gate_proj.out_features, dtype=torch.float32)
    gates = Gates(gate_proj.weight, gate_proj.bias, out)
    qkvo = multiply(rows, mixer.qkvo_proj.weight, norm=_norm(block.mixer_norm), gates=gates).x
    y, _ = mixer.heads(qkvo.unflatten(0, (B, -1)), out.unflatten(0, (B, -1)), state.cell, True, mask)
    if rows.x.dtype == torch.float16:  # where rows that are not normalised yet could overflow
        ffn_norm = next_norm = None
    else:
        ffn_norm = block.ffn_norm.weight
    rows = multiply(Rows(y.flatten(0, 1)), mixer.out_proj.weight, residual=rows.x, next_norm=ffn_norm)
    y = multiply(rows, ffn.up_proj.weight, norm=_norm(block.ffn_norm), activation="silu").x
    return multiply(Rows(y), ffn.down_proj.weight, residual=rows.x, next_norm=next_norm)


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight, norm.eps)
