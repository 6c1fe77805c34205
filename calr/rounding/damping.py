"""The Cholesky factor of a second moment, whatever it is the moment of."""

import torch
from torch import Tensor


def damped_cholesky(moment: Tensor, share: float) -> Tensor:
    """Return the lower Cholesky factors of moments [..., K, K] float64 with more on their diagonal.

    share: of the mean diagonal, how much more; ten times as much, and again, where rounding has
    left a singular moment with negative eigenvalues. A moment of zeros counts as the identity. The
    diagonal is changed in place: K² numbers are many. Raises ValueError for one that is not finite.
    """
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    before, typical = diagonal.clone(), diagonal.mean(-1, keepdim=True)
    added = share * torch.where(typical > 0, typical, 1.0)
    while True:
        diagonal.copy_(before + added)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(moment)
        if not bool(failed.any()):
            return factor
        if not bool(moment.isfinite().all()):
            raise ValueError("the moment is not finite")
        added = torch.where(failed[..., None] > 0, 10 * added, added)
