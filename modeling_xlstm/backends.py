"""Which implementation runs an op: the only place that asks what is installed or built in.

`"auto"` may choose, per call, from the device of the tensors. A name obeys or raises with the reason.
"""

import importlib.util
import os
from functools import cache

import torch
import transformers
from packaging.version import Version
from transformers.modeling_outputs import BaseModelOutputWithPast

from .custom_op import is_compiling


BACKENDS = ("auto", "torch", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run in Python, on tensors of a CPU
HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HAS_ONEDNN_PACKING = (
    HAS_ONEDNN_LINEAR
    and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
# Earlier versions start over from the first token when they read a prompt in pieces, whatever a cache has seen.
READS_ON_IN_PIECES = Version(transformers.__version__) >= Version("5.21")
# Earlier versions take one kind of parallelism and leave out others that are asked for beside it.
COMBINES_PARALLELISM = Version(transformers.__version__) >= Version("5.23")
# What Transformers calls the state of a text so far, in outputs and within `generate`, and what other versions call it.
CACHE, OTHER_NAMES = "past_key_values", ("cache", "cache_params")
if "cache" in BaseModelOutputWithPast.__dataclass_fields__:  # since 5.24
    CACHE, OTHER_NAMES = "cache", ("past_key_values", "cache_params")


def resolve(requested: str, tensor: torch.Tensor, op: str = "mLSTM") -> str:
    """The backend, `"torch"` or `"triton"`, that serves `requested` for an op (`"mLSTM"`, `"sLSTM"`) on `tensor`.

    Raises ValueError for an unknown name and NotImplementedError for a backend that cannot serve this tensor.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {requested!r}.")
    if requested == "torch" or (requested == "auto" and tensor.device.type != "cuda"):
        return "torch"
    obstacle = _obstacle_to_triton(tensor, op)
    if obstacle is None:
        return "triton"
    if requested == "auto":
        return "torch"
    raise NotImplementedError(
        f"backend 'triton' was requested for tensors on {tensor.device}, but {obstacle}; use 'auto' or 'torch'."
    )


def needs_triton(requested: str, tensor: torch.Tensor) -> bool:
    """Whether `resolve` gives Triton to what a compiler would make one kernel of by itself, and none does here."""
    return HAS_TRITON and not is_compiling() and resolve(requested, tensor) == "triton"


gpu_properties = cache(torch.cuda.get_device_properties)


def _obstacle_to_triton(tensor: torch.Tensor, op: str) -> str | None:
    if not HAS_TRITON:
        return "the package triton is not installed"
    if tensor.dtype == torch.float64:
        return "the kernels take float16, bfloat16 and float32, not float64"
    if tensor.device.type == "cuda":
        # a compiler knows the one, the other takes no time
        properties = torch.cuda.get_device_properties if is_compiling() else gpu_properties
        if properties(tensor.device).major < 8:
            return "the kernels need a GPU of compute capability 8.0 or later"
    elif not INTERPRETED:
        return "the kernels run on GPUs (elsewhere only under TRITON_INTERPRET=1, as a check)"
    if op == "sLSTM":
        from .slstm_triton import obstacle

        return obstacle(tensor.shape[-1], tensor.dtype, tensor.device)
    return None
