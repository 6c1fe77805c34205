"""SVD-LLM's whitened truncation (arXiv 2403.07378): the best rank-r matrix in the output norm."""

from dataclasses import dataclass

from torch import Tensor

from calr.methods.decomposition import Decomposition, Moments, nested, output_basis

NEEDS = frozenset({"input"})


@dataclass(frozen=True)
class Config:
    """No options."""


def decompose(weight: Tensor, moments: Moments, config: Config) -> Decomposition:
    """Minimise E‖Wx - W'x‖² at every rank, weight [N, K].

    W' = Q_r Q_rᵀ W. N <= K: Q are the eigenvectors of W G Wᵀ. N > K: Q orthonormalises W S V with
    S = G^½ and V the eigenvectors of S Wᵀ W S. Equal to truncating the Cholesky-whitened SVD, but
    without Cholesky or inverse, so a singular G is fine. Eigenproblems on the smaller side, in
    float64.
    """
    basis, energies = output_basis(weight.double(), moments.input.double())
    return nested(basis, basis.mT @ weight.double(), energies)
