"""The reference operations against dense matrices built by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calr_kernels.reference import lowrank_linear, pivot_source, pivoted_linear

SHAPES = [(3, 5, 7, 2), (1, 1, 1, 1), (17, 8, 40, 8), (0, 4, 6, 3)]  # M, K, N, r


@pytest.mark.parametrize(("m", "k", "n", "r"), SHAPES)
def test_lowrank_linear_is_the_product_of_its_factors(m, k, n, r, device):
    x, down, up, bias = _random((m, k), (r, k), (n, r), (n,), device=device)
    a, b = _random((2, k), (n, 2), device=device)
    torch.testing.assert_close(
        lowrank_linear(x, down, up, bias, a, b), x @ (up @ down + b @ a).T + bias
    )
    torch.testing.assert_close(lowrank_linear(x, down, up), x @ (up @ down).T)


@pytest.mark.parametrize(("m", "k", "n", "r"), [s for s in SHAPES if s[2] >= s[3]])
def test_pivoted_linear_is_the_matrix_with_its_rows_put_back(m, k, n, r, device):
    x, down, up, bias = _random((m, k), (r, k), (n - r, r), (n,), device=device)
    pivots = torch.randperm(n, generator=torch.Generator().manual_seed(2))[:r].to(device)
    dense = torch.empty(n, k, dtype=torch.float64, device=device)
    others = [row for row in range(n) if row not in pivots.tolist()]
    dense[pivots] = down
    dense[others] = up @ down
    torch.testing.assert_close(pivoted_linear(x, down, up, pivots, bias), x @ dense.T + bias)
    torch.testing.assert_close(pivoted_linear(x, down, up, pivots.int()), x @ dense.T)


def test_gradients(device):
    x, down, up, bias = _random((3, 5), (2, 5), (7, 2), (7,), device=device)
    inputs = [t.requires_grad_() for t in (x, down, up, bias)]
    assert torch.autograd.gradcheck(lowrank_linear, inputs)
    pivots = torch.tensor([6, 1], device=device)
    short = up[:5].detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, down, up: pivoted_linear(x, down, up, pivots), (x, down, short)
    )


@given(st.data())
def test_pivot_source_inverts_the_storage_order(data):
    n = data.draw(st.integers(1, 30))
    pivots = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
    stored = pivots + [row for row in range(n) if row not in pivots]
    source = pivot_source(torch.tensor(pivots), n)
    assert torch.tensor(stored)[source].tolist() == list(range(n))


def _random(*shapes, device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes]
