"""Where Triton's kernels are tested: on a GPU, or in Triton's interpreter on a CPU. Without Triton, importers skip."""

import pytest
import torch

from modeling_xlstm.backends import INTERPRETED


pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
RUN = GPU or INTERPRETED
needs_somewhere_to_run = pytest.mark.skipif(not RUN, reason="needs a GPU, or TRITON_INTERPRET=1")


def compilations(module) -> int:
    """How many programs of a module's kernels are compiled by now."""
    kernels = [x for name, x in vars(module).items() if name.endswith("_kernel")]
    return sum(len(cache) for kernel in kernels for cache, *_ in kernel.device_caches.values())
