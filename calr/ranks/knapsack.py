"""A multiple-choice knapsack: one choice a layer, least error within a budget."""

import math

import numpy as np
import scipy.optimize

from calr.errors import CalrError


def solve(
    costs: list[list[int]], values: list[np.ndarray], budget: int, *, exact: bool = False
) -> list[int]:
    """Return the choice of every layer: costs and errors of all of them, layer by layer.

    Lagrangian bisection, then greedy by gain per cost; exact solves it with HiGHS instead. Never
    over budget, and what remains is smaller than the cheapest step that would still gain.
    """
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
    """Solve the multiple-choice knapsack with HiGHS to a relative gap of 1e-6."""
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
            scipy.optimize.LinearConstraint(flat[None] / budget, ub=1),
        ],
        integrality=np.ones(starts[-1]),
        bounds=scipy.optimize.Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    if result.x is None:
        raise CalrError(f"solver=exact: HiGHS found no allocation ({result.message})")
    return [
        int(result.x[start : start + size].argmax())
        for start, size in zip(starts, sizes, strict=False)
    ]


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
