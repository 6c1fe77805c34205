"""Parameter counts and the lossless pivoted form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calr.model.lowrank import MAX_COEFFICIENT, pivot
from calr_kernels.layout import parameters, rank_at


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6), st.data())
def test_pivoting_is_lossless_and_bounded(n, k, seed, data):
    rank = data.draw(st.integers(1, min(n, k)))
    true_rank = data.draw(st.integers(0, rank))
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    down = torch.randn(rank, k, generator=generator, dtype=torch.float64)
    up[:, true_rank:] = 0  # rank deficient, down to the zero matrix
    coefficients, rows, pivots = pivot(up, down)
    assert coefficients.shape == (n - rank, rank)
    assert rows.shape == (rank, k)
    assert sorted(set(pivots.tolist())) == pivots.tolist()
    assert not coefficients.numel() or coefficients.abs().max() <= MAX_COEFFICIENT + 1e-9
    rebuilt = torch.empty(n, k, dtype=torch.float64)
    rebuilt[pivots.long()] = rows
    others = np.setdiff1d(np.arange(n), pivots.numpy())
    rebuilt[others] = coefficients @ rows
    scale = up.norm() * down.norm() + 1e-30
    assert (rebuilt - up @ down).norm() <= 1e-11 * scale


def test_rows_are_swapped_where_pivoting_alone_exceeds_the_bound():
    n = 24  # on this matrix partial pivoting makes no exchange and coefficients grow like 2^n
    first = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64).tril(-1)
    up = torch.cat([first, -torch.ones(1, n, dtype=torch.float64)])
    coefficients, rows, pivots = pivot(up, torch.eye(n, dtype=torch.float64))
    assert coefficients.abs().max() <= MAX_COEFFICIENT
    torch.testing.assert_close(up[pivots.long()], rows)
    other = next(row for row in range(n + 1) if row not in pivots.tolist())
    torch.testing.assert_close((coefficients @ rows)[0], up[other])


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0.01, 1))
def test_rank_at_stores_what_is_kept(n, k, keep):
    for layout in ("two_factor", "pivoted"):
        rank = rank_at(layout, n, k, keep)
        total = rank * (n + k - rank) if layout == "pivoted" else rank * (n + k)
        assert total == pytest.approx(keep * n * k, rel=1e-6)


@given(st.integers(1, 50), st.integers(1, 50))
def test_pivoted_is_never_larger_than_dense(n, k):
    assert all(parameters("pivoted", n, k, r) <= n * k for r in range(1, min(n, k) + 1))


def test_impossible_rank_is_refused():
    with pytest.raises(ValueError, match="rank 5 of a 4x6 matrix"):
        pivot(torch.ones(4, 5), torch.ones(5, 6))
