"""A block of xLSTM-7B for a few tokens in six kernels: what `XLSTMBlock` computes, for inference.

| kernel | reads | computes |
|---|---|---|
| product | q, k, v, o and gates | norm before it |
| steps of the cell | its state | h |
| the rest of the cell | h | n and m of the state, norm of heads and output gate |
| product | output projection | residual |
| product | gate and up projection | norm before it, SwiGLU behind it |
| product | down projection | residual |

With more than one row a norm is a kernel of its own. Weights and states are read once, and nothing else of their size.
"""

from typing import Any

import torch
from torch import Tensor

from .backends import INTERPRETED
from .cache_xlstm import LayerState
from .layers_xlstm import GateLinear, MLSTMLayer, is_few
from .linear import is_for_triton, is_hooked
from .linear_triton import Gates, Norm, multiply


def takes(block: Any, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None) -> bool:
    """Whether `block_steps` serves this: a plain block of xLSTM-7B in half precision, and a state to overwrite."""
    if not (x.is_cuda or INTERPRETED):
        return False
    mixer = block.mixer
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or block.training:
        return False
    if type(mixer) is not MLSTMLayer or type(mixer.gate_proj) is not GateLinear:  # which may have an adapter
        return False
    if state is None or not state.in_place or cu_seqlens is not None or not is_few(*x.shape[:2]):
        return False
    products = (mixer.qkvo_proj, mixer.out_proj, block.ffn.up_proj, block.ffn.down_proj)
    return (
        mixer.config.norm_type == "rms_norm"
        and block.mixer_norm.bias is None
        and mixer.gate_proj.bias is not None
        and all(is_for_triton(module, x, mixer.backend) for module in products)
        and not any(is_hooked(module) for module in block.modules())
    )


def block_steps(block: Any, x: Tensor, state: LayerState, mask: Tensor | None) -> Tensor:
    """x `[B, T, D]` to that behind the block; the state becomes the new one."""
    B, T, D = x.shape
    mixer, ffn = block.mixer, block.ffn
    x = x.reshape(B * T, D)
    gate_proj = mixer.gate_proj
    gates = Gates(gate_proj.weight, gate_proj.bias, x.new_empty(B * T, gate_proj.out_features, dtype=torch.float32))
    qkvo = multiply(x, mixer.qkvo_proj.weight, norm=_norm(block.mixer_norm), gates=gates)
    y, _ = mixer.heads(qkvo.view(B, T, -1), gates.out.view(B, T, -1), state.cell, True, mask)
    x = multiply(y.flatten(0, 1), mixer.out_proj.weight, residual=x)
    y = multiply(x, ffn.up_proj.weight, norm=_norm(block.ffn_norm), activation="silu")
    return multiply(y, ffn.down_proj.weight, residual=x).view(B, T, D)


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight, norm.eps)
