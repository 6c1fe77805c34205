"""Rounding of a weight matrix to a quantised form: scales by search, integers by GPTQ, refit;
and the low-rank path beside it."""

from calr.rounding.corrective import truncate
from calr.rounding.curvature import Curvature
from calr.rounding.gptq import Ordered
from calr.rounding.matrix import Rounded, round_matrix, rounding_operations
from calr.rounding.together import TOGETHER, most_together, order_matrices, round_matrices

__all__ = [
    "TOGETHER",
    "Curvature",
    "Ordered",
    "Rounded",
    "most_together",
    "order_matrices",
    "round_matrices",
    "round_matrix",
    "rounding_operations",
    "truncate",
]
