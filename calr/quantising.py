"""Choose a form for every matrix of a model within a budget of bytes, and round to it."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calr.methods import Moments
from calr.model import Matrix, weight_of
from calr.progress import progress
from calr.ranks import PRICED, ByteBudget, Forms, best_form, least_loss
from calr.rounding import round_matrix
from calr.statistics import Statistics
from calr.storage import Store
from calr_kernels import records
from calr_kernels.forms import Form

ROWS = 4096  # of a matrix whose loss is computed at once


@dataclass(frozen=True)
class Quantiser:
    """Rounds the matrices of a dense model; what is finished is kept in a store."""

    model: PreTrainedModel
    budget: ByteBudget
    statistics: Statistics
    finished: Store

    def forms(self, *, exact: bool = False) -> Forms:
        """Choose the form of every matrix: each is rounded once, to learn what that costs.

        What it costs is kept with the statistics, for other budgets.
        """
        prices, known = {}, self.statistics.store.within(f"prices-{self.budget.scale_group}")
        if any(matrix.name not in known for matrix in self.budget.matrices):
            self.statistics.collect()
        for matrix in progress(self.budget.matrices, desc="prices", unit="matrix"):
            form = best_form(PRICED, self.budget.scale_group, matrix.in_features)
            if matrix.name not in known:
                curvature = self._curvature(matrix)
                rounded = self._rounded(matrix, form, curvature)
                loss = curvature.loss(weight_of(self.model, matrix.name), rounded, form)
                known.save(matrix.name, {"loss": torch.tensor(loss, dtype=torch.float64)})
            prices[matrix.name] = float(known.load(matrix.name)["loss"])
        return least_loss(self.budget, prices, exact=exact)

    def rounded(self, forms: Forms) -> dict[str, Tensor]:
        """Round matrices to their forms: records [N, groups, record] uint8 by name."""
        chosen = [m for m in self.budget.matrices if forms[m.name] is not None]
        made = {}
        for matrix in progress(chosen, desc="rounding", unit="matrix"):
            form = forms[matrix.name]
            assert form is not None
            made[matrix.name] = self._rounded(matrix, form, None)
        return made

    def _rounded(self, matrix: Matrix, form: Form, curvature: "_Curvature | None") -> Tensor:
        name = f"rounded-{matrix.name}-{form.bits}"
        if name not in self.finished:
            curvature = curvature or self._curvature(matrix)
            weight = weight_of(self.model, matrix.name)
            found = round_matrix(weight, form, curvature.inputs.to(weight.device))
            self.finished.save(name, {"records": found.records.cpu()})
        return self.finished.load(name)["records"]

    def _curvature(self, matrix: Matrix) -> "_Curvature":
        if matrix.layer is not None:
            moments = self.statistics.moments(matrix.layer).with_prior()
            assert moments.rows is not None
            return _Curvature([(moments.rows, moments.input)])
        known, parts = self.statistics.vocabulary(), []
        if matrix.kind in ("head", "tied"):
            parts.append((known["outputs"], Moments(known["hidden"]).with_prior().input))
        if matrix.kind in ("embedding", "tied"):
            inner = self.model.get_submodule(matrix.name)
            scale = float(getattr(inner, "scalar_embed_scale", 1.0))
            moment = Moments(known["inputs"]).with_prior().input * scale**2
            parts.append((smoothed(known["tokens"]), moment))
        return _Curvature(parts)


def smoothed(counts: Tensor) -> Tensor:
    """Turn counts [V] of tokens into frequencies of which none is 0.

    Tokens that were not seen share the frequency of those seen once (Good, Biometrika 1953).
    """
    total = float(counts.sum())
    unseen = max(float((counts == 1).sum()), 1.0) / max(total, 1.0)
    return (1 - unseen) * counts / max(total, 1.0) + unseen / len(counts)


@dataclass(frozen=True)
class _Curvature:
    """The second-order loss of an error ΔW [N, K]: ½ Σ_parts Σ_n rows[n] ΔW_n G ΔW_nᵀ.

    parts: rows [N] and moment G [K, K]. Errors of different outputs are taken as independent.
    """

    parts: list[tuple[Tensor, Tensor]]

    @property
    def inputs(self) -> Tensor:
        """One moment [K, K] for all rows: the parts', each weighted by its mean row."""
        weighed = [float(rows.double().mean()) * moment.double() for rows, moment in self.parts]
        return torch.stack(weighed).sum(0)

    def loss(self, weight: Tensor, rounded: Tensor, form: Form) -> float:
        """Return the loss, in nats per token, of records in a weight's place."""
        total = 0.0
        for start in range(0, len(weight), ROWS):
            part = weight[start : start + ROWS].float()
            stored = rounded[start : start + ROWS].to(weight.device)
            error = part - records.dequantize(stored, form, part.shape[1], torch.float32)
            for rows, moment in self.parts:
                lost = ((error @ moment.to(error)) * error).sum(1)
                total += float((rows[start : start + ROWS].to(lost) * lost).sum().double()) / 2
        return total


def dense_copies(
    model: nn.Module, budget: ByteBudget, forms: Forms, made: dict[str, Tensor]
) -> dict[str, nn.Module]:
    """Make dense modules of rounded weights, in the dense dtype, for the places of the model's own.

    Those of a tied matrix share one weight.
    """
    copies: dict[str, nn.Module] = {}
    for matrix in budget.matrices:
        form = forms[matrix.name]
        if form is None:
            continue
        dtype = weight_of(model, matrix.name).dtype
        weight = records.dequantize(made[matrix.name], form, matrix.in_features, dtype)
        shared = nn.Parameter(weight, requires_grad=False)
        for name in matrix.names:
            copies[name] = _like(model.get_submodule(name), shared)
    return copies


def _like(module: nn.Module, weight: nn.Parameter) -> nn.Module:
    """Make a shallow copy of a module with another weight."""
    made = copy.copy(module)
    made._parameters = {**module._parameters, "weight": weight}
    return made
