"""Triton, or a sentence that says why the kernels cannot do without it."""

try:  # in a `try`, so that Transformers does not ask for it when it downloads this file to a machine without a GPU
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need the package triton, version 3.6 or later.") from error

__all__ = ["tl", "triton"]
