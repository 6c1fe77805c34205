"""ERC-SVD's residual compensation (arXiv 2505.20112, section 3.2)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calr.errors import CalrError
from calr.methods.decomposition import Decomposition, Moments, eigh_descending, output_basis

NEEDS = frozenset({"input"})
ORDERED = False  # the residual is another one at every rank


@dataclass(frozen=True)
class Config:
    """beta: rank of the residual's factors as a fraction of α = NK/(N+K), in (0, 1)."""

    beta: float = 0.05

    def __post_init__(self) -> None:
        """Raise CalrError for a beta outside (0, 1)."""
        if not 0 < self.beta < 1:
            raise CalrError(f"method_options: beta={self.beta} of erc_svd must lie in (0, 1)")


def decompose(weight: Tensor, moments: Moments, config: Config) -> Decomposition:
    """Truncate weight [N, K] at r - r_res in the output norm, its residual at r_res by plain SVD.

    r_res = βα, at least 1. The two norms must differ: truncating the residual in the first norm
    again would give the one-shot truncation at rank r. The plain-SVD step projects the residual's
    outputs, so the error at rank r lies between the one-shot errors at r and at r - r_res; `errors`
    holds the latter, an upper bound. `factors(r)` raises CalrError when r <= r_res.
    """
    w, g = weight.double(), moments.input.double()
    basis, energies = output_basis(w, g)
    residual_rank = compensation_rank(w.shape[0], w.shape[1], config.beta)
    tail = energies.flip(0).cumsum(0).flip(0)
    bound = torch.cat([tail[:1].expand(residual_rank), tail, tail.new_zeros(1)])[: len(tail) + 1]
    bound[-1] = 0

    def factors(rank: int) -> tuple[Tensor, Tensor]:
        primary = rank - residual_rank
        if primary < 1:
            raise CalrError(
                f"erc_svd: rank {rank} leaves nothing beside the residual's rank {residual_rank}; "
                "raise keep or lower method_options.beta"
            )
        up = basis[:, :primary]
        down = up.mT @ w
        residual_up, residual_down = plain_truncation(w - up @ down, residual_rank)
        return torch.cat([up, residual_up], 1).float(), torch.cat([down, residual_down]).float()

    return Decomposition(errors=bound.cpu(), factors=factors)


def least_rank(out_features: int, in_features: int, config: Config) -> int:
    """Return the smallest rank: one beside the residual's (r - r_res >= 1)."""
    return compensation_rank(out_features, in_features, config.beta) + 1


def compensation_rank(out_features: int, in_features: int, beta: float) -> int:
    """Return r_res = round(β NK / (N + K)), at least 1.

    >>> compensation_rank(576, 1536, 0.05)
    21
    """
    alpha = out_features * in_features / (out_features + in_features)
    return max(1, math.floor(beta * alpha + 0.5))


def plain_truncation(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the rank-r factors of a plain SVD: matrix [N, K] -> up [N, r], down [r, K]."""
    if matrix.shape[0] <= matrix.shape[1]:
        u = eigh_descending(matrix @ matrix.mT)[1][:, :rank]
        return u, u.mT @ matrix
    v = eigh_descending(matrix.mT @ matrix)[1][:, :rank]
    return matrix @ v, v.mT
