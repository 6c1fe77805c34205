"""Symmetric matrices in half the room."""

import hypothesis.strategies as st
import torch
from hypothesis import given

from calr.statistics import folded
from calr.statistics.folded import fold, unfold


@given(st.integers(1, 40), st.integers(1, 9))
def test_a_folded_matrix_is_half_and_comes_back_bit_by_bit(n, tile):
    drawn = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    matrix = drawn + drawn.mT
    half = fold(matrix)
    assert half.numel() <= (n + 1) ** 2 / 2
    whole = folded.TILE
    try:
        folded.TILE = tile
        assert torch.equal(unfold(half), matrix)
    finally:
        folded.TILE = whole
