"""Who gets which rank under a budget of parameters.

No allocation exceeds its budget, and what remains of it is smaller than the cheapest next step that
would still reduce the error.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from calr.errors import CalrError
from calr.progress import progress
from calr.ranks import knapsack
from calr.ranks.budget import Budget, Ranks, Shape
from calr_kernels.layout import rank_at


def uniform(budget: Budget) -> Ranks:
    """Keep the same fraction of every layer, rounded down to the step.

    What rounding left over goes, step by step, to the layer that keeps the smallest fraction.
    Raises CalrError where layers too small for one step exceed the budget.
    """
    costs, at = budget.costs(), []
    for shape, options in zip(budget.shapes, budget.choices(), strict=True):
        rank = rank_at(budget.layout, shape.out_features, shape.in_features, budget.share)
        fitting = [i for i, r in enumerate(options) if r is not None and r <= rank + 1e-9]
        at.append(len(options) - 1 if budget.keep == 1 else fitting[-1] if fitting else 0)
    left = budget.parameters - sum(c[i] for c, i in zip(costs, at, strict=True))
    if left < 0:  # layers too small for one step took more than their share
        raise CalrError(
            f"keep={budget.keep} with rank_step={budget.step}: uniform ranks of small layers round "
            "up beyond the budget; lower rank_step or use allocation=global"
        )
    while True:
        steps = [
            (costs[i][at[i]] / shape.dense, i)
            for i, shape in enumerate(budget.shapes)
            if at[i] + 1 < len(costs[i]) and costs[i][at[i] + 1] - costs[i][at[i]] <= left
        ]
        if not steps:
            return budget.named(at)
        layer = min(steps)[1]
        left -= costs[layer][at[layer] + 1] - costs[layer][at[layer]]
        at[layer] += 1


def least_error(
    budget: Budget, errors: Mapping[str, Sequence[float] | np.ndarray], *, exact: bool = False
) -> Ranks:
    """Minimise the summed error of all layers: a multiple-choice knapsack.

    errors: per layer [min(N, K) + 1], in one unit (of loss) for all layers; dense has error 0.
    exact: by HiGHS, else by Lagrangian bisection.
    """
    values = [
        np.array([0.0 if rank is None else float(errors[shape.name][rank]) for rank in options])
        for shape, options in zip(budget.shapes, budget.choices(), strict=True)
    ]
    at = knapsack.solve(budget.costs(), values, budget.parameters, exact=exact)
    return budget.named(at)


def last_k(
    budget: Budget, blocks: Sequence[Sequence[Shape]], measure: Callable[[Ranks], float]
) -> Ranks:
    """Compress only the last k blocks, for the k whose ranks have the smallest measure (ERC-SVD).

    Raises CalrError when no k reaches the budget.
    """
    feasible = feasible_last_k(budget, blocks)
    if not feasible:
        raise CalrError(f"keep={budget.keep}: no number of last blocks can reach it; raise keep")
    choices = progress(feasible.items(), desc="last k", unit="choice")
    return feasible[min((measure(ranks), k) for k, (_, ranks) in choices)[1]][1]


def feasible_last_k(
    budget: Budget, blocks: Sequence[Sequence[Shape]]
) -> dict[int, tuple[float, Ranks]]:
    """Return, for each number k of last blocks that can reach the budget, what their layers keep
    and all ranks.

    Only the last k blocks are compressed, each at R_layer = L R_o / k (ERC-SVD, section 3.3),
    R_o = 1 - keep over L blocks; where blocks differ in size, what the last k must lose is shared
    by their parameters.
    """
    sizes = [sum(shape.dense for shape in block) for block in blocks]
    found: dict[int, tuple[float, Ranks]] = {}
    for k in range(1, len(blocks) + 1):
        last = len(blocks) - k
        size = sum(sizes[last:])
        keep = 1 - (1 - budget.share) * sum(sizes) / size if size else 0.0
        if not 0 < keep <= 1:
            continue
        dense: Ranks = {shape.name: None for block in blocks[:last] for shape in block}
        compressed = tuple(shape for block in blocks[last:] for shape in block)
        try:
            found[k] = keep, dense | uniform(budget.within(compressed, keep))
        except CalrError:
            continue
    return found
