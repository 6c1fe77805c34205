"""Plain SVD: the best rank-r matrix in the Frobenius norm, blind to the inputs."""

from dataclasses import dataclass

from torch import Tensor

from calr.methods.decomposition import Decomposition, Moments, eigh_descending, nested

NEEDS = frozenset({"input"})


@dataclass(frozen=True)
class Config:
    """No options."""


def decompose(weight: Tensor, moments: Moments, config: Config) -> Decomposition:
    """Truncate the singular value decomposition of weight [N, K].

    errors are those of the outputs: the left singular vectors being orthonormal, direction i
    contributes exactly s_i² v_iᵀ G v_i. One eigenproblem on the smaller side, in float64.
    """
    w, g = weight.double(), moments.input.double()
    if w.shape[0] <= w.shape[1]:
        u = eigh_descending(w @ w.mT)[1]
        left, right = u, u.mT @ w
        energies = ((right @ g) * right).sum(1)
    else:
        v = eigh_descending(w.mT @ w)[1]
        left, right = w @ v, v.mT
        energies = left.square().sum(0) * ((right @ g) * right).sum(1)
    return nested(left, right, energies)
