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
from calr.rounding import (
    Curvature,
    Ordered,
    most_together,
    order_matrices,
    round_matrices,
    round_matrix,
    rounding_operations,
    truncate,
)
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
        priced = {m: self.budget.form(PRICED, m.in_features) for m in own}
        for together, form in progress(self._batches(priced), desc="prices", unit="batch"):
            if any(m.name not in known for m in together):  # again the same batch: the same bits
                for matrix, price in zip(together, self._prices(together, form), strict=True):
                    known.save(matrix.name, price)
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
        batches = self._batches({matrix: forms[matrix] for matrix in own})
        made: dict[Matrix, Rounding] = {}
        for together, form in progress(batches, desc="rounding", unit="batch"):
            made |= self._rounded(together, form)
            give_back()
        parallel.wait()
        for matrix in [m for m in forms if m not in made]:
            made |= self._rounded([matrix], forms[matrix])
        return {matrix: made[matrix] for matrix in forms}

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

    def _batches(self, forms: dict[Matrix, Form]) -> list[tuple[list[Matrix], Form]]:
        """Group what is rounded at once: experts' matrices of one stack and form, on a GPU."""
        groups: dict[object, list[Matrix]] = {}
        for matrix, form in forms.items():
            layer = matrix.layer
            key = (layer.stack, form) if layer is not None and layer.routed else matrix
            groups.setdefault(key, []).append(matrix)
        found = []
        for group in groups.values():
            shape = group[0].out_features, group[0].in_features
            most = most_together(*shape, self.model.device)
            parts = (group[i : i + most] for i in range(0, len(group), most))
            found += [(part, forms[part[0]]) for part in parts]
        return found

    def _prices(self, matrices: list[Matrix], form: Form) -> list[dict[str, Tensor]]:
        """Return what a `Price` has of rounding each of some matrices of one shape to a form."""
        curvatures = [self._curvature(matrix) for matrix in matrices]
        weights = [weight_of(self.model, matrix.name) for matrix in matrices]
        moments = [c.inputs.to(w.device) for c, w in zip(curvatures, weights, strict=True)]
        orders = order_matrices(moments)
        growths = self._growths(weights, form, curvatures, orders)
        if len(weights[0]) <= ROWS:
            made = self._rounded(matrices, form, curvatures, orders).values()
            stored = [present(of["weight"]) for of in made]
        else:
            weights, curvatures = _some_rows(weights, curvatures, ROWS)
            stored = round_matrices(weights, form, moments, orders)
        del moments, orders
        ranks, found = corrective_ranks(matrices[0]), []
        for weight, records_of, curvature, growth in zip(
            weights, stored, curvatures, growths, strict=True
        ):
            error = _error(weight, form, records_of)
            losses = torch.full((len(ranks),), curvature.loss(error)).double()
            if ranks[-1]:
                *_, gains = truncate(error, *curvature.one, ranks[-1])
                losses[1:] -= gains.cpu().cumsum(0)[[rank - 1 for rank in ranks[1:]]]
            found.append({"losses": losses.clamp(min=0), "growth": growth})
        return found

    def _growths(
        self,
        weights: list[Tensor],
        form: Form,
        curvatures: list[Curvature],
        orders: list[Ordered],
    ) -> list[Tensor]:
        """Return the losses of a few rows with each scale group, over that of the form's own."""
        groups = self.budget.groups(weights[0].shape[1])
        if len(groups) == 1:
            return [torch.ones(1) for _ in weights]
        weights, curvatures = _some_rows(weights, curvatures, min(FEW_ROWS, len(weights[0])))
        moments = [c.inputs.to(w.device) for c, w in zip(curvatures, weights, strict=True)]
        losses = torch.empty(len(weights), len(groups), dtype=torch.float64)
        for column, group in enumerate(groups):
            tried = dataclasses.replace(form, scale_group=group)
            stored = round_matrices(weights, tried, moments, orders)
            for row, (w, c, of) in enumerate(zip(weights, curvatures, stored, strict=True)):
                losses[row, column] = c.loss(_error(w, tried, of))
        return [of / of[0] if of[0] else torch.ones(len(groups)) for of in losses.float()]

    def _rounded(
        self,
        matrices: list[Matrix],
        form: Form,
        curvatures: list[Curvature] | None = None,
        orders: list[Ordered] | None = None,
    ) -> dict[Matrix, Rounding]:
        """Round matrices of one shape to a form, unless all of them are finished."""
        if any(_name(matrix, form) not in self.finished for matrix in matrices):
            self._round(matrices, form, curvatures, orders)
        names = {matrix: _name(matrix, form) for matrix in matrices}
        return {m: self.placed(self.finished, n, self.finished.load(n)) for m, n in names.items()}

    def _round(
        self,
        matrices: list[Matrix],
        form: Form,
        curvatures: list[Curvature] | None,
        orders: list[Ordered] | None,
    ) -> None:
        curvatures = curvatures or [self._curvature(matrix) for matrix in matrices]
        weights = [weight_of(self.model, matrix.name) for matrix in matrices]
        moments = [c.inputs.to(w.device) for c, w in zip(curvatures, weights, strict=True)]
        stored = round_matrices(weights, form, moments, orders or order_matrices(moments))
        for matrix, weight, curvature, of in zip(
            matrices, weights, curvatures, stored, strict=True
        ):
            made = {"weight": of}
            if form.corrective_rank:
                error = _error(weight, form, of)
                up, down, _ = truncate(error, *curvature.one, form.corrective_rank)
                made |= corrective_factors(down, up.mT, form)
            self.finished.save(_name(matrix, form), made)

    def _curvature(self, matrix: Matrix) -> Curvature:
        if matrix.layer is not None:
            moments = self.statistics.moments(matrix.layer).with_prior()
            assert moments.rows is not None
            return Curvature([(moments.rows, moments.input.float())])
        known, parts = self.statistics.vocabulary(), []
        if matrix.kind in ("head", "tied"):
            parts.append((known["outputs"], Moments(known["hidden"]).with_prior().input))
        if matrix.kind in ("embedding", "tied"):
            inner = self.model.get_submodule(matrix.name)
            scale = float(getattr(inner, "scalar_embed_scale", 1.0))
            moment = Moments(known["inputs"]).with_prior().input * scale**2
            parts.append((smoothed(known["tokens"]), moment))
        return Curvature(parts)


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


def _name(matrix: Matrix, form: Form) -> str:
    """Name a finished matrix."""
    return f"rounded-{matrix.name}-{form.bits}-{form.scale_group}-{form.corrective_rank}"


def _some_rows(
    weights: list[Tensor], curvatures: list[Curvature], count: int
) -> tuple[list[Tensor], list[Curvature]]:
    """Choose rows of every matrix that tell of all; each is as heavy as those it stands for."""
    chosen = [curvature.sampled(count) for curvature in curvatures]
    rows = [weight[of] for weight, (of, _) in zip(weights, chosen, strict=True)]
    return rows, [c.at(*of) for c, of in zip(curvatures, chosen, strict=True)]


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
