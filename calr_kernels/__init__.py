"""Low-rank linear operations: `y = U(Vx) + B(Ax) + b` in the two-factor and the pivoted layout."""

from calr_kernels.nn import LowRankLinear
from calr_kernels.ops import gram, grouped_linear, lowrank_linear, pivoted_linear
from calr_kernels.svd import error_estimate, randomized_svd, truncated_eigh

__version__ = "0.1.0"
__all__ = [
    "LowRankLinear",
    "__version__",
    "error_estimate",
    "gram",
    "grouped_linear",
    "lowrank_linear",
    "pivoted_linear",
    "randomized_svd",
    "truncated_eigh",
]
