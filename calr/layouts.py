"""Storage layouts of a rank-r matrix: parameter counts, and the lossless pivoted form."""

import math

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from calr_kernels.nn import Layout

MAX_COEFFICIENT = 2.0  # always reachable by row swaps; keeps 16-bit coefficients accurate


def parameters(layout: Layout, out_features: int, in_features: int, rank: int) -> int:
    """Count the numbers stored for a rank-r layer without its bias.

    >>> parameters("two_factor", 4, 6, 2), parameters("pivoted", 4, 6, 2)
    (20, 16)
    """
    if layout == "pivoted":
        return rank * (out_features + in_features - rank)
    return rank * (out_features + in_features)


def rank_at(layout: Layout, out_features: int, in_features: int, keep: float) -> float:
    """Return the (real) rank at which the layer stores `keep` of its dense parameters.

    >>> rank_at("two_factor", 100, 100, 0.5), round(rank_at("pivoted", 100, 100, 0.75), 9)
    (25.0, 50.0)
    """
    total, product = out_features + in_features, out_features * in_features
    if layout == "two_factor":
        return keep * product / total
    return (total - math.sqrt(max(0.0, total * total - 4 * keep * product))) / 2


def pivot(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewrite `up @ down` as r of its own rows and the coefficients of the others.

    up [N, r], down [r, K] -> (coefficients [N - r, r], rows [r, K], pivots [r] int32, ascending),
    in up's dtype, computed in float64. The product is unchanged and every |coefficient| is at most
    2 (so 16-bit storage stays accurate). Pivots come from a QR with column pivoting of the small
    factor, then rows are swapped until the bound holds. Raises ValueError when r > min(N, K).
    Idea: PIFA (arXiv 2501.19090); the bounded swaps are those of strong rank-revealing QR.
    """
    rank = up.shape[1]
    if rank > min(up.shape[0], down.shape[1]):
        raise ValueError(f"rank {rank} of a {up.shape[0]}x{down.shape[1]} matrix")
    u, v = (t.detach().to("cpu", torch.float64).numpy() for t in (up, down))
    basis, small = np.linalg.qr(v.T)  # [K, r], [r, r]: u v = (small uᵀ)ᵀ basisᵀ
    columns = small @ u.T  # [r, N]
    order = scipy.linalg.qr(columns, mode="r", pivoting=True)[1]
    pivots = _swap_until_bounded(columns, order[:rank].copy())
    pivots.sort()
    others = np.setdiff1d(np.arange(u.shape[0]), pivots)
    coefficients = _coefficients(columns, pivots, others)
    rows = columns[:, pivots].T @ basis.T
    return (
        torch.from_numpy(coefficients).to(up),
        torch.from_numpy(rows).to(up),
        torch.from_numpy(pivots.astype(np.int32)).to(up.device),
    )


def _coefficients(
    columns: np.ndarray, pivots: np.ndarray, others: np.ndarray
) -> np.ndarray:  # [N - r, r]
    """Solve `columns[:, others] = columns[:, pivots] Cᵀ`; redundant pivots get zeros."""
    q, r, order = scipy.linalg.qr(columns[:, pivots], pivoting=True)
    diagonal = np.abs(np.diag(r))
    floor = np.finfo(np.float64).eps * max(columns.shape) * diagonal[0]
    full = int((diagonal > floor).sum())
    solution = np.zeros((len(pivots), len(others)))
    right = q.T @ columns[:, others]
    solution[order[:full]] = scipy.linalg.solve_triangular(r[:full, :full], right[:full])
    return solution.T


def _swap_until_bounded(columns: np.ndarray, pivots: np.ndarray) -> np.ndarray:
    """Exchange a pivot for a row whose coefficient exceeds the bound until none does.

    Each exchange multiplies the volume of the pivot rows by more than the bound, so it ends.
    """
    others = np.setdiff1d(np.arange(columns.shape[1]), pivots)
    if not len(others):
        return pivots
    c = _coefficients(columns, pivots, others)
    while True:
        row, column = np.unravel_index(np.abs(c).argmax(), c.shape)
        p = c[row, column]
        if abs(p) <= MAX_COEFFICIENT:
            return pivots
        pivot_column, swapped_row = c[:, column].copy() / p, c[row].copy()
        c -= np.outer(pivot_column, swapped_row)
        c[row], c[:, column] = -swapped_row / p, pivot_column
        c[row, column] = 1 / p
        pivots[column], others[row] = others[row], pivots[column]
