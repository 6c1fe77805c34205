"""Compressed linear operations: low rank, in the two-factor and the pivoted layout, and quantised.

Depends on torch, and on triton where there is a GPU; knows nothing of models or of `calr`. Names
are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calr_kernels.forms import Form
    from calr_kernels.nn import LowRankLinear, QuantizedEmbedding, QuantizedLinear, warmup
    from calr_kernels.ops import gram, grouped_linear, lowrank_linear, pivoted_linear
    from calr_kernels.quantized import quantized_linear
    from calr_kernels.svd import error_estimate, randomized_svd, truncated_eigh

_HOMES = {
    "Form": "forms",
    "LowRankLinear": "nn",
    "QuantizedEmbedding": "nn",
    "QuantizedLinear": "nn",
    "error_estimate": "svd",
    "gram": "ops",
    "grouped_linear": "ops",
    "lowrank_linear": "ops",
    "pivoted_linear": "ops",
    "quantized_linear": "quantized",
    "randomized_svd": "svd",
    "truncated_eigh": "svd",
    "warmup": "nn",
}
__all__ = [
    "Form",
    "LowRankLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "error_estimate",
    "gram",
    "grouped_linear",
    "lowrank_linear",
    "pivoted_linear",
    "quantized_linear",
    "randomized_svd",
    "truncated_eigh",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'calr_kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(f"calr_kernels.{_HOMES[name]}"), name)
