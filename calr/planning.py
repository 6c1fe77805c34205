"""Look ahead: ranks, parameters, memory and time of a compression, from shapes alone."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calr.errors import CalrError
from calr.estimates import Work
from calr.limits import ways_within
from calr.model import (
    GGUF_DTYPE,
    Structure,
    analyse,
    gguf_files,
    load_skeleton,
    on_grid,
    resolve_dtype,
    tensor_bytes,
)
from calr.progress import Phase
from calr.quantising import prices_name
from calr.ranks import (
    Budget,
    ByteBudget,
    Price,
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
from calr.statistics import described, known_statistics
from calr.storage import Store
from calr.text import parts_of
from calr.training import check_trainable, windows_drawn


@dataclass(frozen=True)
class Plan:
    """What a compression would do.

    ranks_follow_calibration: the ranks (or bits) of `layers` are not final. feasible_last_k: under
    allocation=last_k, the exact ranks for every number k of last blocks that can reach keep.
    exports: the formats that `calr export` will write of the result. phases: what each is
    estimated to take. disk_bytes: of DIRECTORY, finished parts included, while it is at work.
    """

    model: str
    layers: list[dict[str, Any]]
    totals: dict[str, float]
    coverage: float
    ranks_follow_calibration: bool
    feasible_last_k: dict[int, dict[str, Any]]
    exports: list[str]
    phases: dict[str, Phase]
    peak_memory_bytes: int
    peak_gpu_bytes: int
    disk_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return dataclasses.asdict(self)


def plan(
    source: str | Path,
    recipe: Recipe | None = None,
    *,
    statistics: str | Path | None = None,
    dtype: str = "auto",
    calibration: str | Path = "sampled",
    trust_remote_code: bool = False,
    max_memory: str | None = None,
    device: str = "cpu",
    device_memory: str | None = None,
) -> Plan:
    """Plan a compression without weights in memory and without writing anything.

    The arguments are those of `compress_to`; a GPU that is named as device need not be here.

    Ranks are exact for allocation=uniform, and for global when statistics names the directory of an
    earlier run with the same method, as bits are; otherwise they follow calibration, and what is
    shown are nearly uniform ones, with the same totals to within one rank step.
    """
    source, recipe = str(source), recipe or Recipe()
    if recipe.quantised and on_grid(source):
        recipe = dataclasses.replace(recipe, rotate=False)
    model = load_skeleton(source, trust_remote_code=trust_remote_code)
    structure, stored = analyse(model, recipe.skip), _dtype(source, model, dtype)
    files = gguf_files(source)
    before = sum(file.stat().st_size for file in files) or tensor_bytes(model, stored)
    bytes_allowed = byte_budget(model, structure, recipe, stored)
    computed = torch.float32 if files and dtype == "auto" else stored
    check_trainable(recipe, computed)
    sampled, where = "sampled" in parts_of(calibration), _device(device)
    work = Work.of(model, structure, recipe, computed, sampled, device=where)
    phases = work.phases(ways_within(work, max_memory, device_memory))
    known = None
    if statistics and (recipe.quantised or recipe.allocation == "global"):
        drawn = windows_drawn(recipe)
        about = described(source, recipe, computed, calibration, drawn, work.tied)
        known = known_statistics(statistics, about)
    if bytes_allowed is not None:
        return _quantised(source, work, phases, bytes_allowed, before, known)
    budget = Budget.of(structure, recipe)
    ranks, exact = _ranks(budget, recipe, known)
    layers, element = report.stored_at(ranks, recipe.layout), stored.itemsize
    totals = report.totals(structure, layers)
    removed = totals["linear_parameters"] - totals["kept_parameters"]
    after = tensor_bytes(model, stored) - element * int(removed) + report.pivot_bytes(layers)
    totals = {"source_bytes": before} | report.byte_totals(structure, after) | totals
    return Plan(
        model=source,
        layers=report.rows(structure, layers),
        totals=totals,
        coverage=structure.coverage,
        ranks_follow_calibration=not exact,
        feasible_last_k=_feasible_last_k(structure, budget, recipe),
        exports=["dense"],
        **_taken(work, phases, after),
    )


def _quantised(
    source: str,
    work: Work,
    phases: dict[str, Phase],
    budget: ByteBudget,
    before: int,
    statistics: Store | None,
) -> Plan:
    """Plan the forms that statistics lead to, or forms of nearly one width without any."""
    structure, recipe = work.structure, work.recipe
    if statistics is None:
        forms = even(budget)
    else:
        prices = _known_prices(budget, statistics)
        forms = least_loss(budget, prices, exact=recipe.solver == "exact")
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
        **_taken(work, phases, after),
    )


def _taken(work: Work, phases: dict[str, Phase], after: int) -> dict[str, Any]:
    """Sum up what the phases take; after: bytes of the result."""
    return {
        "phases": phases,
        "peak_memory_bytes": max(phase.peak_bytes for phase in phases.values()),
        "peak_gpu_bytes": max(phase.gpu_bytes for phase in phases.values()),
        "disk_bytes": work.disk(after),
        "seconds": sum(phase.seconds for phase in phases.values()),
    }


def _known_prices(budget: ByteBudget, statistics: Store) -> dict[str, Price]:
    """Read what an earlier run found rounding to cost; CalrError where it is none of this."""
    name, place, found = prices_name(budget), statistics.directory, {}
    known = Store() if place is None or not (place / name).is_dir() else statistics.within(name)
    for matrix in budget.choosable:
        if matrix.name not in known:
            raise CalrError(
                f"{place}: does not say what rounding {matrix.name} costs ({name}); compress "
                "with it first"
            )
        found[matrix.name] = price = Price.of(known.load(matrix.name))
        counts = len(corrective_ranks(matrix)), len(budget.groups(matrix.in_features))
        if (len(price.losses), len(price.growth)) != counts:
            raise CalrError(
                f"{place}: {matrix.name} is of another shape there; it is another model's"
            )
    return found


def _ranks(budget: Budget, recipe: Recipe, statistics: Store | None) -> tuple[Ranks, bool]:
    """Return ranks, and whether they are those that a compression will choose."""
    exact = recipe.solver == "exact"
    if statistics is not None and recipe.allocation == "global":
        return least_error(budget, _known_curves(budget, recipe, statistics), exact=exact), True
    if recipe.allocation == "uniform":
        return uniform(budget), True
    return least_error(budget, {s.name: _even(s, recipe) for s in budget.shapes}), False


def _known_curves(budget: Budget, recipe: Recipe, statistics: Store) -> dict[str, np.ndarray]:
    """Read the error curves that an earlier run left; CalrError where they are none of this."""
    name, place = curves_name(recipe), statistics.directory
    if name not in statistics:
        raise CalrError(
            f"{place}: holds no whole error curves of {name}; compress with it first or, where it "
            "is of another model, text or rotation, name another directory"
        )
    curves = statistics.load(name)
    for shape in budget.shapes:
        length = min(shape.out_features, shape.in_features) + 1
        if shape.name not in curves or len(curves[shape.name]) != length:
            raise CalrError(f"{place}: has no curve of {shape.name}; it is another model's")
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


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise CalrError(f"device={name}: is none; name cpu, cuda, cuda:1, ...") from None


def _dtype(source: str, model: torch.nn.Module, dtype: str) -> torch.dtype:
    """Return in what dtype a compression stores what it does not quantise."""
    found = resolve_dtype(dtype)
    if found == "auto":
        own = getattr(model.config, "dtype", None) or torch.float32
        found = GGUF_DTYPE if gguf_files(source) else own
    dtype_found: torch.dtype = getattr(torch, found) if isinstance(found, str) else found
    return dtype_found
