"""Look ahead: ranks, parameters, memory and time of a compression, from shapes alone."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calr.errors import CalrError
from calr.methods import resolve
from calr.model import (
    GGUF_DTYPE,
    Structure,
    analyse,
    gguf_file,
    load_skeleton,
    resolve_dtype,
    tensor_bytes,
)
from calr.quantising import losses_name
from calr.ranks import (
    CACHE_BYTES,
    Budget,
    ByteBudget,
    Ranks,
    Shape,
    by_block,
    byte_budget,
    corrective_ranks,
    curves_name,
    even,
    feasible_last_k,
    least_error,
    least_loss,
    report,
    uniform,
)
from calr.recipe import Recipe
from calr.statistics import HELD_BYTES, LOGITS
from calr.storage import Store
from calr.text import CACHE_BYTES as SAMPLING_BYTES
from calr.text import parts_of
from calr.training import PART_TOKENS
from calr_kernels.forms import LEAST_GROUP

LIBRARY_BYTES = 700_000_000  # resident size of Python with torch and transformers loaded
ROUND_FLOPS = 50_000  # of a product, in whose time a weight is priced and rounded
EIGEN_FLOPS = 25  # eigenvalues and vectors of an n × n matrix cost about 25 n³


@dataclass(frozen=True)
class Plan:
    """What a compression would do.

    ranks_follow_calibration: the ranks (or bits) of `layers` are not final. feasible_last_k: under
    allocation=last_k, the exact ranks for every number k of last blocks that can reach keep.
    exports: the formats that `calr export` will write of the result.
    """

    model: str
    layers: list[dict[str, Any]]
    totals: dict[str, float]
    coverage: float
    ranks_follow_calibration: bool
    feasible_last_k: dict[int, dict[str, Any]]
    exports: list[str]
    peak_memory_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return dataclasses.asdict(self)


def plan(
    source: str,
    recipe: Recipe | None = None,
    *,
    statistics: str | Path | None = None,
    dtype: str = "auto",
    calibration: str = "sampled",
    trust_remote_code: bool = False,
) -> Plan:
    """Plan a compression without weights in memory and without writing anything.

    Ranks are exact for allocation=uniform, and for global when statistics names the directory of an
    earlier run with the same method, as bits are; otherwise they follow calibration, and what is
    shown are nearly uniform ones, with the same totals to within one rank step.
    """
    recipe, sampled = recipe or Recipe(), "sampled" in parts_of(calibration)
    model = load_skeleton(source, trust_remote_code=trust_remote_code)
    structure, stored = analyse(model, recipe.skip), _dtype(source, model, dtype)
    file = gguf_file(source)
    before = tensor_bytes(model, stored) if file is None else file.stat().st_size
    bytes_allowed = byte_budget(model, structure, recipe, stored)
    if bytes_allowed is not None:
        return _quantised(
            source, model, structure, recipe, bytes_allowed, before, statistics, sampled
        )
    budget = Budget.of(structure, recipe)
    ranks, exact = _ranks(budget, recipe, statistics)
    layers, element = report.stored_at(ranks, recipe.layout), stored.itemsize
    totals = report.totals(structure, layers)
    removed = totals["linear_parameters"] - totals["kept_parameters"]
    after = tensor_bytes(model, stored) - element * int(removed)
    totals = {"source_bytes": before} | report.byte_totals(structure, after) | totals
    return Plan(
        model=source,
        layers=report.rows(structure, layers),
        totals=totals,
        coverage=structure.coverage,
        ranks_follow_calibration=not exact,
        feasible_last_k=_feasible_last_k(structure, budget, recipe),
        exports=["dense"],
        peak_memory_bytes=_peak_memory(structure, recipe, element, _vocabulary(model), sampled),
        seconds=_seconds(structure, recipe),
    )


def _quantised(
    source: str,
    model: Any,
    structure: Structure,
    recipe: Recipe,
    budget: ByteBudget,
    before: int,
    statistics: str | Path | None,
    sampled: bool,
) -> Plan:
    """Plan the forms that statistics lead to, or forms of nearly one width without any."""
    if statistics is None:
        forms = even(budget)
    else:
        losses = _known_losses(budget, Path(statistics))
        forms = least_loss(budget, losses, exact=recipe.solver == "exact")
    stored = {name: form.to_dict() for name, form in forms.items() if form is not None}
    rows = report.quantised_rows(budget.matrices, stored, budget.element)
    after = budget.fixed + sum(row["bytes"] for row in rows)
    totals = {"source_bytes": before} | report.byte_totals(structure, after)
    totals["smallest_bytes"] = budget.smallest
    totals["smallest_bits"] = 8 * budget.smallest / structure.model_parameters
    return Plan(
        model=source,
        layers=rows,
        totals=totals,
        coverage=sum(m.parameters for m in budget.matrices) / structure.model_parameters,
        ranks_follow_calibration=statistics is None,
        feasible_last_k={},
        exports=["dense", *([] if recipe.target is None else [recipe.target])],
        peak_memory_bytes=_peak_memory(
            structure, recipe, budget.element, _vocabulary(model), sampled
        ),
        seconds=_seconds(structure, recipe),
    )


def _known_losses(budget: ByteBudget, statistics: Path) -> dict[str, list[float]]:
    """Read what an earlier run found rounding to cost; CalrError where it is none of this."""
    name = losses_name(budget)
    known = Store(statistics / name) if (statistics / name).is_dir() else Store()
    found = {}
    for matrix in budget.matrices:
        if matrix.name not in known:
            raise CalrError(
                f"{statistics}: does not say what rounding {matrix.name} costs ({name}); compress "
                "with it first"
            )
        found[matrix.name] = known.load(matrix.name)["losses"].tolist()
        if len(found[matrix.name]) != len(corrective_ranks(matrix)):
            raise CalrError(
                f"{statistics}: {matrix.name} is of another shape there; it is another model's"
            )
    return found


def _ranks(budget: Budget, recipe: Recipe, statistics: str | Path | None) -> tuple[Ranks, bool]:
    """Return ranks, and whether they are those that a compression will choose."""
    exact = recipe.solver == "exact"
    if statistics is not None and recipe.allocation == "global":
        return least_error(budget, _known_curves(budget, recipe, statistics), exact=exact), True
    if recipe.allocation == "uniform":
        return uniform(budget), True
    return least_error(budget, {s.name: _even(s, recipe) for s in budget.shapes}), False


def _known_curves(budget: Budget, recipe: Recipe, statistics: str | Path) -> dict[str, np.ndarray]:
    """Read the error curves that an earlier run left; CalrError where they are none of this."""
    name, place = curves_name(recipe), Path(statistics)
    if not (place / f"{name}.safetensors").exists():
        raise CalrError(f"{statistics}: holds no error curves of {name}; compress with it first")
    store = Store(place)
    if name not in store:
        raise CalrError(f"{statistics}: its error curves are damaged; compress with it again")
    curves = store.load(name)
    for shape in budget.shapes:
        length = min(shape.out_features, shape.in_features) + 1
        if shape.name not in curves or len(curves[shape.name]) != length:
            raise CalrError(f"{statistics}: has no curve of {shape.name}; it is another model's")
    return {name: curve.numpy() for name, curve in curves.items()}


def _even(shape: Shape, recipe: Recipe) -> list[float]:
    """Return an error curve under which all layers keep the same fraction, as nearly as can be."""
    ranks = range(min(shape.out_features, shape.in_features) + 1)
    kept = [shape.cost(recipe.layout, rank) / shape.dense for rank in ranks]
    return [shape.dense * max(0.0, 1 - k) ** 2 for k in kept]


def _feasible_last_k(
    structure: Structure, budget: Budget, recipe: Recipe
) -> dict[int, dict[str, Any]]:
    if recipe.allocation != "last_k":
        return {}
    found = feasible_last_k(budget, by_block(budget, structure))
    return {k: {"keep_per_layer": keep, "ranks": ranks} for k, (keep, ranks) in found.items()}


def _dtype(source: str, model: torch.nn.Module, dtype: str) -> torch.dtype:
    """Return in what dtype a compression stores what it does not quantise."""
    found = resolve_dtype(dtype)
    if found == "auto":
        own = getattr(model.config, "dtype", None) or torch.float32
        found = own if gguf_file(source) is None else GGUF_DTYPE
    dtype_found: torch.dtype = getattr(torch, found) if isinstance(found, str) else found
    return dtype_found


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().num_embeddings)


def _peak_memory(
    structure: Structure, recipe: Recipe, element: int, vocabulary: int, sampled: bool
) -> int:
    """Estimate bytes: the largest of what the phases hold.

    Weights are read block by block; all are in memory only while the model samples text, and those
    that are trained.
    """
    layers, tokens = structure.layers, recipe.samples * recipe.window
    around = structure.model_parameters - structure.block_parameters
    read = element * max(structure.block_parameters // structure.blocks, around)
    groups = {layer.group: layer.in_features for layer in layers}
    moments = 4 * max(
        sum(groups[g] ** 2 for g in {layer.group for layer in structure.in_block(block)})
        for block in range(structure.blocks)
    )
    boundary = 2 * tokens * layers[0].in_features * element
    features = sum(layer.in_features + layer.out_features for layer in layers)
    largest = [read + moments + boundary]
    if sampled:
        largest.append(element * structure.model_parameters + SAMPLING_BYTES)
    if recipe.quantised or resolve(recipe.method, recipe.method_options).needs_gradients(recipe):
        logits = 4 * 4 * min(LOGITS, recipe.window * vocabulary)
        largest.append(read + HELD_BYTES + logits + 2 * moments)
    if recipe.quantised:  # two float64 and two float32 matrices of a moment's size
        widest = max(layer.parameters for layer in layers)
        largest.append(moments + 24 * max(groups.values()) ** 2 + 3 * 4 * widest)
        trained = structure.model_parameters + 4 * 6 * structure.model_parameters // LEAST_GROUP
    else:  # float32: values, gradients, two moments, start and best
        kept = sum(8 * (x.parameters + min(x.in_features, x.out_features) ** 2) for x in layers)
        decompositions = min(CACHE_BYTES, kept if recipe.allocation != "uniform" else 0)
        largest.append(read + decompositions + 4 * structure.linear_parameters)
        trained = int(6 * 4 * recipe.fraction * structure.linear_parameters) + element * around
    if recipe.correction_tokens:
        step = max(recipe.window, min(recipe.step_tokens, PART_TOKENS))
        active = 4 * step * features // (structure.blocks if recipe.gradient_checkpointing else 1)
        largest.append(trained + 4 * 4 * vocabulary * min(step, PART_TOKENS) + active)
    return LIBRARY_BYTES + max(largest)


def _seconds(structure: Structure, recipe: Recipe) -> float:
    """Estimate the time on this machine from a short matrix product (forward, backward, eigen)."""
    a = torch.ones(1024, 1024)
    a @ a
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    flops_per_second = 5 * 2 * 1024**3 / (time.perf_counter() - start)
    tokens = recipe.samples * recipe.window
    forward: float = 2 * structure.block_parameters * tokens
    forward += (
        2 * tokens * sum(x**2 for x in {y.group: y.in_features for y in structure.layers}.values())
    )
    gradients = resolve(recipe.method, recipe.method_options).needs_gradients(recipe)
    if recipe.quantised or gradients:
        gradient_tokens = min(recipe.gradient_samples, recipe.samples) * recipe.window
        forward += 6 * structure.model_parameters * gradient_tokens
    student = structure.model_parameters - (1 - recipe.fraction) * structure.linear_parameters
    forward += recipe.correction_tokens * (2 * structure.model_parameters + 6 * student)
    passes = 5 * recipe.shifted_inputs + 3 * recipe.block_epochs  # through the blocks
    forward += passes * 2 * structure.block_parameters * tokens
    if recipe.quantised:
        return (forward + ROUND_FLOPS * structure.model_parameters) / flops_per_second
    eigen = sum(
        2 * EIGEN_FLOPS * min(x.in_features, x.out_features) ** 3 + 12 * x.parameters * 1000
        for x in structure.layers
    )
    return (forward + 4 * eigen) / flops_per_second
