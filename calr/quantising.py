"""Choose a form for every matrix of a model within a budget of bytes, and round to it."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calr import parallel
from calr.methods import Moments
from calr.model import Absent, Matrix, absent, balance, present, quantize, weight_of
from calr.progress import give_back, progress
from calr.ranks import PRICED, ByteBudget, Forms, Price, corrective_ranks, least_loss
from calr.recipe import Recipe
from calr.rounding import gptq, round_matrix, rounding_operations, truncate
from calr.statistics import Statistics
from calr.storage import Store
from calr.training import (
    Primary,
    StudentEmbedding,
    StudentLinear,
    corrected_students,
    recorded_outputs,
)
from calr_kernels import records
from calr_kernels.forms import CORRECTIVE, LEAST_GROUP, Form
from calr_kernels.quantized import factor_numbers

ROWS = 4096  # of a matrix by which the price of its rounding is told
FEW_ROWS = 128  # by which is told what scale groups of other lengths cost

Rounding = dict[str, Tensor]  # what is stored of a matrix, by its name in the module


def quantised(
    model: PreTrainedModel,
    budget: ByteBudget,
    recipe: Recipe,
    ids: Tensor,
    statistics: Statistics,
    parts: Store,
    checkpointed: bool = False,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Choose forms, round, train norms, scales and corrective paths, replace the matrices.

    ids [S, T]: text of the training; parts: where what is finished is kept; checkpointed: see
    `corrected`. Returns how each module is stored, and what the training did.
    """
    found: dict[str, Any] = {}
    quantiser = Quantiser(model, budget, statistics, parts.within("rounded"), absent(model))
    forms = quantiser.forms(exact=recipe.solver == "exact")
    chosen = {m: form for m in budget.matrices if (form := forms[m.name]) is not None}
    made = quantiser.rounded(chosen)
    statistics.let_go()
    if recipe.correction_tokens and made:
        recorded = recorded_outputs(model, ids, recipe, statistics.store)
        placed = students(model, chosen, made)  # after the dense model has run: what they hold
        done = corrected_students(model, placed, *recorded, recipe, parts, checkpointed)
        found["correction"] = dataclasses.asdict(done)
        kept = parts.within("trained")
        with parallel.first_then_others():
            for matrix in made:
                give_back()
                student, *_ = (placed.pop(name) for name in matrix.names)
                made[matrix] = quantiser.placed(kept, matrix.name, trained(student))
    stored: dict[str, dict[str, Any]] = {}
    for matrix, form in chosen.items():
        quantize(model, matrix.names, form, made[matrix])
        stored |= {name: form.to_dict() for name in matrix.names}
    return stored, found


@dataclass(frozen=True)
class Quantiser:
    """Rounds the matrices of a dense model; what is finished is kept in a store.

    lazily: what is stored of a matrix stays there, absent from memory, as the model's own weights.
    """

    model: PreTrainedModel
    budget: ByteBudget
    statistics: Statistics
    finished: Store
    lazily: bool = False

    def forms(self, *, exact: bool = False) -> Forms:
        """Choose the form of every matrix: each is rounded once, to learn what that costs.

        What it costs is kept with the statistics, for other budgets.
        """
        prices, matrices = {}, self.budget.choosable
        known = self.statistics.store.within(prices_name(self.budget))
        if parallel.agree(any(matrix.name not in known for matrix in matrices)):
            self.statistics.collect()
        own = parallel.share(matrices, [operations(m) for m in matrices])
        for matrix in progress(own, desc="prices", unit="matrix"):
            form = self.budget.form(PRICED, matrix.in_features)
            if matrix.name not in known:
                known.save(matrix.name, self._price(matrix, form))
                give_back()
        parallel.wait()
        for matrix in matrices:
            prices[matrix.name] = Price.of(known.load(matrix.name))
        return least_loss(self.budget, prices, exact=exact)

    def rounded(self, forms: dict[Matrix, Form]) -> dict[Matrix, Rounding]:
        """Round matrices to forms: the tensors that are stored of each."""
        if parallel.size() > 1:  # together: what one of them lacks another may have finished
            self.statistics.collect()
        own = parallel.share(list(forms), [operations(matrix) for matrix in forms])
        made = {}
        for matrix in progress(own, desc="rounding", unit="matrix"):
            made[matrix] = self._rounded(matrix, forms[matrix])
            give_back()
        parallel.wait()
        return {m: made[m] if m in made else self._rounded(m, form) for m, form in forms.items()}

    def placed(self, store: Store, name: str, made: Rounding) -> Rounding:
        """Return what is stored of a matrix, in memory or, lazily, in a file of a store."""
        if not self.lazily:
            return made
        if name not in store:
            store.save(name, made)
        return {
            key: Absent.of(tensor, partial(store.read, name, key), tensor.device)
            for key, tensor in made.items()
        }

    def _price(self, matrix: Matrix, form: Form) -> dict[str, Tensor]:
        """Return what a `Price` has of rounding a matrix to a form."""
        curvature, ranks = self._curvature(matrix), corrective_ranks(matrix)
        weight = weight_of(self.model, matrix.name)
        moment = curvature.inputs.to(weight.device)
        order = gptq.ordered(moment)
        growth = self._growth(weight, form, curvature, order)
        if len(weight) <= ROWS:
            stored = present(self._rounded(matrix, form, curvature, order)["weight"])
        else:
            rows, counts = curvature.sampled(ROWS)
            weight, curvature = weight[rows], curvature.at(rows, counts)
            stored = round_matrix(weight, form, moment, order).records
        del moment, order
        error = _error(weight, form, stored)
        losses = torch.full((len(ranks),), curvature.loss(error)).double()
        if ranks[-1]:
            *_, gains = truncate(error, *curvature.one, ranks[-1])
            losses[1:] -= gains.cpu().cumsum(0)[[rank - 1 for rank in ranks[1:]]]
        return {"losses": losses.clamp(min=0), "growth": growth}

    def _growth(
        self, weight: Tensor, form: Form, curvature: "_Curvature", order: gptq.Ordered
    ) -> Tensor:
        """Return the losses of a few rows with each scale group, over that of the form's own."""
        groups = self.budget.groups(weight.shape[1])
        if len(groups) == 1:
            return torch.ones(1)
        rows, counts = curvature.sampled(min(FEW_ROWS, len(weight)))
        weight, curvature = weight[rows], curvature.at(rows, counts)
        moment, losses = curvature.inputs.to(weight.device), []
        for group in groups:
            tried = dataclasses.replace(form, scale_group=group)
            found = round_matrix(weight, tried, moment, order)
            losses.append(curvature.loss(_error(weight, tried, found.records)))
        return torch.tensor(losses) / losses[0] if losses[0] else torch.ones(len(groups))

    def _rounded(
        self,
        matrix: Matrix,
        form: Form,
        curvature: "_Curvature | None" = None,
        order: gptq.Ordered | None = None,
    ) -> Rounding:
        name = f"rounded-{matrix.name}-{form.bits}-{form.scale_group}-{form.corrective_rank}"
        if name not in self.finished:
            curvature = curvature or self._curvature(matrix)
            weight = weight_of(self.model, matrix.name)
            found = round_matrix(weight, form, curvature.inputs.to(weight.device), order)
            made = {"weight": found.records}
            if form.corrective_rank:
                error = _error(weight, form, found.records)
                up, down, _ = truncate(error, *curvature.one, form.corrective_rank)
                made |= corrective_factors(down, up.mT, form)
            self.finished.save(name, made)
        return self.placed(self.finished, name, self.finished.load(name))

    def _curvature(self, matrix: Matrix) -> "_Curvature":
        if matrix.layer is not None:
            moments = self.statistics.moments(matrix.layer).with_prior()
            assert moments.rows is not None
            return _Curvature([(moments.rows, moments.input.float())])
        known, parts = self.statistics.vocabulary(), []
        if matrix.kind in ("head", "tied"):
            parts.append((known["outputs"], Moments(known["hidden"]).with_prior().input))
        if matrix.kind in ("embedding", "tied"):
            inner = self.model.get_submodule(matrix.name)
            scale = float(getattr(inner, "scalar_embed_scale", 1.0))
            moment = Moments(known["inputs"]).with_prior().input * scale**2
            parts.append((smoothed(known["tokens"]), moment))
        return _Curvature(parts)


def operations(matrix: Matrix) -> float:
    """Estimate how many operations, of a product, take the time of rounding a matrix."""
    return rounding_operations(matrix.parameters, matrix.in_features)


def prices_name(budget: ByteBudget) -> str:
    """Name what rounding to PRICED bits costs, among the statistics."""
    form = budget.form(PRICED, LEAST_GROUP)
    groups = "-".join(map(str, budget.scale_groups))
    return f"prices-{groups}-{form.levels}-{form.scale_dtype}"


def smoothed(counts: Tensor) -> Tensor:
    """Turn counts [V] of tokens into frequencies of which none is 0.

    The frequency of those seen once, which is that of all that were not seen (Good, Biometrika
    1953), is spread over all tokens.
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

    def at(self, rows: Tensor, counts: Tensor) -> "_Curvature":
        """Keep some rows, each as heavy as all that it stands for."""
        return _Curvature([(own[rows] * counts.to(own), moment) for own, moment in self.parts])

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


def _error(weight: Tensor, form: Form, stored: Tensor) -> Tensor:
    """Return what rounding took from a weight, [N, K] float32."""
    kept = records.dequantize(stored, form, weight.shape[1], torch.float32)
    return weight.float() - kept.to(weight.device)


def corrective_factors(down: Tensor, up: Tensor, form: Form) -> Rounding:
    """Return what is stored of a corrective path, down [c, K] and up [c, N]: records, in 8 bits."""
    up, down = balance(up.mT, down)
    factors = {"corrective.down": down, "corrective.up": up.mT.contiguous()}
    if form.corrective_bits == 16:
        return factors
    return {name: round_matrix(factor, CORRECTIVE).records for name, factor in factors.items()}


def students(
    model: nn.Module, forms: dict[Matrix, Form], made: dict[Matrix, Rounding]
) -> dict[str, nn.Module]:
    """Make modules of rounded weights that can be trained, for the places of the model's own.

    Those of a tied matrix share one primary path.
    """
    placed: dict[str, nn.Module] = {}
    for matrix, form in forms.items():
        device = model.get_submodule(matrix.name).get_parameter("weight").device
        tensors = {name: present(tensor).to(device) for name, tensor in made[matrix].items()}
        primary = Primary(tensors["weight"], form, matrix.in_features)
        for name in matrix.names:
            placed[name] = _student(model.get_submodule(name), primary, tensors)
    return placed


def _student(module: nn.Module, primary: Primary, tensors: Rounding) -> nn.Module:
    if isinstance(module, nn.Embedding):
        scale = float(getattr(module, "scalar_embed_scale", 1.0))
        return StudentEmbedding(primary, scale, module.weight.dtype)
    assert isinstance(module, nn.Linear)
    if "corrective.down" not in tensors:
        return StudentLinear(primary, module.bias)
    down, up = (
        factor_numbers(tensors[f"corrective.{name}"], columns, torch.float32)
        for name, columns in (("down", module.in_features), ("up", module.out_features))
    )
    return StudentLinear(primary, module.bias, down, up)


def trained(student: nn.Module) -> Rounding:
    """Return what is stored of a module that was trained, its factors rounded."""
    assert isinstance(student, StudentLinear | StudentEmbedding)
    made = {"weight": student.primary.records()}
    if isinstance(student, StudentLinear) and student.down is not None:
        assert student.up is not None
        made |= corrective_factors(student.down.detach(), student.up.detach(), student.primary.form)
    return {name: tensor.cpu() for name, tensor in made.items()}
