"""The low-rank path that takes back most of what rounding lost."""

import torch
from torch import Tensor

from calr.rounding.damping import damped_cholesky
from calr_kernels import randomized_svd

DAMPING = 1e-6  # share of the mean diagonal added to the second moment


@torch.no_grad()
def truncate(error: Tensor, rows: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, ...]:
    """Approximate an error ΔW [N, K] by rank c: up [N, c], down [c, K], and what each term gains.

    Minimises ½ Σ_n rows[n] (ΔW - up down)_n G (ΔW - up down)_nᵀ, rows [N] and G = moment [K, K]
    a little damped: the SVD of diag(rows)^½ ΔW L, G = L Lᵀ. gains [c]: by how much the terms lower
    that, in falling order.
    """
    factor = damped_cholesky(moment.to(torch.float64, copy=True), DAMPING).to(error)
    seen = error @ factor
    _, values, right = randomized_svd(rows.clamp(min=0).sqrt().to(error)[:, None] * seen, rank)
    down = torch.linalg.solve_triangular(factor, right, upper=False, left=False)
    return seen @ right.mT, down, values.double().square() / 2
