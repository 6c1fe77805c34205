"""Who gets which rank, and which bits: budgets, error curves, the knapsack."""

from calr.ranks import report
from calr.ranks.allocation import feasible_last_k, last_k, least_error, uniform
from calr.ranks.bits import (
    PRICED,
    ByteBudget,
    Forms,
    Price,
    byte_budget,
    corrective_ranks,
    even,
    fitting_group,
    least_loss,
    parse_size,
)
from calr.ranks.budget import Budget, Ranks, Shape
from calr.ranks.decompositions import CACHE_BYTES, Decompositions, curves_name
from calr.ranks.final_state import FinalState, by_block

__all__ = [
    "CACHE_BYTES",
    "PRICED",
    "Budget",
    "ByteBudget",
    "Decompositions",
    "FinalState",
    "Forms",
    "Price",
    "Ranks",
    "Shape",
    "by_block",
    "byte_budget",
    "corrective_ranks",
    "curves_name",
    "even",
    "feasible_last_k",
    "fitting_group",
    "last_k",
    "least_error",
    "least_loss",
    "parse_size",
    "report",
    "uniform",
]
