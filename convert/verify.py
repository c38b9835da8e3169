"""Logits of a checkpoint by the code of its own origin, where that is installed."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM
from modeling_xlstm.checkpoint_xlstm import embedding_name

from .conversion import read_model_config
from .errors import PARSER_ERRORS, ConversionError, one_line
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


def check_runnable(config: XLSTMConfig, *formats: str) -> None:
    """Raises ConversionError if the code of one of the formats is not installed or cannot run the model here."""
    for fmt in formats:
        packages = next((names for prefix, names in PACKAGES.items() if fmt.startswith(prefix)), ())
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise ConversionError(f"--verify must have {package} to run the format {fmt}, which is not installed.")
        if fmt == "xlstm-paper-cuda" and not torch.cuda.is_available():
            raise ConversionError("--verify must have a GPU to run the CUDA sLSTM of the format xlstm-paper-cuda.")
        if fmt.startswith(("transformers", "xlstm-large")) and config.mlstm_input_gate != "exp":
            raise ConversionError(f"--verify must have exponential input gates to run the format {fmt}, got sigmoid.")


def largest_difference(source: Source, folder: Path) -> tuple[float, float]:
    """The largest difference between the logits of `source` and of the checkpoint in `folder`; the largest logit.

    Both are computed in float32, each by the code of its own origin, on the same random tokens.

    Raises ConversionError if the code of an origin cannot run its checkpoint.
    """
    vocabulary = len(source.meta[embedding_name(source.fmt)])
    ids = torch.randint(0, vocabulary, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    results = []
    for checkpoint in tqdm((source, open_source(str(folder))), "Verifying", unit="model", disable=None):
        try:
            results.append(logits(checkpoint, ids))
        except PARSER_ERRORS as error:
            raise ConversionError(
                f"The code of the format {checkpoint.fmt} cannot run it: {one_line(error)}"
            ) from error
    expected, actual = results
    return (actual - expected).abs().max().item(), expected.abs().max().item()


@torch.no_grad()
def logits(source: Source, ids: Tensor) -> Tensor:
    """Logits `[B, T, vocabulary]`, float32, of the tokens `ids` by the code that the format of `source` is made for."""
    config = read_model_config(source, [])  # whose sizes are those of the weights
    bar = tqdm(source.weights, f"Reading {source.fmt}", unit="weight", disable=None, leave=False)
    weights = {name: source.weights[name] for name in bar}
    weights.setdefault("lm_head.weight", weights[embedding_name(source.fmt)])
    if source.fmt == "native":
        model: nn.Module = XLSTMForCausalLM(config).float()
    elif source.fmt.startswith("xlstm-paper"):
        model = _paper(source.config, source.fmt).float()
    else:
        build = _in_transformers if source.fmt.startswith("transformers") else _large
        widths = {field: getattr(config, field) for field in ("ffn_proj_factor", "ffn_round_up_to_multiple_of")}
        model = build({**source.config, **widths}, source.fmt).float()
    model.load_state_dict(weights)
    if source.fmt in ("native", "transformers", "transformers-fused"):
        return model.eval()(ids, use_cache=False).logits
    device = "cuda" if source.fmt == "xlstm-paper-cuda" else "cpu"
    return model.to(device).eval()(ids.to(device)).cpu()


def _in_transformers(fields: Mapping[str, Any], fmt: str) -> nn.Module:
    from transformers import xLSTMConfig, xLSTMForCausalLM
    from transformers.initialization import no_init_weights

    fields = {name: value for name, value in fields.items() if value is not None}
    kernels = {**NATIVE_KERNELS, "weight_mode": "fused" if fmt.endswith("fused") else "single"}
    widths = {"hidden_size": fields.get("hidden_size", fields.get("embedding_dim", 4096))}
    layers = {"num_hidden_layers": fields.get("num_blocks", fields.get("num_hidden_layers", 32))}
    with no_init_weights():  # which fails for fused weights
        return xLSTMForCausalLM(xLSTMConfig(**{**fields, **widths, **layers, **kernels}))


def _large(fields: Mapping[str, Any], fmt: str) -> nn.Module:
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    own = {field.name for field in dataclasses.fields(xLSTMLargeConfig)}
    kernels = {**NATIVE_KERNELS, "weight_mode": "fused" if fmt.endswith("fused") else "single"}
    return xLSTMLarge(xLSTMLargeConfig(**{**{k: v for k, v in fields.items() if k in own}, **kernels}))


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
