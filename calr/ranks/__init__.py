"""Who gets which rank: budgets, error curves, the knapsack."""

from calr.ranks import report
from calr.ranks.allocation import feasible_last_k, last_k, least_error, uniform
from calr.ranks.budget import Budget, Ranks, Shape
from calr.ranks.decompositions import CACHE_BYTES, Decompositions, curves_name
from calr.ranks.final_state import FinalState, by_block

__all__ = [
    "CACHE_BYTES",
    "Budget",
    "Decompositions",
    "FinalState",
    "Ranks",
    "Shape",
    "by_block",
    "curves_name",
    "feasible_last_k",
    "last_k",
    "least_error",
    "report",
    "uniform",
]
