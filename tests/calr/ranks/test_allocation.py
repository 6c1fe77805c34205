"""Allocation: budgets met, optimality against brute force and HiGHS."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calr.errors import CalrError
from calr.ranks import Budget, Shape, knapsack, last_k, least_error, uniform

LAYOUTS = st.sampled_from(["pivoted", "two_factor"])


@st.composite
def problems(draw):
    sizes = draw(
        st.lists(st.tuples(st.integers(4, 60), st.integers(4, 60)), min_size=1, max_size=6)
    )
    shapes = [Shape(f"layer{i}", n, k) for i, (n, k) in enumerate(sizes)]
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    errors = []
    for shape in shapes:
        energies = np.sort(rng.exponential(size=min(shape.out_features, shape.in_features)))[::-1]
        errors.append(np.append(energies[::-1].cumsum()[::-1], 0) * rng.exponential())
    return shapes, errors


def allocated(shapes, errors, *budget, exact=False, **more):
    """Ranks of least error; errors: a curve a shape."""
    curves = {shape.name: curve for shape, curve in zip(shapes, errors, strict=True)}
    return least_error(Budget(tuple(shapes), *budget, **more), curves, exact=exact)


def budget(blocks, keep, step):
    return Budget(tuple(shape for block in blocks for shape in block), keep, "pivoted", step)


def spent(shapes, layout, ranks):
    return sum(shape.cost(layout, ranks[shape.name]) for shape in shapes)


def total_error(shapes, errors, ranks):
    return sum(
        0.0 if ranks[s.name] is None else e[ranks[s.name]]
        for s, e in zip(shapes, errors, strict=True)
    )


@settings(max_examples=80, deadline=None)
@given(problems(), st.floats(0.05, 1), LAYOUTS, st.integers(1, 9))
def test_global_meets_the_budget_and_leaves_no_useful_step(problem, keep, layout, step):
    shapes, errors = problem
    budget = keep * sum(shape.dense for shape in shapes)
    try:
        ranks = allocated(shapes, errors, keep, layout, step)
    except CalrError as error:
        assert "unreachable" in str(error)
        least = sum(min(s.cost(layout, r) for r in s.ranks(layout, step)) for s in shapes)
        assert least > budget - 1
        return
    assert spent(shapes, layout, ranks) <= budget + 1e-5
    left = budget - spent(shapes, layout, ranks)
    for shape, curve in zip(shapes, errors, strict=True):
        at = ranks[shape.name]
        now = 0.0 if at is None else curve[at]
        for rank in shape.ranks(layout, step):
            extra = shape.cost(layout, rank) - shape.cost(layout, at)
            better = (0.0 if rank is None else curve[rank]) < now
            assert not (better and extra <= left - 1)


@settings(max_examples=40, deadline=None)
@given(problems(), st.floats(0.3, 1), LAYOUTS)
def test_lagrangian_is_close_to_exact_and_never_better(problem, keep, layout):
    shapes, errors = problem
    try:
        fast = total_error(shapes, errors, allocated(shapes, errors, keep, layout, 4))
        best = total_error(shapes, errors, allocated(shapes, errors, keep, layout, 4, exact=True))
    except CalrError:
        return
    largest_step = max(float(-np.diff(e).min()) * 4 for e in errors)
    whole = max(float(e[0]) for e in errors)
    assert best <= fast * (1 + 1e-5) + 1e-9
    assert (
        fast <= best + largest_step + whole
    )  # one layer's choice is the most that greedy can lose


def test_exact_stays_within_the_budget_where_a_byte_is_missing():
    """HiGHS itself takes what exceeds a budget by less than a millionth for feasible."""
    costs = [[0, 300_000_001], [0, 400_000_003], [0, 200_000_005]]
    values = [np.array([1.0, 0.0])] * 3
    for missing in (1, 2, 50):
        budget = sum(cost[1] for cost in costs) - missing
        at = knapsack.solve(costs, values, budget, exact=True)
        assert sum(cost[i] for cost, i in zip(costs, at, strict=True)) <= budget
        assert sorted(at) == [0, 1, 1]


def test_what_is_not_finite_is_refused():
    with pytest.raises(CalrError, match="not finite"):
        knapsack.solve([[1, 2]], [np.array([1.0, math.nan])], 2)


def test_exact_equals_brute_force():
    shapes = [Shape("a", 8, 8), Shape("b", 6, 12), Shape("c", 10, 4)]
    rng = np.random.default_rng(0)
    errors = [np.append(np.sort(rng.exponential(size=m))[::-1], 0) for m in (8, 6, 4)]
    options = [shape.ranks("pivoted", 2) for shape in shapes]
    for keep in (0.5, 0.6, 0.8):
        budget = keep * sum(shape.dense for shape in shapes)
        best = min(
            total_error(shapes, errors, dict(zip("abc", choice, strict=True)))
            for choice in itertools.product(*options)
            if spent(shapes, "pivoted", dict(zip("abc", choice, strict=True))) <= budget
        )
        found = allocated(shapes, errors, keep, "pivoted", 2, exact=True)
        assert total_error(shapes, errors, found) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0.3, 1), LAYOUTS, st.integers(1, 8))
def test_uniform_meets_the_budget(problem, keep, layout, step):
    shapes, _ = problem
    try:
        ranks = uniform(Budget(tuple(shapes), keep, layout, step))
    except CalrError:
        return
    budget = keep * sum(shape.dense for shape in shapes)
    left = budget - spent(shapes, layout, ranks)
    assert left >= -1e-5
    for shape in shapes:
        options = shape.ranks(layout, step)
        at = options.index(ranks[shape.name])
        if at + 1 < len(options):
            following = shape.cost(layout, options[at + 1])
            assert following - shape.cost(layout, options[at]) > left - 1


def test_keep_one_leaves_everything_dense():
    shapes = [Shape("a", 64, 32), Shape("b", 32, 64)]
    errors = [np.linspace(1, 0, 33)] * 2
    assert uniform(Budget(tuple(shapes), 1.0, "pivoted", 8)) == {"a": None, "b": None}
    assert allocated(shapes, errors, 1.0, "pivoted", 8) == {"a": None, "b": None}


def test_the_layer_that_matters_more_gets_more():
    shapes = [Shape("a", 64, 64), Shape("b", 64, 64)]
    curve = np.linspace(1, 0, 65)
    ranks = allocated(shapes, [curve, 10 * curve**2], 0.5, "pivoted", 8)
    assert (ranks["b"] or 65) > (ranks["a"] or 65)


def test_fixed_layers_count_in_keep():
    shapes = [Shape("a", 64, 64)]
    ranks = allocated(shapes, [np.linspace(1, 0, 65)], 0.75, "pivoted", 8, fixed=64 * 64)
    assert shapes[0].cost("pivoted", ranks["a"]) <= 0.5 * 64 * 64


def test_last_k_takes_the_k_with_the_smallest_measure():
    blocks = [[Shape(f"{i}", 64, 64)] for i in range(4)]
    seen = []

    def measure(ranks):
        seen.append(sum(rank is not None for rank in ranks.values()))
        return abs(seen[-1] - 3)

    ranks = last_k(budget(blocks, 0.6, 1), blocks, measure)
    assert seen == [2, 3, 4]  # k = 1 would need R_layer = 1.6
    assert [ranks[str(i)] is None for i in range(4)] == [True, False, False, False]
    # R_layer = 4 * 0.4 / 3
    kept = blocks[1][0].cost("pivoted", ranks["1"]) / 64**2
    assert kept == pytest.approx(1 - 4 * 0.4 / 3, abs=0.03)


def test_last_k_without_a_feasible_k_says_so():
    blocks = [[Shape("a", 64, 64), Shape("b", 8, 64)]]  # b has no rank, and a's is rounded to 16
    with pytest.raises(CalrError, match="no number of last blocks"):
        last_k(budget(blocks, 0.48, 8), blocks, lambda ranks: 0.0)


def test_last_k_meets_the_budget_with_unequal_and_empty_blocks():
    blocks = [[Shape("a", 32, 32)], [Shape("b", 128, 128)], [Shape("c", 32, 32)], []]
    shapes = [shape for block in blocks for shape in block]
    tried = []
    last_k(budget(blocks, 0.7, 1), blocks, lambda ranks: tried.append(ranks) or 0.0)
    assert len(tried) == 2  # the last block alone, of 32², cannot lose 30 % of all
    for ranks in tried:
        kept = spent(shapes, "pivoted", ranks) / sum(shape.dense for shape in shapes)
        assert 0.69 < kept <= 0.7


def test_ranks_below_the_least_are_no_choice():
    assert Shape("a", 64, 64, least_rank=17).ranks("pivoted", 8)[:2] == [24, 32]


def test_unreachable_keep_names_what_is_reachable():
    with pytest.raises(CalrError, match=r"smallest ranks .* keep 0\.2344"):
        allocated([Shape("a", 64, 64)], [np.zeros(65)], 0.1, "pivoted", 8)


@pytest.mark.parametrize("size", [32, 576, 4096])
def test_no_pivoted_rank_takes_more_bytes_than_the_dense_weight(size):
    """Of 16 bits a number, and 32 a pivot."""
    ranks = Shape("a", size, size).ranks("pivoted", 8)
    assert ranks[-1] is None
    assert all(2 * rank * (2 * size - rank) + 4 * rank < 2 * size**2 for rank in ranks[:-1])
    rank = ranks[-2] + 8
    assert 2 * rank * (2 * size - rank) + 4 * rank >= 2 * size**2
