"""The published implementations that ours must agree with: tiny models for a CPU with every parameter random.

They are imported only here: `xlstm` (its `xLSTMLMModel` and `xLSTMLarge`) and the xLSTM of Transformers. With `xlstm`
installed, Transformers replaces the blocks of its model by those of that package, so that one name stands for two. Both
are here: `"swapped"` is what Transformers gives, `"own"` a second import of it that does not see `xlstm`.

`xLSTMLarge`, and with it `"swapped"`, needs `mlstm_kernels` and thereby Python 3.11; the rest does not import it.
"""

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers.models.xlstm
import transformers.utils
from torch import Tensor, nn
from xlstm import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMLMModel,
    xLSTMLMModelConfig,
)


VOCAB = 99
DEFAULTS: Mapping[str, Any] = types.MappingProxyType({})


class Peer(NamedTuple):
    """A model, its configuration, and the format that `modeling_xlstm.checkpoint_xlstm` knows it by."""

    model: nn.Module
    config: Any
    fmt: str

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits `[B, T, vocabulary]` of a whole text, without a cache."""
        if self.fmt == "transformers":
            return self.model(ids, use_cache=False).logits
        return self.model(ids)

    @property
    def blocks(self) -> Iterable[nn.Module]:
        prefix = "xlstm_block_stack" if self.fmt.startswith("xlstm-paper") else "backbone"
        return self.model.get_submodule(f"{prefix}.blocks").children()


def seeded(build: Callable[..., Peer]) -> Callable[..., Peer]:
    """The same weights at each call, whatever random numbers came before."""

    @functools.wraps(build)
    def build_seeded(*args: Any, **kwargs: Any) -> Peer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(*args, **kwargs)

    return build_seeded


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Moves every element of every parameter, to where inputs enter, memory lasts and logits reach their cap."""
    for name, parameter in model.named_parameters():
        before = parameter.clone()
        noise = torch.randn(parameter.shape)
        if parameter.dim() > 1:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        elif name.endswith("gate_preact.bias"):
            parameter.copy_(noise + 3 * ("fgate" in name))
        else:
            parameter.add_(0.3 * noise)
        if name == "lm_head.weight":
            parameter.mul_(5)
        unmoved = (parameter == before).sum().item()
        assert not unmoved, f"{unmoved} elements of {name} are still at their initial value"
    return model.eval()


@seeded
def paper(
    hidden: int = 64,
    blocks: int = 2,
    slstm_at: Any = (),
    heads: int = 4,
    slstm_heads: int | None = None,
    mlstm: Mapping[str, Any] = DEFAULTS,
    slstm: Mapping[str, Any] = DEFAULTS,
    ffn: Mapping[str, Any] | None = DEFAULTS,
    backend: str = "vanilla",
    **fields: Any,
) -> Peer:
    """`xLSTMLMModel`; the fields of its parts as mappings, `ffn=None` for no feed-forward."""
    kwargs = {"num_heads": slstm_heads or heads, "backend": backend, "dtype": "float32", **slstm}
    config = xLSTMLMModelConfig(
        vocab_size=VOCAB,
        context_length=128,
        embedding_dim=hidden,
        num_blocks=blocks,
        slstm_at=slstm_at if slstm_at == "all" else list(slstm_at),
        mlstm_block=mLSTMBlockConfig(mLSTMLayerConfig(num_heads=heads, **mlstm)),
        slstm_block=sLSTMBlockConfig(
            sLSTMLayerConfig(**kwargs), feedforward=None if ffn is None else FeedForwardConfig(**ffn)
        ),
        **fields,
    )
    # The CUDA backend compiles its kernels on construction; its weights do not need them.
    compiled = mock.patch("xlstm.blocks.slstm.cell.sLSTMCellFuncGenerator", return_value=None)
    with compiled if backend == "cuda" else contextlib.nullcontext():
        model = xLSTMLMModel(config)
    model.reset_parameters()
    return Peer(randomise(model), config, "xlstm-paper" if backend == "vanilla" else "xlstm-paper-cuda")


@seeded
def large(hidden: int = 64, blocks: int = 2, heads: int = 2, **fields: Any) -> Peer:
    """`xLSTMLarge` with the kernels that run on a CPU."""
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    native = {
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
        "mode": "inference",
    }
    config = xLSTMLargeConfig(
        embedding_dim=hidden, num_blocks=blocks, num_heads=heads, vocab_size=VOCAB, **{**native, **fields}
    )
    model = xLSTMLarge(config)
    if "parallel" in config.chunkwise_kernel:  # returns no state, which its own caller unpacks nevertheless
        for block in model.backbone.blocks:
            backend = block.mlstm_layer.mlstm_backend
            backend._train_fn = functools.partial(lambda kernel, **inputs: (kernel(**inputs), None), backend._train_fn)
    return Peer(randomise(model), config, "xlstm-large-fused" if config.weight_mode == "fused" else "xlstm-large")


@seeded
def in_transformers(which: str, hidden: int = 64, blocks: int = 2, heads: int = 2, **fields: Any) -> Peer:
    """`xLSTMForCausalLM` of Transformers, with its `"own"` blocks or those of `xlstm`, `"swapped"`."""
    package = _own_package() if which == "own" else "transformers.models.xlstm"
    module = importlib.import_module(f"{package}.modeling_xlstm")
    assert module.external_xlstm == (which == "swapped")
    config_class = importlib.import_module(f"{package}.configuration_xlstm").xLSTMConfig
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    fields = {"hidden_size": hidden, "num_hidden_layers": blocks, "num_heads": heads, "vocab_size": VOCAB, **fields}
    config = config_class(**{**tokens, **fields})
    return Peer(randomise(module.xLSTMForCausalLM(config)), config, "transformers")


@functools.cache
def _own_package() -> str:
    """The name of a second import of `transformers.models.xlstm`, made as if `xlstm` were not installed."""
    name = "transformers.models.xlstm_own"
    package = types.ModuleType(name)
    package.__path__ = transformers.models.xlstm.__path__
    sys.modules[name] = package
    with mock.patch.object(transformers.utils, "is_xlstm_available", return_value=False):
        importlib.import_module(f"{name}.modeling_xlstm")
    return name
