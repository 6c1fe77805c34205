"""Symmetric matrices in half the room: of each pair of equal numbers one."""

import torch
from torch import Tensor

TILE = 512  # rows that are mirrored at once


def folded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold those of some tensors that are matrices, one by one in their places, on the CPU."""
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensors[name] = fold(tensor.cpu())
    return tensors


def fold(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix [n, n] as [⌈n / 2⌉, n + 1].

    Row i holds what is right of the diagonal, and on it, in row i and in row n - 1 - i: a
    rectangular full packed format (Gustavson et al., ACM TOMS 37, 2010).
    """
    n = len(matrix)
    half = matrix.new_empty((n + 1) // 2, n + 1)
    for i in range(len(half)):
        half[i, : n - i] = matrix[i, i:]
        half[i, n - i :] = matrix[n - 1 - i, n - 1 - i :]
    return half


def unfold(half: Tensor) -> Tensor:
    """Return the symmetric matrix of which `fold` made this."""
    n = half.shape[1] - 1
    matrix = torch.empty(n, n, dtype=half.dtype, device=half.device)
    for i in range(len(half)):
        matrix[i, i:] = half[i, : n - i]
        matrix[n - 1 - i, n - 1 - i :] = half[i, n - i :]
    for start in range(0, n, TILE):
        end = min(start + TILE, n)
        square = matrix[start:end, start:end].triu()
        matrix[start:end, start:end] = square + square.triu(1).mT
        matrix[end:, start:end] = matrix[start:end, end:].mT
    return matrix
