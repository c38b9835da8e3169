"""Checkpoints as their origins leave them, and what tests compare of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from peers import Peer, in_transformers, large, paper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


# As their origins save them, with every parameter random.
ORIGINS: dict[str, tuple[Callable[..., Peer], dict[str, Any]]] = {
    "paper": (paper, {"blocks": 3, "slstm_at": [1]}),
    "paper_mlstm": (paper, {}),
    "paper_slstm": (paper, {"slstm_at": "all"}),
    "paper_cuda": (paper, {"blocks": 3, "slstm_at": [0, 2], "backend": "cuda", "slstm_heads": 2}),
    "paper_tied": (paper, {"slstm_at": [1], "tie_weights": True}),
    "paper_bias": (paper, {"slstm_at": [1], "bias": True, "ffn": {"bias": True}}),
    "paper_no_ffn": (paper, {"slstm_at": [1], "ffn": None, "add_post_blocks_norm": False}),
    "paper_48_blocks": (paper, {"blocks": 48, "slstm_at": [3, 20, 47]}),
    "large": (large, {}),
    "large_bias": (large, {"use_bias": True}),
    "large_fused": (large, {"weight_mode": "fused"}),
    "large_fused_12_blocks": (large, {"weight_mode": "fused", "blocks": 12, "hidden": 48}),
    "large_fused_32_blocks": (large, {"weight_mode": "fused", "blocks": 32, "hidden": 56}),
    "large_48_blocks": (large, {"blocks": 48, "hidden": 48}),
    "large_sigmoid": (
        large,
        {"chunkwise_kernel": "parallel--native_siging_autograd", "mode": "train", "return_last_states": False},
    ),
    "large_no_caps_no_norm": (
        large,
        {"add_out_norm": False, "gate_soft_cap": None, "output_logit_soft_cap": None, "norm_eps": 1e-5},
    ),
    "transformers": (in_transformers, {"which": "own"}),
    "transformers_bias": (in_transformers, {"which": "own", "use_bias": True}),
    "transformers_odd_width": (in_transformers, {"which": "own", "hidden": 96, "heads": 3, "blocks": 3}),
}


def save(origin: Peer, folder: Path) -> Path:
    """The checkpoint of a peer, as its own code would leave it."""
    if origin.fmt == "transformers":
        origin.model.save_pretrained(folder)  # type: ignore[operator]
        return folder
    folder.mkdir()
    state_dict = {name: weight.clone() for name, weight in origin.model.state_dict().items()}
    save_file(state_dict, folder / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(origin.config)), encoding="utf-8")
    return folder


@torch.no_grad()
def like_trained(model: nn.Module, blocks: int) -> None:
    """Weights still random, but as training starts from and keeps them: a deep stack that does not magnify rounding.

    What a block adds shrinks with the depth, and input gates are nearly closed, so that no normaliser is near zero.
    """
    for name, parameter in model.named_parameters():
        if "proj_down" in name or "out_proj" in name:
            parameter.mul_((2 * blocks) ** -0.5)
        if name.endswith("igate_preact.bias"):
            parameter.sub_(10)
        if name.endswith("ifgate_preact.bias"):  # [i | f]
            parameter[: len(parameter) // 2].sub_(10)


def weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a converted checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


def text() -> Tensor:
    """Token ids, one of the texts of `test_parity`, in which no head's normaliser nearly vanishes."""
    return torch.randint(0, 99, (2, 17), generator=torch.Generator().manual_seed(70))


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert actual[name].dtype == weight.dtype
        assert torch.equal(actual[name], weight), name


def assert_same_logits(actual: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= bound, f"differs by {error:.1e} of the largest value, allowed {bound:.0e}"
