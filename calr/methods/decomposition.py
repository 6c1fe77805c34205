"""What every method takes and gives, and the linear algebra that they share."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

PRIOR = 1e-4  # energy of an unseen direction of the input, over that of the median input
ROOT_FLOOR = 1e-9  # relative floor of the eigenvalues in a symmetric root


@dataclass(frozen=True)
class Moments:
    """Calibration statistics of one linear layer y = Wx, W [N, K].

    input: E[x xᵀ] [K, K]. gradient: mean over tokens and outputs of g², g the gradient of the
    summed loss with respect to y (labels sampled from the model: the true Fisher). output: E[g gᵀ]
    [N, N] where N <= K, otherwise E[Wᵀg (Wᵀg)ᵀ] [K, K]. rows: the mean of g² of each output [N].
    """

    input: Tensor
    gradient: float | None = None
    output: Tensor | None = None
    rows: Tensor | None = None

    def with_prior(self) -> "Moments":
        """Return them with a little energy in every direction of the input, the same in all.

        What calibration has not seen may still come: without it, to lose such a direction would
        seem to cost nothing. Of inputs half of which are zero, the others' median counts.
        """
        diagonal = self.input.diagonal().double()
        seen = diagonal[diagonal > 0]
        typical = float(diagonal.median()) or (float(seen.median()) if len(seen) else 1.0)
        wide = self.input.to(torch.float64, copy=True)
        wide.diagonal().add_(PRIOR * typical)
        return replace(self, input=wide)

    def to(self, device: torch.device) -> "Moments":
        """Return them on a device."""
        output, rows = (None if x is None else x.to(device) for x in (self.output, self.rows))
        return Moments(self.input.to(device), self.gradient, output, rows)


@dataclass(frozen=True)
class Decomposition:
    """A weight's error at every rank, and its factors at any.

    errors [min(N, K) + 1] float64, errors[r] the expected error at rank r. unit says of what:
    "output" is E‖Wx - W'x‖², "loss" the predicted increase of the loss in nats per token.
    factors(r) -> (up [N, r], down [r, K]) in float32, for every r that the method can make.
    """

    errors: Tensor
    factors: Callable[[int], tuple[Tensor, Tensor]]
    unit: Literal["output", "loss"] = "output"


def nested(
    left: Tensor, right: Tensor, energies: Tensor, unit: Literal["output", "loss"] = "output"
) -> Decomposition:
    """Build a decomposition whose rank-r factors are left[:, :r] [N, r] and right[:r] [r, K].

    energies [min(N, K)]: what each direction takes off the error.
    """
    tail = energies.clamp(min=0).flip(0).cumsum(0).flip(0)
    left, right = left.float(), right.float()
    return Decomposition(
        errors=torch.cat([tail, tail.new_zeros(1)]).cpu(),
        factors=lambda rank: (left[:, :rank].contiguous(), right[:rank].contiguous()),
        unit=unit,
    )


def eigh_descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, largest first and clipped at 0, and eigenvectors of a PSD [n, n]."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.flip(-1).clamp(min=0), vectors.flip(-1)


def symmetric_root(matrix: Tensor) -> Tensor:
    """Return the PSD square root of a symmetric [n, n] matrix, eigenvalues clipped at a relative
    floor of 1e-9: no Cholesky, so a singular matrix is fine."""
    values, vectors = eigh_descending(matrix)
    values = values.clamp(min=ROOT_FLOOR * float(values[0]))
    return (vectors * values.sqrt()) @ vectors.mT


def output_basis(w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the orthonormal output directions [N, min(N, K)] by falling energy, and the energies.

    w [N, K], g [K, K], float64.
    """
    if w.shape[0] <= w.shape[1]:
        energies, basis = eigh_descending(w @ g @ w.mT)
        return basis, energies
    whitened = w @ symmetric_root(g)
    energies, v = eigh_descending(whitened.mT @ whitened)
    return torch.linalg.qr(whitened @ v)[0], energies
