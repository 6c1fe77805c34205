"""What an error of a matrix costs, to second order."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curvature:
    """The second-order loss of an error ΔW [N, K]: ½ Σ_parts Σ_n rows[n] ΔW_n G ΔW_nᵀ.

    parts: rows [N] and moment G [K, K]. Errors of different outputs are taken as independent.
    """

    parts: list[tuple[Tensor, Tensor]]

    @property
    def inputs(self) -> Tensor:
        """One moment [K, K] for all rows: the parts', each weighted by its mean row.

        Of one part its own, since rounding asks for no scale.
        """
        if len(self.parts) == 1:
            return self.parts[0][1]
        total = torch.zeros_like(self.parts[0][1])
        for rows, moment in self.parts:
            total.add_(moment, alpha=float(rows.double().mean()))
        return total

    def sampled(self, count: int) -> tuple[Tensor, Tensor]:
        """Choose rows that tell of all: those that weigh most, and as many of the others, evenly.

        Returns their numbers [count], ascending, and for how many rows each stands.
        """
        weights = sum(rows.double() * float(moment.trace()) for rows, moment in self.parts)
        assert isinstance(weights, Tensor)
        first = weights.argsort(descending=True, stable=True)[: count // 2]
        others = torch.ones(len(weights), dtype=torch.bool)
        others[first.cpu()] = False
        rest = others.nonzero()[:, 0]
        few = rest[torch.linspace(0, len(rest) - 1, count - len(first)).round().long()]
        counts = torch.ones(len(weights), dtype=torch.float64)
        counts[few] = len(rest) / len(few)
        chosen = torch.cat([first.cpu(), few]).sort()[0]
        return chosen, counts[chosen]

    def at(self, rows: Tensor, counts: Tensor) -> "Curvature":
        """Keep some rows, each as heavy as all that it stands for."""
        return Curvature([(own[rows] * counts.to(own), moment) for own, moment in self.parts])

    @property
    def one(self) -> tuple[Tensor, Tensor]:
        """The rows and the moment of a linear layer, which has one part."""
        return self.parts[0]

    def loss(self, error: Tensor) -> float:
        """Return the loss, in nats per token, of an error [N, K]."""
        total = 0.0
        for rows, moment in self.parts:
            lost = ((error @ moment.to(error)) * error).sum(1)
            total += float((rows.to(lost) * lost).sum().double()) / 2
        return total
