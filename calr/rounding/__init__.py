"""Rounding of a weight matrix to a quantised form: scales by search, integers by GPTQ, refit;
and the low-rank path beside it."""

from calr.rounding.corrective import truncate
from calr.rounding.matrix import Rounded, round_matrix, rounding_operations

__all__ = ["Rounded", "round_matrix", "rounding_operations", "truncate"]
