"""Low-rank linear operations: `y = U(Vx) + B(Ax) + b` in the two-factor and the pivoted layout.

Depends on torch, and on triton where there is a GPU; knows nothing of models or of `calr`. Names
are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calr_kernels.nn import LowRankLinear
    from calr_kernels.ops import gram, grouped_linear, lowrank_linear, pivoted_linear
    from calr_kernels.svd import error_estimate, randomized_svd, truncated_eigh

_HOMES = {
    "LowRankLinear": "nn",
    "error_estimate": "svd",
    "gram": "ops",
    "grouped_linear": "ops",
    "lowrank_linear": "ops",
    "pivoted_linear": "ops",
    "randomized_svd": "svd",
    "truncated_eigh": "svd",
}
__all__ = [
    "LowRankLinear",
    "error_estimate",
    "gram",
    "grouped_linear",
    "lowrank_linear",
    "pivoted_linear",
    "randomized_svd",
    "truncated_eigh",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'calr_kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(f"calr_kernels.{_HOMES[name]}"), name)
