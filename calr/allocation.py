"""Rank allocation: who gets which rank under a budget of parameters.

A rank of None leaves a layer dense. No allocation exceeds its budget, and what remains of it is
smaller than the cheapest next step that would still reduce the error.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize

from calr.errors import CalrError
from calr_kernels.nn import Layout, parameters, rank_at

Ranks = dict[str, int | None]


@dataclass(frozen=True)
class Shape:
    """A linear layer to allocate for: weight [out_features, in_features], ranks from least_rank."""

    name: str
    out_features: int
    in_features: int
    least_rank: int = 1

    @property
    def dense(self) -> int:
        """Parameters of the dense weight."""
        return self.out_features * self.in_features


def candidates(shape: Shape, layout: Layout, step: int) -> list[int | None]:
    """List the ranks worth having, ascending, then None for dense.

    Multiples of step, not below least_rank, that store fewer numbers than the dense weight.

    >>> candidates(Shape("q", 32, 32), "pivoted", 8)
    [8, 16, 24, None]
    """
    ranks: list[int | None] = []
    first = -(-shape.least_rank // step) * step
    for rank in range(first, min(shape.out_features, shape.in_features) + 1, step):
        if parameters(layout, shape.out_features, shape.in_features, rank) >= shape.dense:
            break
        ranks.append(rank)
    return [*ranks, None]


def cost(shape: Shape, layout: Layout, rank: int | None) -> int:
    """Count the parameters of a layer at a rank, or dense for None."""
    if rank is None:
        return shape.dense
    return parameters(layout, shape.out_features, shape.in_features, rank)


def require_reachable(
    shapes: Sequence[Shape], keep: float, layout: Layout, step: int, fixed: int = 0
) -> None:
    """Raise CalrError when even the smallest ranks keep more; fixed: as in `globally`."""
    smallest = [min(cost(s, layout, r) for r in candidates(s, layout, step)) for s in shapes]
    least = fixed + sum(smallest)
    total = fixed + sum(shape.dense for shape in shapes)
    if least > math.floor(keep * total + 1e-6):
        raise CalrError(
            f"keep={keep:.4g} is unreachable: the smallest ranks with this rank_step and skip keep "
            f"{least / total:.4f}; raise keep, lower rank_step or skip less"
        )


def uniform(
    shapes: Sequence[Shape], keep: float, layout: Layout, step: int, fixed: int = 0
) -> Ranks:
    """Keep the same fraction of every layer, rounded down to the step; fixed: as in `globally`.

    What rounding left over goes, step by step, to the layer that keeps the smallest fraction.
    """
    require_reachable(shapes, keep, layout, step, fixed)
    total = sum(shape.dense for shape in shapes)
    budget = math.floor(keep * (fixed + total) + 1e-6) - fixed
    share = min(1.0, (keep * (fixed + total) - fixed) / total)
    choices = [candidates(shape, layout, step) for shape in shapes]
    at = []
    for shape, options in zip(shapes, choices, strict=True):
        rank = rank_at(layout, shape.out_features, shape.in_features, share)
        fitting = [i for i, r in enumerate(options) if r is not None and r <= rank + 1e-9]
        at.append(len(options) - 1 if keep == 1 else fitting[-1] if fitting else 0)
    costs = [
        [cost(shape, layout, rank) for rank in options]
        for shape, options in zip(shapes, choices, strict=True)
    ]
    left = budget - sum(c[i] for c, i in zip(costs, at, strict=True))
    if left < 0:  # layers too small for one step took more than their share
        raise CalrError(
            f"keep={keep} with rank_step={step}: uniform ranks of small layers round up beyond the "
            "budget; lower rank_step or use allocation=global"
        )
    while True:
        steps = [
            (costs[i][at[i]] / shapes[i].dense, i)
            for i in range(len(shapes))
            if at[i] + 1 < len(costs[i]) and costs[i][at[i] + 1] - costs[i][at[i]] <= left
        ]
        if not steps:
            break
        layer = min(steps)[1]
        left -= costs[layer][at[layer] + 1] - costs[layer][at[layer]]
        at[layer] += 1
    return {s.name: c[i] for s, c, i in zip(shapes, choices, at, strict=True)}


def globally(
    shapes: Sequence[Shape],
    errors: Sequence[np.ndarray],
    keep: float,
    layout: Layout,
    step: int,
    fixed: int = 0,
    exact: bool = False,
) -> Ranks:
    """Minimise the summed error of all layers: a multiple-choice knapsack.

    errors: per layer [min(N, K) + 1], in one unit (of loss) for all layers; dense has error 0.
    fixed: parameters of layers that must stay dense; they count in what `keep` is a fraction of.
    Lagrangian bisection, then greedy by gain per parameter; exact solves it with HiGHS instead.
    """
    require_reachable(shapes, keep, layout, step, fixed)
    budget = math.floor(keep * (fixed + sum(shape.dense for shape in shapes)) + 1e-6) - fixed
    choices = [candidates(shape, layout, step) for shape in shapes]
    costs = [
        [cost(shape, layout, rank) for rank in options]
        for shape, options in zip(shapes, choices, strict=True)
    ]
    values = [
        np.array([0.0 if rank is None else float(curve[rank]) for rank in options])
        for curve, options in zip(errors, choices, strict=True)
    ]
    at = (_exact if exact else _lagrangian)(costs, values, budget)
    at = _spend(costs, values, at, budget)
    return {s.name: c[i] for s, c, i in zip(shapes, choices, at, strict=True)}


def last_k(
    blocks: Sequence[Sequence[Shape]],
    keep: float,
    layout: Layout,
    step: int,
    measure: Callable[[Ranks], float],
) -> Ranks:
    """Compress only the last k blocks, each at R_layer = L R_o / k (ERC-SVD, section 3.3).

    R_o = 1 - keep over L blocks; where blocks differ in size, what the last k must lose is shared
    by their parameters. Every feasible k is measured, and the ranks with the smallest `measure`
    (error of the final hidden state) win.
    """
    feasible = feasible_last_k(blocks, keep, layout, step)
    tried = [(measure(ranks), k) for k, (_, ranks) in feasible.items()]
    if not tried:
        raise CalrError(f"keep={keep}: no number of last blocks can reach it; raise keep")
    return feasible[min(tried)[1]][1]


def feasible_last_k(
    blocks: Sequence[Sequence[Shape]], keep: float, layout: Layout, step: int
) -> dict[int, tuple[float, Ranks]]:
    """Return, for each k that can reach keep, what its layers keep and all ranks."""
    sizes = [sum(shape.dense for shape in block) for block in blocks]
    found: dict[int, tuple[float, Ranks]] = {}
    for k in range(1, len(blocks) + 1):
        last = len(blocks) - k
        compressed = [shape for block in blocks[last:] for shape in block]
        size = sum(sizes[last:])
        layer_keep = 1 - (1 - keep) * sum(sizes) / size if size else 0.0
        if not 0 < layer_keep <= 1:
            continue
        ranks: Ranks = {shape.name: None for block in blocks[:last] for shape in block}
        try:
            found[k] = layer_keep, ranks | uniform(compressed, layer_keep, layout, step)
        except CalrError:
            continue
    return found


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
    at = list(at)
    left = budget - sum(c[i] for c, i in zip(costs, at, strict=True))
    while True:
        best, move = 0.0, None
        for layer, (c, v) in enumerate(zip(costs, values, strict=True)):
            for choice in range(len(c)):
                extra, gain = c[choice] - c[at[layer]], v[at[layer]] - v[choice]
                if gain > 0 and extra <= left and gain / max(extra, 1e-9) > best:
                    best, move = gain / max(extra, 1e-9), (layer, choice, extra)
        if move is None:
            return at
        at[move[0]] = move[1]
        left -= move[2]
