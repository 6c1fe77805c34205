"""A multiple-choice knapsack: one choice a layer, least error within a budget."""

import math

import numpy as np
import scipy.optimize

from calr.errors import CalrError

TOLERANCE = 1e-6  # of a constraint, HiGHS's own


def solve(
    costs: list[list[int]], values: list[np.ndarray], budget: int, *, exact: bool = False
) -> list[int]:
    """Return the choice of every layer: costs and errors of all of them, layer by layer.

    Lagrangian bisection, then greedy by gain per cost; exact solves it with HiGHS instead. Never
    over budget, and what remains is smaller than the cheapest step that would still gain.
    """
    if not all(np.isfinite(value).all() for value in values):
        raise CalrError("what the choices cost in quality is not finite; collect statistics anew")
    at = (_exact if exact else _lagrangian)(costs, values, budget)
    return _spend(costs, values, at, budget)


def _lagrangian(costs: list[list[int]], values: list[np.ndarray], budget: int) -> list[int]:
    """Bisect the price of a parameter; return the cheapest-error choices within the budget."""
    arrays = [np.array(c, dtype=np.float64) for c in costs]

    def chosen(price: float) -> list[int]:
        return [int((v + price * c).argmin()) for v, c in zip(values, arrays, strict=True)]

    def total(at: list[int]) -> float:
        return float(sum(c[i] for c, i in zip(arrays, at, strict=True)))

    low, high = 0.0, 1e-12 + max(float(v.max()) for v in values)
    if total(chosen(low)) <= budget:
        return chosen(low)
    while total(chosen(high)) > budget:
        high *= 4
    for _ in range(100):
        middle = (low + high) / 2 if low == 0 else math.sqrt(low * high)
        if total(chosen(middle)) > budget:
            low = middle
        else:
            high = middle
    return chosen(high)


def _exact(costs: list[list[int]], values: list[np.ndarray], budget: int) -> list[int]:
    """Solve the multiple-choice knapsack with HiGHS to a relative gap of 1e-6.

    HiGHS may exceed the budget by its own tolerance: then it gets twice that less to spend, and
    where that is too little, Lagrangian bisection does it.
    """
    at = _solved(costs, values, budget, 1.0)
    if at is None:
        raise CalrError("solver=exact: HiGHS found no allocation")
    if _total(costs, at) > budget:
        at = _solved(costs, values, budget, 1 - 2 * TOLERANCE)
    return _lagrangian(costs, values, budget) if at is None or _total(costs, at) > budget else at


def _total(costs: list[list[int]], at: list[int]) -> int:
    return sum(cost[i] for cost, i in zip(costs, at, strict=True))


def _solved(
    costs: list[list[int]], values: list[np.ndarray], budget: int, most: float
) -> list[int] | None:
    """Let HiGHS spend at most a share of a budget; None where it finds nothing."""
    sizes = [len(c) for c in costs]
    starts = np.cumsum([0, *sizes])
    one_each = np.zeros((len(costs), starts[-1]))
    for layer, size in enumerate(sizes):
        one_each[layer, starts[layer] : starts[layer] + size] = 1
    objective = np.concatenate(values)
    scale = float(objective.max()) or 1.0
    flat = np.concatenate([np.array(c, dtype=np.float64) for c in costs])
    result = scipy.optimize.milp(
        objective / scale,
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(flat[None] / budget, ub=most),
        ],
        integrality=np.ones(starts[-1]),
        bounds=scipy.optimize.Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    if result.x is None:
        return None
    chosen = zip(starts, sizes, strict=False)
    return [int(result.x[start : start + size].argmax()) for start, size in chosen]


def _spend(
    costs: list[list[int]], values: list[np.ndarray], at: list[int], budget: int
) -> list[int]:
    """Spend what is left by gain per parameter until no better choice fits."""
    sizes = np.array([len(c) for c in costs])
    starts = np.cumsum(sizes) - sizes
    cost, value = np.concatenate([np.array(c) for c in costs]), np.concatenate(values)
    chosen = starts + at
    while True:
        extra = cost - np.repeat(cost[chosen], sizes)
        gain = np.repeat(value[chosen], sizes) - value
        fits = (gain > 0) & (extra <= budget - cost[chosen].sum())
        if not fits.any():
            return [int(i) for i in chosen - starts]
        best = int(np.where(fits, gain / np.maximum(extra, 1e-9), 0.0).argmax())
        chosen[np.searchsorted(starts, best, side="right") - 1] = best
