"""CALR's primary path: two-sided truncation in the curvature of the loss (our own rank rule).

CALR (arXiv 2508.16680) decomposes by SVD and corrects what that lost; the truncation norm is not
given in its abstract. Ours is the Kronecker-factored second-order norm (K-FAC, arXiv 1503.05671).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from calr.errors import CalrError
from calr.methods.decomposition import (
    Decomposition,
    Moments,
    eigh_descending,
    nested,
    symmetric_root,
)

NEEDS = frozenset({"input", "gradient", "output"})
INVERSE_FLOOR = 1e-14  # eigenvalues below this fraction of the largest carry nothing


@dataclass(frozen=True)
class Config:
    """damping: share of the mean squared gradient added to the outputs' curvature."""

    damping: float = 1e-4

    def __post_init__(self) -> None:
        """Raise CalrError for a negative damping."""
        if not self.damping >= 0:
            raise CalrError(f"method_options: damping={self.damping} of calr must be at least 0")


def decompose(weight: Tensor, moments: Moments, config: Config) -> Decomposition:
    """Minimise ½ tr(G_y ΔW G ΔWᵀ), the second-order increase of the loss, at every rank.

    weight [N, K]; G = E[x xᵀ], G_y = E[g gᵀ] plus damping. With M = Wᵀ G_y W when N > K:
    (V, Λ) = eig(S M S), S = G^½, P = S V, W' = (W P_r Λ_r⁻¹)(P_rᵀ M). Otherwise M = W G Wᵀ:
    (U, Λ) = eig(T M T), T = G_y^½, R = T U, W' = (M R_r Λ_r⁻¹)(R_rᵀ W). Only a root of the smaller
    side is taken and only kept eigenvalues are divided by; both moments may be singular. errors
    are in nats per token. Raises CalrError when the gradient moments are missing.
    """
    if moments.output is None or moments.gradient is None:
        raise CalrError("method=calr needs gradient statistics; collect them with a backward pass")
    w, g, g_y = weight.double(), moments.input.double(), moments.output.double()
    damping = config.damping * moments.gradient
    if w.shape[0] > w.shape[1]:
        m = g_y + damping * (w.mT @ w)
        root = symmetric_root(g)
        energies, vectors = eigh_descending(root @ m @ root)
        p = root @ vectors
        left, right = w @ p * _inverse(energies), p.mT @ m
    else:
        m = w @ g @ w.mT
        root = symmetric_root(g_y + damping * torch.eye(len(g_y), dtype=w.dtype, device=w.device))
        energies, vectors = eigh_descending(root @ m @ root)
        r = root @ vectors
        left, right = m @ r * _inverse(energies), r.mT @ w
    return nested(left, right, energies / 2, unit="loss")


def _inverse(values: Tensor) -> Tensor:
    """Invert the eigenvalues above the floor, 0 for the others."""
    kept = values > INVERSE_FLOOR * values[0]
    return torch.where(kept, values, 1).reciprocal() * kept
