"""Orthonormal bases by CholeskyQR: nearly all matrix products, and never a NaN for finite input."""

import math

import torch
from torch import Tensor

LEAST_DIAGONAL = 0.02  # of the Cholesky factor of normalised columns, for a single pass
ORTHOGONAL = 1e-8  # inner products of columns that need no further orthonormalisation


def orthonormalize(Y: Tensor) -> Tensor:
    """Return Q [b, m, l] with orthonormal columns and, where Y [b, m, l] has full rank, its span.

    CholeskyQR2 on normalised columns; where its second Gram matrix shows ill-conditioning, shifted
    CholeskyQR3 (arXiv 1809.11085, with a practical shift); where that fails too, Householder.
    """
    Y = normalize(Y)
    q, good = _cholesky_qr(Y, shifted=False)
    if bool(good.all()):
        return q
    for index in torch.nonzero(~good).flatten().tolist():
        again, good_again = _cholesky_qr(Y[index : index + 1], shifted=True)
        if bool(good_again.all()):
            q[index] = again[0]
        else:
            q[index] = torch.linalg.qr(Y[index])[0]
    return q


def orthonormalize_ordered(Y: Tensor) -> Tensor:
    """Orthonormalise nearly orthogonal columns of falling norm, [b, m, l], keeping their signs."""
    q = normalize(Y)
    identity = torch.eye(Y.shape[-1], dtype=Y.dtype, device=Y.device)
    if bool(((q.mT @ q - identity).abs() < ORTHOGONAL).all()):
        return q
    q = orthonormalize(Y)
    sign = (q * Y).sum(-2, keepdim=True).sign()
    return q * torch.where(sign == 0, 1, sign)


def normalize(Y: Tensor) -> Tensor:
    norms = Y.norm(dim=-2, keepdim=True)
    return Y / torch.where(norms > 0, norms, 1)


def well_conditioned(Y: Tensor) -> Tensor:
    """Return a basis of Y's span [b, m, l] good enough for another product: one Cholesky pass.

    Its columns are orthonormal to about cond(Y)² eps; the diagonal of the factor tells when that
    is too much.
    """
    Y = normalize(Y)
    factor, info = torch.linalg.cholesky_ex(Y.mT @ Y)
    smallest = factor.diagonal(dim1=-2, dim2=-1).amin(-1)
    if not bool(((info == 0) & (smallest > LEAST_DIAGONAL)).all()):
        return orthonormalize(Y)
    basis: Tensor = torch.linalg.solve_triangular(factor.mT, Y, upper=True, left=False)
    return basis


def _cholesky_qr(Y: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """Orthonormalise by 2 Cholesky passes, or 3 with a shifted first; tell for which it worked.

    The Gram matrix of the last pass must be near the identity: then that pass leaves only rounding.
    """
    identity = torch.eye(Y.shape[-1], dtype=Y.dtype, device=Y.device)
    good = torch.ones(Y.shape[0], dtype=torch.bool, device=Y.device)
    passes = 3 if shifted else 2
    for step in range(passes):
        gram = Y.mT @ Y
        if shifted and step == 0:
            gram = gram + 4 * Y.shape[-1] * torch.finfo(Y.dtype).eps * identity
        elif step == passes - 1:
            good &= (gram - identity).abs().amax((-2, -1)) < 0.1 / math.sqrt(Y.shape[-1])
        factor, info = torch.linalg.cholesky_ex(gram)
        good &= info == 0
        if not bool(good.any()):
            break
        Y = torch.linalg.solve_triangular(factor.mT, Y, upper=True, left=False)
    return Y, good
