"""Compress a model: calibrate, decompose, allocate ranks, replace the layers."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from calr import allocation, layouts, methods
from calr.allocation import Ranks
from calr.blocks import BlockRunner, set_submodule
from calr.blockwise import BlockFit
from calr.calibration import (
    Statistics,
    block_influence,
    check_finite,
    collect,
    fingerprint,
    open_statistics,
)
from calr.correction import correct, norms, windows_needed, windows_used
from calr.elastic import complete, whole
from calr.errors import CalrError
from calr.integrations.transformers import CalrConfig, attach
from calr.methods import Decomposition, Method, Moments
from calr.recipe import Recipe
from calr.store import Store, claim
from calr.structure import Layer, Structure, analyse, check_window
from calr.teacher import collect_targets
from calr.text import Source, calibration_windows, content_of
from calr.training import Trained
from calr_kernels import LowRankLinear
from calr_kernels.nn import Layout

CACHE_BYTES = 4 << 30  # decompositions kept between allocation and factorisation
MEASURE_WINDOWS = 4  # calibration windows on which hidden states are measured

logger = logging.get_logger(__name__)


def compress(
    model: PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    calibration: Source | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    statistics: str | Path | None = None,
    work: str | Path | None = None,
    elastic: bool = False,
) -> PreTrainedModel:
    """Compress a dense causal language model in place and return it.

    calibration: a path or source (see calr.text), a list of texts, or token ids [S, T]; None is
    text sampled from the model itself. tokenizer: needed for text; by default that of
    model.name_or_path. statistics: a directory in which calibration statistics are kept and found
    again. work: a directory for finished parts, so that a killed run can continue (another one is
    refused there). elastic: keep every layer whole, as ordered factors with their error curves, for
    `resize`; keep, layout and training do not count then. The model is changed only after
    everything has been computed; CalrError says what is wrong otherwise.

    >>> from calr.testing import tiny_llama
    >>> model = compress(tiny_llama(), Recipe(keep=0.5), calibration=torch.ones(2, 8).long())
    >>> type(model.model.layers[0].mlp.up_proj).__name__
    'LowRankLinear'
    """
    recipe = recipe or Recipe()
    structure = analyse(model, recipe.skip)
    if elastic:
        recipe = whole(recipe)
    require_reachable(structure, recipe)
    check_finite(model)
    if work is not None:
        work = Path(work)
        given = calibration if isinstance(calibration, Tensor) else content_of(calibration)
        key = fingerprint(model, recipe, elastic, given)
        claim(work, key, "holds parts of another run; name another directory or delete it")
    training, corrected = model.training, {}
    model.eval()
    try:
        ids = _windows(model, recipe, calibration, tokenizer, work)
        run = _Run(model, structure, recipe, spread(ids, recipe.samples), statistics, work)
        replacements = run.factorise(run.full_ranks() if elastic else run.allocate())
        if elastic:
            replacements = run.pack(run.completed(replacements), "two_factor")
        elif recipe.correction_tokens and replacements:
            done, replacements = _correct(run, replacements, ids)
            corrected["correction"] = dataclasses.asdict(done)
        else:
            replacements = run.pack(replacements, recipe.layout)
    finally:
        model.train(training)
    errors = run.sampled_errors() if elastic else None
    for name, layer in replacements.items():
        set_submodule(model, name, layer.train(training))
    layers = {n: {"layout": layer.layout, "rank": layer.rank} for n, layer in replacements.items()}
    described = recipe.to_dict() | {"calibration": describe(calibration), **corrected}
    described["tokens"] = min(len(ids), recipe.samples) * ids.shape[1]
    attach(model, CalrConfig(layers=layers, recipe=described, errors=errors))
    return model


def _windows(
    model: PreTrainedModel,
    recipe: Recipe,
    calibration: Source | None,
    tokenizer: PreTrainedTokenizerBase | None,
    work: Path | None,
) -> Tensor:
    """Draw all windows of text [S, T] that the run needs, once."""
    kept = Store(work)
    if not isinstance(calibration, Tensor):
        check_window(model, "window", recipe.window)
    if "calibration" not in kept:
        windows = calibration_windows(
            calibration,
            tokenizer,
            model,
            samples=max(recipe.samples, windows_needed(recipe)),
            window=recipe.window,
            seed=recipe.seed,
        )
        if recipe.correction_tokens:  # says what is too little before anything is kept
            windows_used(windows, recipe)
        kept.save("calibration", {"ids": windows})
    ids = kept.load("calibration")["ids"]
    check_window(model, "window", ids.shape[1])
    embeddings: Any = model.get_input_embeddings()
    if int(ids.max()) >= embeddings.num_embeddings:
        raise CalrError(
            f"calibration ids: {int(ids.max())} is outside the model's vocabulary of "
            f"{embeddings.num_embeddings}; is it another model's tokenizer?"
        )
    return ids


def spread(ids: Tensor, count: int) -> Tensor:
    """Choose at most count windows, evenly."""
    count = min(count, len(ids))
    return ids[torch.linspace(0, len(ids) - 1, count).round().long()]


def _correct(
    run: "_Run", replacements: dict[str, LowRankLinear], ids: Tensor
) -> tuple[Trained, dict[str, LowRankLinear]]:
    """Train the new layers in their places, put the dense ones back and return them packed.

    The norms, trained too, stay trained; on any failure they are as before.
    """
    model = run.model
    used = windows_used(ids, run.recipe)
    targets, held_out = (collect_targets(model, part, run.statistics.store) for part in used)
    before = [(p, p.data) for p in norms(model)]
    dense = {name: set_submodule(model, name, layer) for name, layer in replacements.items()}
    try:
        try:
            done = correct(model, replacements, targets, held_out, run.recipe, Store(run.work))
        finally:
            for name, layer in dense.items():
                set_submodule(model, name, layer)
        return done, run.pack(replacements, run.recipe.layout)
    except BaseException:
        for p, value in before:
            p.data = value
        raise


def describe(calibration: Source | None) -> str:
    """Name a calibration source for the record."""
    if calibration is None:
        return "sampled"
    return str(calibration) if isinstance(calibration, str | Path) else "given in memory"


def shape_for(layer: Layer, method: Method) -> allocation.Shape:
    """Return a layer as the allocation sees it under a method."""
    least = method.least_rank(layer.out_features, layer.in_features)
    return dataclasses.replace(layer.shape, least_rank=least)


def keep_of_rest(structure: Structure, recipe: Recipe) -> float:
    """Return what the layers that are not skipped must keep, so that all together keep enough.

    Raises CalrError when the skipped ones alone exceed the budget, or are all there is.
    """
    dense = sum(layer.shape.dense for layer in structure.layers if layer.skipped)
    total = structure.linear_parameters
    if dense == total:
        raise CalrError("skip: matches every linear layer, so there is nothing to compress")
    if recipe.keep * total <= dense:
        raise CalrError(
            f"keep={recipe.keep} is unreachable: the skipped layers alone hold "
            f"{dense / total:.4f} of the linear parameters; skip less or raise keep"
        )
    return (recipe.keep * total - dense) / (total - dense)


def require_reachable(structure: Structure, recipe: Recipe) -> None:
    """Raise CalrError, before anything is calibrated, when no ranks keep so little."""
    keep_of_rest(structure, recipe)
    method = methods.resolve(recipe.method, recipe.method_options)
    shapes = [shape_for(layer, method) for layer in structure.layers if not layer.skipped]
    fixed = structure.linear_parameters - sum(shape.dense for shape in shapes)
    allocation.require_reachable(shapes, recipe.keep, recipe.layout, recipe.rank_step, fixed)
    if recipe.allocation == "uniform":
        uniform_ranks(shapes, recipe, fixed)


def uniform_ranks(shapes: list[allocation.Shape], recipe: Recipe, fixed: int) -> Ranks:
    """Give every layer the same fraction; fixed: parameters that stay dense."""
    return allocation.uniform(shapes, recipe.keep, recipe.layout, recipe.rank_step, fixed)


def global_ranks(
    shapes: list[allocation.Shape], curves: dict[str, Tensor], recipe: Recipe, fixed: int
) -> Ranks:
    """Allocate ranks globally from every layer's error curve; fixed: parameters that stay dense."""
    return allocation.globally(
        shapes,
        [curves[shape.name].numpy() for shape in shapes],
        recipe.keep,
        recipe.layout,
        recipe.rank_step,
        fixed=fixed,
        exact=recipe.solver == "exact",
    )


def curves_name(recipe: Recipe) -> str:
    """Name the error curves of a method among the statistics."""
    options = "".join(f"-{key}={value:g}" for key, value in sorted(recipe.method_options.items()))
    return f"errors-{recipe.method}{options}-{recipe.sensitivity}"


@dataclass
class _Run:
    """One compression: what its steps share."""

    model: PreTrainedModel
    structure: Structure
    recipe: Recipe
    ids: Tensor
    statistics_directory: str | Path | None
    work: Path | None
    _kept: dict[str, Decomposition] = field(default_factory=dict)
    _kept_bytes: int = 0

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.method = methods.resolve(recipe.method, recipe.method_options)
        needed = self.method.moments
        globally = recipe.allocation == "global"
        weighted = globally and recipe.sensitivity == "gradient" and "output" not in needed
        self.gradients = "gradient" in needed or weighted
        self.outputs = "output" in needed
        self.layers = [layer for layer in self.structure.layers if not layer.skipped]
        self.fixed = sum(x.shape.dense for x in self.structure.layers if x.skipped)
        self._statistics: Statistics | None = None
        self.finished = Store(self.work / "blocks" if self.work else None)

    @property
    def statistics(self) -> Statistics:
        """Calibration statistics, collected when first needed."""
        if self._statistics is None:
            directory = self.statistics_directory or (self.work and self.work / "statistics")
            recipe = self.recipe
            gradient_windows = min(recipe.gradient_samples, len(self.ids))
            key = fingerprint(self.model, self.ids, gradient_windows, recipe.seed)
            store = open_statistics(directory, key)
            self._statistics = collect(
                self.model,
                self.structure,
                self.ids,
                store,
                gradient_ids=spread(self.ids, gradient_windows) if self.gradients else None,
                outputs=self.outputs,
                seed=recipe.seed,
            )
        return self._statistics

    def decomposition(self, layer: Layer) -> Decomposition:
        """Decompose one layer, keeping the result while there is room."""
        if layer.name in self._kept:
            return self._kept[layer.name]
        weight = self.model.get_submodule(layer.name).get_parameter("weight").detach()
        moments = self.statistics.moments(layer)
        moved = type(moments)(
            moments.input.to(weight.device),
            moments.gradient,
            None if moments.output is None else moments.output.to(weight.device),
        )
        result = self.method.decompose(weight, moved)
        size = 8 * (weight.numel() + min(weight.shape) ** 2)
        if self._kept_bytes + size <= CACHE_BYTES:
            self._kept[layer.name] = result
            self._kept_bytes += size
        return result

    def allocate(self) -> Ranks:
        """Choose the rank of every layer; None leaves it dense."""
        recipe, shapes = self.recipe, [self._shape(layer) for layer in self.layers]
        if recipe.allocation == "uniform":
            return uniform_ranks(shapes, recipe, self.fixed)
        if recipe.allocation == "last_k":
            return self._last_k(keep_of_rest(self.structure, recipe))
        return global_ranks(shapes, self.curves(), recipe, self.fixed)

    def curves(self) -> dict[str, Tensor]:
        """Return each layer's error at every rank, from the store where it is known."""
        name = curves_name(self.recipe)
        if name not in self.statistics.store:
            self.statistics.store.save(name, self._error_curves())
        return self.statistics.store.load(name)

    def full_ranks(self) -> Ranks:
        """Give every layer the rank at which nothing is lost."""
        return {layer.name: min(layer.out_features, layer.in_features) for layer in self.layers}

    def completed(self, layers: dict[str, LowRankLinear]) -> dict[str, LowRankLinear]:
        """Let full-rank factors give the weight itself, also where calibration saw nothing."""
        for name, layer in layers.items():
            weight = self.model.get_submodule(name).get_parameter("weight").detach()
            up, down = complete(weight, layer.weight.detach(), layer.down.weight.detach())
            layer.weight.data, layer.down.weight.data = up, down
        return layers

    def sampled_errors(self) -> dict[str, list[float]]:
        """Return every layer's errors at the multiples of rank_step."""
        step = self.recipe.rank_step
        return {name: curve[::step].tolist() for name, curve in self.curves().items()}

    def _shape(self, layer: Layer) -> allocation.Shape:
        return shape_for(layer, self.method)

    def _error_curves(self) -> dict[str, Tensor]:
        """Return each layer's expected increase of the loss (or output error) at every rank."""
        curves, influence = {}, None
        for layer in logging.tqdm(self.structure.layers, desc="error curves", unit="layer"):
            result = self.decomposition(layer)
            curve = result.errors
            if result.unit == "output" and self.recipe.sensitivity == "gradient":
                gradient = self.statistics.moments(layer).gradient
                assert gradient is not None
                curve = curve * gradient / 2  # second order: ½ g² Δy²
            if result.unit == "output" and self.recipe.sensitivity == "influence":
                if influence is None:
                    probes = self.ids[:MEASURE_WINDOWS]
                    influence = block_influence(self.model, self.structure, probes)
                energy = curve[0].clamp(min=torch.finfo(curve.dtype).tiny)
                curve = curve / energy * influence[layer.block]
            curves[layer.name] = curve
        return curves

    def _last_k(self, keep: float) -> Ranks:
        blocks = [
            [self._shape(layer) for layer in self.structure.in_block(block) if not layer.skipped]
            for block in range(self.structure.blocks)
        ]
        runner = BlockRunner(self.model, self.structure, self.ids[:MEASURE_WINDOWS])
        inputs = [runner.hidden]
        for block in range(self.structure.blocks):
            inputs.append(runner.run(block, inputs[-1]))
        progress = logging.tqdm(desc="last k", unit="choice")

        def measure(ranks: Ranks) -> float:
            progress.update()
            return self._final_error(runner, inputs, ranks)

        try:
            return allocation.last_k(
                blocks, keep, self.recipe.layout, self.recipe.rank_step, measure
            )
        finally:
            progress.close()

    def _final_error(self, runner: BlockRunner, inputs: list[list[Tensor]], ranks: Ranks) -> float:
        """Return the relative squared error of the final hidden state under trial ranks."""
        trial = [layer for layer in self.layers if ranks[layer.name] is not None]
        first = min((layer.block for layer in trial), default=self.structure.blocks)
        originals: dict[str, nn.Module] = {}
        try:
            for layer in trial:
                rank = ranks[layer.name]
                assert rank is not None
                up, down = self.decomposition(layer).factors(rank)
                dtype = self.model.get_submodule(layer.name).get_parameter("weight").dtype
                low = self._two_factor(layer, up, down).to(dtype)
                originals[layer.name] = set_submodule(self.model, layer.name, low)
            hidden = inputs[first]
            for block in range(first, self.structure.blocks):
                hidden = runner.run(block, hidden)
        finally:
            for name, module in originals.items():
                set_submodule(self.model, name, module)
        pairs = list(zip(hidden, inputs[-1], strict=True))
        wrong = sum(float((h.double() - y.double()).square().sum()) for h, y in pairs)
        return wrong / sum(float(y.double().square().sum()) for _, y in pairs)

    def factorise(self, ranks: Ranks) -> dict[str, LowRankLinear]:
        """Build two-factor float32 layers, block by block; finished blocks are kept in the store.

        Training wants two balanced factors; `pack` rewrites them in the recipe's layout.
        """
        factored = [layer for layer in self.layers if ranks[layer.name] is not None]

        def make(layer: Layer, shift: Tensor | None, moment: Tensor | None) -> LowRankLinear:
            rank = ranks[layer.name]
            assert rank is not None
            if moment is None:
                result = self.decomposition(layer)
            else:
                result = self._shifted(layer, shift, moment)
            self._kept.pop(layer.name, None)
            return self._two_factor(layer, *layouts.balance(*result.factors(rank)))

        fit = None
        if self.recipe.shifted_inputs or self.recipe.block_epochs:
            fit = BlockFit(self.model, self.structure, self.recipe, self.ids, make)
        built: dict[str, LowRankLinear] = {}
        blocks = range(self.structure.blocks)
        for block in logging.tqdm(blocks, desc="factors", unit="block"):
            layers = [layer for layer in factored if layer.block == block]
            known = self._finished(block, layers)
            if fit is not None:
                made = fit.fit(block, layers, known)
            else:
                made = known or {layer.name: make(layer, None, None) for layer in layers}
            if not known and made:
                tensors = {f"{n}.up": m.weight for n, m in made.items()}
                tensors |= {f"{n}.down": m.down.weight for n, m in made.items()}
                self.finished.save(f"block-{block:04d}", tensors)
            built |= {layer.name: made[layer.name] for layer in layers}  # however they were found
        return built

    def _finished(self, block: int, layers: list[Layer]) -> dict[str, LowRankLinear]:
        """Return the layers of a block that an earlier run finished."""
        name = f"block-{block:04d}"
        if name not in self.finished:
            return {}
        tensors = self.finished.load(name)
        return {
            layer.name: self._two_factor(
                layer, tensors[f"{layer.name}.up"], tensors[f"{layer.name}.down"]
            )
            for layer in layers
        }

    def _shifted(self, layer: Layer, shift: Tensor | None, moment: Tensor) -> Decomposition:
        """Decompose `weight @ shift` in the norm of the inputs that it really gets."""
        weight = self.model.get_submodule(layer.name).get_parameter("weight").detach().double()
        moments = self.statistics.moments(layer)
        output = moments.output
        if shift is not None:
            weight = weight @ shift
            if output is not None and layer.out_features > layer.in_features:  # of Wᵀg
                output = (shift.mT @ output.to(shift) @ shift).to(output)
        if output is not None:
            output = output.to(weight.device)
        return self.method.decompose(weight, Moments(moment, moments.gradient, output))

    def pack(self, layers: dict[str, LowRankLinear], layout: Layout) -> dict[str, LowRankLinear]:
        """Rewrite two-factor layers in a layout and the model's dtype: the same products."""
        packed = {}
        for name, layer in logging.tqdm(layers.items(), desc="packing", unit="layer"):
            dtype = self.model.get_submodule(name).get_parameter("weight").dtype
            up, down = layer.weight.detach(), layer.down.weight.detach()
            packed[name] = layouts.low_rank(up, down, layer.bias, layout, dtype)
        return packed

    def _two_factor(self, layer: Layer, up: Tensor, down: Tensor) -> LowRankLinear:
        """Make a float32 layer with the dense layer's bias, on its device."""
        dense = self.model.get_submodule(layer.name)
        assert isinstance(dense, nn.Linear)
        device = dense.weight.device
        return layouts.low_rank(
            up.to(device), down.to(device), dense.bias, "two_factor", torch.float32
        )


def parameter_report(structure: Structure, ranks: Ranks, layout: Any) -> dict[str, float]:
    """Count what is kept: exact numbers for a choice of ranks."""
    stored = {
        layer.name: allocation.cost(layer.shape, layout, ranks.get(layer.name))
        for layer in structure.layers
    }
    dense, kept = structure.linear_parameters, sum(stored.values())
    return {
        "linear_parameters": dense,
        "kept_parameters": kept,
        "keep": kept / dense,
        "dense_model_parameters": structure.model_parameters,
        "model_parameters": structure.model_parameters - (dense - kept),
        "removed_of_model": (dense - kept) / structure.model_parameters,
    }
