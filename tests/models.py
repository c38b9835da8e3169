"""Tiny models of every kind of block with every parameter random, and what the tests of models share."""

from typing import Any

import torch
from torch import Tensor, nn

from modeling_xlstm import XLSTMCache, XLSTMConfig, XLSTMForCausalLM


VOCAB = 99

# name: fields that differ from a tiny xLSTM-7B
KINDS: dict[str, dict[str, Any]] = {
    "post_up": {},
    "sigmoid": {"mlstm_input_gate": "sigmoid"},
    "pre_up": {"mlstm_block": "pre_up"},
    "slstm": {"block_types": ["slstm", "slstm"]},
    "post_up_slstm": {"block_types": ["mlstm", "slstm"]},
    "pre_up_slstm": {
        "mlstm_block": "pre_up",
        "num_hidden_layers": 3,
        "block_types": ["mlstm", "slstm", "mlstm"],
        "norm_type": "layer_norm",
        "norm_eps": 1e-5,
        "gate_soft_cap": None,
        "output_logit_soft_cap": None,
    },
}
# Every code path once: a feed-forward after the mLSTM, and convolutions, layer norm and an sLSTM.
TWO_KINDS = ("post_up", "pre_up_slstm")


def tiny_config(kind: str = "post_up", **fields) -> XLSTMConfig:
    """A configuration of two or three blocks that never ends a text by itself."""
    tiny = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "chunk_size": 16,
        "ffn_round_up_to_multiple_of": 8,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 1,
    }
    return XLSTMConfig(**{**tiny, **KINDS[kind], **fields})


def tiny_model(kind: str = "post_up", cls: type = XLSTMForCausalLM, **fields) -> nn.Module:
    """A model in evaluation mode, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomise(cls(tiny_config(kind, **fields))).eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Moves every parameter away from its initial value, to where memory matters: inputs enter, and stay a while."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gate_proj.bias"):  # rows [i | f] of an mLSTM
            igate, fgate = noise.chunk(2)
            parameter.copy_(torch.cat((igate, 3 + fgate)))
        elif name.endswith("gate_bias"):  # [H, i f z o, D] of an sLSTM
            noise[:, 1] += 3
            parameter.copy_(noise)
        else:
            parameter.add_(0.2 * noise)
    return model


def random_ids(batch: int, time: int, seed: int = 0) -> Tensor:
    """Token ids that are neither padding nor the beginning of a text."""
    return torch.randint(2, VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def assert_near(actual: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """`actual` is finite and differs from `expected` by at most `bound` of the largest value expected."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all()
    if not expected.numel():
        return
    scale = expected.abs().max().clamp(min=1e-30)
    error = ((actual - expected).abs().max() / scale).item()
    assert error <= bound, f"differs by {error:.2e} of the largest value, allowed {bound:.0e}"


def states(cache: XLSTMCache) -> dict[str, Tensor]:
    """Every tensor of a cache by name."""
    return {
        f"{i}.{name}": tensor
        for i, layer in enumerate(cache.layers)
        if layer.state is not None
        for name, tensor in layer.state.tensors().items()
    }


def assert_same_states(actual: XLSTMCache, expected: XLSTMCache, bound: float = 5e-5) -> None:
    """Both caches hold the same states, within `bound` of the largest value of each tensor (0 for exactly)."""
    actual_states, expected_states = states(actual), states(expected)
    assert actual_states.keys() == expected_states.keys()
    assert actual_states
    for name, tensor in expected_states.items():
        assert_near(actual_states[name], tensor, bound)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter that has one, which `model` then no longer holds."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-4) -> None:
    """Both have the same gradients, within `bound` of the largest value of each."""
    assert actual.keys() == expected.keys()
    assert expected
    for name, gradient in expected.items():
        try:
            assert_near(actual[name], gradient, bound)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


class CountingBackend:
    """A backend for `torch.compile`, which forgets what was compiled before, and keeps the graphs that it is given."""

    def __init__(self):
        torch._dynamo.reset()
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def use_checkpointing(model, use_reentrant=False):
    """The model with gradient checkpointing, whatever this version of Transformers calls it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    return model
