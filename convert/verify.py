"""Logits of a checkpoint by the code of its own origin, where that is installed."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeling_xlstm import XLSTMForCausalLM

from .errors import ConversionError
from .source import Source, open_source


PACKAGES = {"xlstm-large": ("xlstm", "mlstm_kernels"), "xlstm-paper": ("xlstm",)}
# Kernels of the origins that run everywhere.
NATIVE_KERNELS = {
    "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
    "mode": "inference",
}
LENGTH = 64  # of the texts: one chunk
# Of the largest logit. Rounding gives at most 1e-4 in the worst text seen, a weight in a wrong place 1e-1 and more.
BOUND = 1e-3


def check_installed(*formats: str) -> None:
    """Raises ConversionError if the code of one of the formats is not installed or cannot run here."""
    for fmt in formats:
        packages = next((names for prefix, names in PACKAGES.items() if fmt.startswith(prefix)), ())
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise ConversionError(f"--verify must have {package} to run the format {fmt}, which is not installed.")
        if fmt == "xlstm-paper-cuda" and not torch.cuda.is_available():
            raise ConversionError("--verify must have a GPU to run the CUDA sLSTM of the format xlstm-paper-cuda.")


def largest_difference(source: Source, folder: Path) -> tuple[float, float]:
    """The largest difference between the logits of `source` and of the checkpoint in `folder`; the largest logit.

    Both are computed in float32, each by the code of its own origin, on the same random tokens.
    """
    vocabulary = source.meta["lm_head.weight" if "lm_head.weight" in source.meta else "model.embed_tokens.weight"]
    ids = torch.randint(0, len(vocabulary), (2, LENGTH), generator=torch.Generator().manual_seed(0))
    expected = logits(source, ids)
    actual = logits(open_source(str(folder)), ids)
    return (actual - expected).abs().max().item(), expected.abs().max().item()


@torch.no_grad()
def logits(source: Source, ids: Tensor) -> Tensor:
    """Logits `[B, T, vocabulary]`, float32, of the tokens `ids` by the code that the format of `source` is made for."""
    if source.fmt == "native":
        model = XLSTMForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
        return model(ids, use_cache=False).logits
    build = _in_transformers if source.fmt.startswith("transformers") else _large
    if source.fmt.startswith("xlstm-paper"):
        build = _paper
    model = build(source.config, source.fmt).float()
    model.load_state_dict(source.weights)
    device = "cuda" if source.fmt == "xlstm-paper-cuda" else "cpu"
    model.to(device).eval()
    if source.fmt.startswith("transformers"):
        return model(ids, use_cache=False).logits
    return model(ids.to(device)).cpu()


def _in_transformers(config: Mapping[str, Any], fmt: str) -> nn.Module:
    from transformers import xLSTMConfig, xLSTMForCausalLM
    from transformers.initialization import no_init_weights

    kernels = {**NATIVE_KERNELS, "weight_mode": "fused" if fmt.endswith("fused") else "single"}
    widths = {"hidden_size": config.get("hidden_size", config.get("embedding_dim", 4096))}
    layers = {"num_hidden_layers": config.get("num_blocks", config.get("num_hidden_layers", 32))}
    with no_init_weights():  # which fails for fused weights
        return xLSTMForCausalLM(xLSTMConfig(**{**config, **widths, **layers, **kernels}))


def _large(config: Mapping[str, Any], fmt: str) -> nn.Module:
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    kernels = {**NATIVE_KERNELS, "weight_mode": "fused" if fmt.endswith("fused") else "single"}
    return xLSTMLarge(xLSTMLargeConfig(**{**config, **kernels}))


def _paper(config: Mapping[str, Any], fmt: str) -> nn.Module:
    from xlstm import (
        FeedForwardConfig,
        mLSTMBlockConfig,
        mLSTMLayerConfig,
        sLSTMBlockConfig,
        sLSTMLayerConfig,
        xLSTMLMModel,
        xLSTMLMModelConfig,
    )

    def build(cls: type, fields: Mapping[str, Any] | None, **parts: Any) -> Any:
        if fields is None:
            return None
        own = {field.name for field in dataclasses.fields(cls) if not field.name.startswith("_")}
        return cls(**{**{key: value for key, value in fields.items() if key in own}, **parts})

    mlstm, slstm = config.get("mlstm_block"), config.get("slstm_block")
    parts: dict[str, Any] = {"mlstm_block": None, "slstm_block": None}
    if mlstm is not None:
        parts["mlstm_block"] = mLSTMBlockConfig(build(mLSTMLayerConfig, mlstm.get("mlstm", {})))
    if slstm is not None:
        backend = "cuda" if fmt == "xlstm-paper-cuda" else "vanilla"
        cell = build(sLSTMLayerConfig, slstm.get("slstm", {}), backend=backend, dtype="float32")
        parts["slstm_block"] = sLSTMBlockConfig(cell, build(FeedForwardConfig, slstm.get("feedforward", {})))
    return xLSTMLMModel(build(xLSTMLMModelConfig, config, **parts, context_length=LENGTH))
