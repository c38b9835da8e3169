"""Short hashes by which a saved state knows the model that read its text, and the tokenizer that made ids of it.

They find mistakes, not forgeries.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_xlstm import XLSTMConfig


WORDS = 1 << 14  # of 32 bits, that share a checksum: a part of what the fingerprint is, unlike the next two
PIECE, PIECE_ON_CPU = 1 << 25, 1 << 20  # bytes handled at once: what is few kernels, and what stays in the cache


def state_fields(config: XLSTMConfig) -> dict[str, Any]:
    """What the state of a text depends on and the weights do not show, by the name of the field."""
    names = ["block_types", "norm_type", "norm_eps", "keep_gates_in_fp32"]
    if "mlstm" in config.block_types:
        names += ["mlstm_block", "num_heads", "mlstm_input_gate", "gate_soft_cap", "eps"]
    if "slstm" in config.block_types:
        names += ["slstm_num_heads"]
    return {name: getattr(config, name) for name in names}


def find_stack(model: nn.Module) -> Any:
    """The `XLSTMModel` that `model` is or has inside. Raises TypeError if there is none."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        config = getattr(module, "config", None)
        if hasattr(module, "embed_tokens") and getattr(config, "model_type", None) == XLSTMConfig.model_type:
            return module
    raise TypeError(f"model must be an xLSTM of this package, got {type(model).__name__}.")


def model_fingerprint(model: nn.Module) -> str:
    """A hash of all that decides into which state `model` reads a text, in hexadecimal.

    Args:
        model: An `XLSTMModel`, or what has one inside: a model with a head, or one that PEFT has wrapped.

    Hashed are the name, dtype, shape and every bit of each weight of the stack, be it quantised or an adapter's; which
    adapters are active, and their scale; prompts that PEFT has learned; and the fields in `state_fields`. Heads are
    not, nor is what changes a state by no more than rounding: device, kernels, `chunk_size`, autocast. The hash is the
    same in every process and on every device, and after saving and loading.

    The weights are read once, where they are; of each 64 KiB a checksum of 64 bits comes to the host, all at once.

    Raises:
        TypeError: There is no xLSTM in `model`, or one with weights that are no tensors.
        ValueError: Weights are not in memory in full: offloaded, or sharded over devices.
    """
    stack = find_stack(model)
    weights = dict(stack.state_dict()) | dict(stack.named_buffers())  # those too that are not saved
    if (prompt := getattr(model, "prompt_encoder", None)) is not None:
        weights |= prompt.state_dict(prefix="prompt_encoder.")
    for name in sorted(weights):
        _check_weight(name, weights[name])
    plain = {name: x for key in sorted(weights) for name, x in _plain(key, weights[key])}
    described = {
        "fields": {name: float(x) if type(x) is int else x for name, x in state_fields(stack.config).items()},
        "adapters": _adapters(stack),
        "weights": [[name, str(x.dtype), list(x.shape)] for name, x in plain.items()],
    }
    buffers: Buffers = {}
    sums = [_checksums(x, buffers) for x in plain.values()]
    numbers = torch.cat([x.to(sums[0].device) for x in sums]).cpu()
    return hashlib.sha256(json.dumps(described).encode() + numbers.numpy().tobytes()).hexdigest()


def _check_weight(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"The weights of the model must be tensors, got {type(x).__name__} for {name}.")
    if x.is_meta or hasattr(x, "placements") or not x.numel():  # PyTorch's sharded tensors have placements
        where = "the meta device" if x.is_meta else f"{type(x).__name__} of shape {tuple(x.shape)}"
        raise ValueError(
            f"The weights of the model must be in memory in full, not offloaded or sharded, got {where} for {name}."
        )


def _plain(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The ordinary tensors that x is made of: those of quantisers are of classes of their own."""
    if not hasattr(x, "__tensor_flatten__"):
        yield name, x
        return
    for part in x.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{part}", getattr(x, part))


def _adapters(stack: nn.Module) -> dict[str, Any]:
    """By layer, what decides about PEFT's adapters besides their weights."""
    return {
        name: [module.active_adapters, module.disable_adapters, getattr(module, "scaling", None)]
        for name, module in stack.named_modules()
        if hasattr(module, "adapter_layer_names")  # as PEFT's layers have
    }


Buffers = dict[torch.device, tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def _checksums(x: Tensor, buffers: Buffers) -> Tensor:
    """A checksum of each `WORDS` words of x, on its device: the sum, modulo 2^64, of word i times a random key i.

    Integers add up to the same in any order. Words of half the bits leave no two changes that cancel for every key.
    """
    if x.device not in buffers:
        random = bytearray(hashlib.shake_256(b"modeling_xlstm").digest(8 * WORDS))
        keys = torch.frombuffer(random, dtype=torch.int64).to(x.device) | 1
        words = keys.new_empty((PIECE_ON_CPU if x.device.type == "cpu" else PIECE) // 4, dtype=torch.int32)
        buffers[x.device] = keys, words.view(-1, WORDS), keys.new_empty(len(words) // WORDS, WORDS)
    keys, words, products = buffers[x.device]
    data = words.view(torch.uint8).view(-1)
    sums = []
    for piece in x.contiguous().view(-1).view(torch.uint8).split(len(data)):
        rows = math.ceil(len(piece) / (4 * WORDS))
        data[: len(piece)] = piece
        data[len(piece) : rows * 4 * WORDS] = 0
        sums.append(products[:rows].copy_(words[:rows]).mul_(keys).sum(1))
    return torch.cat(sums)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what turns a text into ids, in hexadecimal: neither padding, truncation nor chat templates.

    Of a fast tokenizer that is its serialised backend, of another its class, vocabulary and special tokens.

    Raises TypeError if `tokenizer` is none of Transformers'.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        described = json.loads(backend.to_str())
        for unrelated in ("padding", "truncation", "decoder"):  # the first two change with each call
            described.pop(unrelated, None)
    elif hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "special_tokens_map"):
        vocabulary, special = tokenizer.get_vocab(), tokenizer.special_tokens_map
        described = [type(tokenizer).__name__, vocabulary, {name: str(token) for name, token in special.items()}]
    else:
        raise TypeError(f"tokenizer must be one of Transformers, got {type(tokenizer).__name__}.")
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
