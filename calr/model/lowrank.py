"""Layers of given factors: the lossless pivoted form of a rank-r matrix, and modules of it."""

import torch
from torch import Tensor, nn

from calr.progress import progress
from calr_kernels import LowRankLinear
from calr_kernels.layout import Layout

MAX_COEFFICIENT = 2.0  # always reachable by row swaps; keeps 16-bit coefficients accurate


def balance(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each rank-1 term so that its two vectors have one norm: up [N, r], down [r, K].

    The product is unchanged; 16-bit storage and training both want comparable factors.
    """
    columns, rows = up.norm(dim=0), down.norm(dim=1)
    scale = torch.where((columns > 0) & (rows > 0), (rows / columns).sqrt(), 1.0)
    return up * scale, down / scale[:, None]


def pivot(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewrite `up @ down` as r of its own rows and the coefficients of the others.

    up [N, r], down [r, K] -> (coefficients [N - r, r], rows [r, K], pivots [r] int32, ascending),
    in up's dtype, computed in float64. The product is unchanged and every |coefficient| is at most
    2, so that 16-bit storage stays accurate. The first pivots are those of an LU decomposition with
    partial pivoting of the small factor, which needs no full rank; then rows are swapped until the
    bound holds, on the CPU, since each swap looks for the largest coefficient. Raises ValueError
    when r > min(N, K).
    Idea: PIFA (arXiv 2501.19090); bounded swaps as in strong rank-revealing QR (Gu & Eisenstat).
    """
    rank = up.shape[1]
    if rank > min(up.shape[0], down.shape[1]):
        raise ValueError(f"rank {rank} of a {up.shape[0]}x{down.shape[1]} matrix")
    basis, small = torch.linalg.qr(down.detach().double().mT)  # [K, r], [r, r]
    rows = up.detach().double() @ small.mT  # [N, r]: up @ down = rows @ basisᵀ
    lu, transpositions = torch.linalg.lu_factor_ex(rows.cpu())[:2]
    order = _permutation(transpositions, up.shape[0])
    coefficients = torch.linalg.solve_triangular(
        lu[:rank], lu[rank:], upper=False, left=False, unitriangular=True
    )  # [N - r, r]: L2 L1⁻¹
    pivots, others = order[:rank].clone(), order[rank:].clone()
    _swap_until_bounded(coefficients, pivots, others)
    pivots, columns = pivots.sort()
    coefficients = coefficients[others.argsort()][:, columns]
    kept = rows[pivots.to(up.device)] @ basis.mT
    return coefficients.to(up), kept.to(up), pivots.to(up.device, torch.int32)


def low_rank(
    up: Tensor, down: Tensor, bias: Tensor | None, layout: Layout, dtype: torch.dtype
) -> LowRankLinear:
    """Make a layer that multiplies with `up @ down`, up [N, r], down [r, K], rounded once."""
    pivots = None
    if layout == "pivoted":
        up, down, pivots = pivot(up, down)
    rank, in_features = down.shape
    out_features = up.shape[0] + (rank if pivots is not None else 0)
    layer = LowRankLinear(
        in_features, out_features, rank, layout, bias=bias is not None, device="meta", dtype=dtype
    ).to_empty(device=up.device)
    with torch.no_grad():
        layer.weight.copy_(up)
        layer.down.weight.copy_(down)
        if pivots is not None:
            layer.get_buffer("pivots").copy_(pivots)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def two_factor(dense: nn.Linear, up: Tensor, down: Tensor) -> LowRankLinear:
    """Make a float32 layer of factors, up [N, r] and down [r, K], for the place of a dense one."""
    device = dense.weight.device
    return low_rank(up.to(device), down.to(device), dense.bias, "two_factor", torch.float32)


def pack(
    model: nn.Module, layers: dict[str, LowRankLinear], layout: Layout
) -> dict[str, LowRankLinear]:
    """Rewrite two-factor layers in a layout and the dense layers' dtype: the same products."""
    packed = {}
    for name, layer in progress(layers.items(), desc="packing", unit="layer"):
        dtype = model.get_submodule(name).get_parameter("weight").dtype
        up, down = layer.weight.detach(), layer.down.weight.detach()
        packed[name] = low_rank(up, down, layer.bias, layout, dtype)
    return packed


def _permutation(transpositions: Tensor, size: int) -> Tensor:
    """Turn LAPACK's row transpositions (from 1) into the order of rows that they make."""
    order = list(range(size))
    for i, j in enumerate((transpositions - 1).tolist()):
        order[i], order[j] = order[j], order[i]
    return torch.tensor(order)


def _swap_until_bounded(c: Tensor, pivots: Tensor, others: Tensor) -> None:
    """Exchange, in place, a pivot for a row whose coefficient exceeds the bound until none does.

    Each exchange multiplies the volume of the pivot rows by more than the bound, so it ends.
    """
    while c.numel():
        row, column = divmod(int(c.abs().argmax()), c.shape[1])
        p = float(c[row, column])
        if abs(p) <= MAX_COEFFICIENT:
            return
        pivot_column, swapped_row = c[:, column] / p, c[row].clone()
        c.addr_(pivot_column, swapped_row, alpha=-1)
        c[row], c[:, column] = -swapped_row / p, pivot_column
        c[row, column] = 1 / p
        pivots[column], others[row] = int(others[row]), int(pivots[column])
