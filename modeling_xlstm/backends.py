"""Which implementation runs an op: the only place that asks what is installed or built in.

`"auto"` may choose, per call, from the device of the tensors. A name obeys or raises with the reason.
"""

import torch
import transformers
from packaging.version import Version


BACKENDS = ("auto", "torch", "triton")
HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Earlier versions start over from the first token when they read a prompt in pieces, whatever a cache has seen.
READS_ON_IN_PIECES = Version(transformers.__version__) >= Version("5.21")


def resolve(requested: str, tensor: torch.Tensor) -> str:
    """The backend, `"torch"` or `"triton"`, that serves `requested` for an op on `tensor`.

    Raises ValueError for an unknown name and NotImplementedError for a backend that cannot serve this tensor.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {requested!r}.")
    if requested == "triton":
        raise NotImplementedError(
            f"backend 'triton' was requested for tensors on {tensor.device}, but this version has no Triton kernels; "
            "use 'auto' or 'torch'."
        )
    return "torch"
