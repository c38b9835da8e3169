"""A block of xLSTM-7B for a few tokens in Triton against the block itself, on a GPU or in Triton's interpreter."""

import copy

import pytest
import torch
from numerics import assert_each, assert_matches
from torch import nn
from triton_device import DEVICE, GPU, RUN, needs_somewhere_to_run

from modeling_xlstm import LayerState, XLSTMBlock, XLSTMConfig
from modeling_xlstm.cache_xlstm import state_shapes
from modeling_xlstm.mlstm import MLSTMState


pytestmark = [pytest.mark.usefixtures("poisoned_memory"), needs_somewhere_to_run]

if RUN:
    from modeling_xlstm.block_triton import block_steps, step_weights

DTYPES = (torch.float16, torch.bfloat16) if GPU else (torch.float16,)
CONFIG = {"hidden_size": 64, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 100}


def block_of(dtype, **fields):
    block = XLSTMBlock(XLSTMConfig(**CONFIG | fields)).eval().requires_grad_(False)
    for name, weight in block.named_parameters():
        if "gate_proj" not in name:
            weight.copy_((weight + 0.1 * torch.randn_like(weight)).to(dtype))
            weight.data = weight.data.to(dtype)
    return block


def state_of(block, B):
    shapes = state_shapes(block.mixer.config)["mlstm"]
    C, n, m = (torch.randn(B, *shapes[name]) for name in ("C", "n", "m"))
    return MLSTMState(C, n.abs() + 1, m)


def run_block(block, x, state, mask):
    """By PyTorch, one token after the other."""
    block.mixer.backend = block.ffn.backend = "torch"
    state, y = LayerState(state), torch.empty_like(x)
    for t in range(x.shape[1]):
        y[:, t : t + 1], state = block(x[:, t : t + 1], state, mask=None if mask is None else mask[:, t : t + 1])
    return {"y": y, **state.cell._asdict()}


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("B, T", [(1, 1), (3, 1), (1, 5), (2, 4)])
def test_few_tokens_are_those_of_the_block(B, T, masked, dtype):
    block, x = block_of(dtype), torch.randn(B, T, 64).to(dtype)
    state, mask = state_of(block, B), torch.rand(B, T) > 0.3 if masked else None
    double = copy.deepcopy(block).double()
    oracle = run_block(double, x.double(), MLSTMState(*(s.double() for s in state)), mask)
    baseline = run_block(copy.deepcopy(block), x, state, mask)
    block.to(DEVICE).mixer.backend = "triton"
    owned = LayerState(MLSTMState(*(s.to(DEVICE, copy=True) for s in state)), in_place=True)
    weights = step_weights(block, x.to(DEVICE), owned, None)
    y = block_steps(block, weights, x.to(DEVICE), owned, None if mask is None else mask.to(DEVICE))
    assert_each(
        assert_matches, {"y": y.cpu(), **{k: s.cpu() for k, s in owned.cell._asdict().items()}}, oracle, baseline
    )


@torch.no_grad()
def test_what_a_block_has_besides_is_left_to_the_block():
    block, x = block_of(torch.float16).to(DEVICE), torch.randn(2, 1, 64, dtype=torch.float16, device=DEVICE)
    block.mixer.backend = "triton"
    owned = LayerState(MLSTMState(*(s.to(DEVICE) for s in state_of(block, 2))), in_place=True)
    assert step_weights(block, x, owned, None)
    assert not step_weights(block, x, owned._replace(in_place=False), None)
    assert not step_weights(block, x.float(), owned, None)
    assert not step_weights(block, x.expand(2, 17, 64), owned, None)
    assert not step_weights(block, x, owned, torch.tensor([0, 2], device=DEVICE))
    with torch.enable_grad():
        assert not step_weights(block, x, owned, None)
    hook = block.ffn.register_forward_hook(lambda *_: None)
    assert not step_weights(block, x, owned, None)
    hook.remove()
    block.mixer.gate_proj.forward = lambda x: x
    assert not step_weights(block, x, owned, None)
    del block.mixer.gate_proj.forward
    gate_proj, block.mixer.gate_proj = block.mixer.gate_proj, nn.Sequential(block.mixer.gate_proj)
    assert not step_weights(block, x, owned, None)
    block.mixer.gate_proj = gate_proj
    assert step_weights(block, x, owned, None)
    block.mixer.backend = "torch"
    assert not step_weights(block, x, owned, None)
    block.mixer.backend = "triton"
    assert not step_weights(block.train(), x, owned, None)
    for fields in ({"norm_type": "layer_norm"}, {"use_bias": True}, {"mlstm_block": "pre_up"}):
        other = block_of(torch.float16, **fields).to(DEVICE)
        other.mixer.backend = "triton"
        assert not step_weights(other, x, owned, None)
