"""`torch.export` of a language model: prefill and decode as programs from tensors to tensors, for any batch and length.

The recurrent state, elsewhere in an `XLSTMCache`, is an argument and a return value: tensors by name. Layer i has

| block | tensor | shape |
|---|---|---|
| mLSTM | `layers_i_C`, `layers_i_n`, `layers_i_m` | `[B, H, K, V]`, `[B, H, K]`, `[B, H]` |
| sLSTM | `layers_i_h`, `layers_i_c`, `layers_i_n`, `layers_i_m` | `[B, H, D]` each |
| with a convolution, also | `layers_i_conv` | `[B, kernel size - 1, channels]` |

in float32 (float64 in a float64 model), in the order of the layers. A text starts from zeros.

Dims: `B` batch `T` time `H` heads `K` query and key dim `V` value dim `D` head dim of an sLSTM.
"""

import copy
import os
from functools import partial
from inspect import Parameter, Signature

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .cache_xlstm import LayerState, state_shapes
from .checks import state_dtype
from .fused import soft_cap
from .linear import linear
from .modeling_xlstm import XLSTMForCausalLM


def export_prefill(model: XLSTMForCausalLM, backend: str = "auto") -> ExportedProgram:
    """The program `logits, states = program.module()(input_ids, attention_mask, **states)`, which reads a prompt.

    Args:
        model: Whose weights, not copied, the program holds. Neither its mode nor its dtype matters.
        backend: As in `model.set_backend`, of the program alone. mLSTM and sLSTM over time are one op each, which a
            process that loads the program must have registered by `import modeling_xlstm`.

    The program takes input_ids and attention_mask `[B, T]` int64, any B and T from 1, of which 0 in the mask marks
    padding on the left; and the states before the prompt (`initial_states` for none), by name, as above. It returns
    the logits of the last position `[B, vocab_size]` in the dtype of the model, and a dict of the states after it.

    Raises TypeError if model is no XLSTMForCausalLM, and what `model.set_backend` raises.
    """
    return _export(model, backend, ["input_ids", "attention_mask"], {0: Dim("B", min=1), 1: Dim("T", min=1)})


def export_decode(model: XLSTMForCausalLM, backend: str = "torch") -> ExportedProgram:
    """The program `logits, states = program.module()(input_ids, **states)`, which reads one token of each sequence.

    As `export_prefill`, for input_ids `[B, 1]` int64, none of them padding. With the backend `"torch"` it consists of
    PyTorch's own ops, and runs where this package is not installed.
    """
    return _export(model, backend, ["input_ids"], {0: Dim("B", min=1)})


def package_decode(model: XLSTMForCausalLM, path: str | os.PathLike) -> str:
    """Compiles `export_decode(model)` by AOTInductor to a file, weights included, for the device of the model.

    What `torch._inductor.aoti_load_package(path)` returns is called as the program is, and needs neither this package
    nor a compiler. It trusts what it is given: all tensors must be contiguous, of one B, and of the dtypes above.
    `AOTI_RUNTIME_CHECK_INPUTS=1` in the environment makes it check dtypes and strides.

    Args:
        path: Where to write; ends with `.pt2`.

    Returns the path. Raises ValueError for another ending, what `export_decode` raises, and PyTorch's
    InvalidCxxCompiler where there is no C++ compiler.
    """
    path = os.fspath(path)
    if not path.endswith(".pt2"):
        raise ValueError(f"path must end with .pt2, got {path!r}.")
    # a package that checks its inputs would refuse a B of 1
    options = {"aot_inductor.check_lowerbound": False}
    return torch._inductor.aoti_compile_and_package(export_decode(model), package_path=path, inductor_configs=options)


def initial_states(model: XLSTMForCausalLM, batch_size: int) -> dict[str, Tensor]:
    """The states of `batch_size` empty texts, by name as above: zeros on the device of the model.

    Raises TypeError if model is no XLSTMForCausalLM, ValueError for a batch size below 1.
    """
    _check_model(model)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
    dtype, shapes, states = state_dtype(model.dtype), state_shapes(model.config), {}
    for i in range(model.config.num_hidden_layers):
        for name, shape in shapes[model.config.block_types[i]].items():
            states[f"layers_{i}_{name}"] = torch.zeros(batch_size, *shape, dtype=dtype, device=model.device)
    return states


class _Step(nn.Module):
    """A forward pass as a function of tensors only."""

    def __init__(self, model: XLSTMForCausalLM, inputs: list[str]):
        super().__init__()
        self.model = model
        # torch.export goes by the signature, and has no dynamic shapes for **states
        self.forward = partial(self._step)
        signature = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in inputs])
        self.forward.__signature__ = signature  # type: ignore[attr-defined]

    def _step(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **states: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, stack, shapes = self.model.config, self.model.model, state_shapes(self.model.config)
        mask = None if attention_mask is None else attention_mask != 0
        x, new = stack.embed_tokens(input_ids), dict[str, Tensor]()
        for i, block in enumerate(stack.layers):
            kind = config.block_types[i]
            before = LayerState.of(kind, {name: states[f"layers_{i}_{name}"] for name in shapes[kind]})
            keep = 1 if i + 1 == len(stack.layers) else None
            x, state = block(x, before, mask=mask, keep=keep)
            new |= {f"layers_{i}_{name}": tensor for name, tensor in state.tensors().items()}
        logits = soft_cap(linear(self.model.lm_head, stack.norm(x)), config.output_logit_soft_cap)
        return logits[:, -1], new


def _check_model(model: XLSTMForCausalLM) -> None:
    if not isinstance(model, XLSTMForCausalLM):
        raise TypeError(f"model must be an XLSTMForCausalLM, got {type(model).__name__}.")


def _export(model: XLSTMForCausalLM, backend: str, inputs: list[str], dims: dict[int, Dim]) -> ExportedProgram:
    """A program whose `inputs` `[B, T]`, besides the states, have dynamic `dims`: any B, and any T or 1."""
    states = initial_states(model, 2)
    # the weights themselves, without gradients, in modules that may be changed
    weights = {id(x): nn.Parameter(x.detach(), False) if x.requires_grad else x for x in model.parameters()}
    frozen = copy.deepcopy(model, weights).eval()
    frozen.set_backend(backend)
    # each a tensor of its own: torch.export takes the same tensor for the same input
    tokens = tuple(torch.ones(2, 3 if 1 in dims else 1, dtype=torch.int64, device=model.device) for _ in inputs)
    shapes = dict.fromkeys(inputs, dims) | {name: {0: dims[0]} for name in states}
    with torch.no_grad():
        return torch.export.export(_Step(frozen, list(shapes)), tokens, states, dynamic_shapes=shapes)
