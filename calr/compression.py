"""Compress a model: calibrate, choose ranks, factorise, correct, replace the layers."""

import dataclasses
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calr.elastic import LOW_RANK, complete, every_rank
from calr.errors import CalrError
from calr.evaluation import measured
from calr.factoring import factorise
from calr.integrations.config import CalrConfig
from calr.integrations.transformers import attach
from calr.methods import resolve
from calr.model import (
    GGUF_DTYPE,
    Structure,
    analyse,
    check_finite,
    check_vocabulary,
    check_window,
    digest,
    evaluating,
    fingerprint,
    gguf_file,
    load,
    on_grid,
    pack,
    recast,
    require_same,
    require_supported,
    rotate,
    saver,
    set_submodule,
    tensor_bytes,
)
from calr.quantising import quantised
from calr.ranks import (
    Budget,
    ByteBudget,
    Decompositions,
    FinalState,
    Ranks,
    by_block,
    byte_budget,
    last_k,
    least_error,
    report,
    uniform,
)
from calr.recipe import Recipe
from calr.statistics import Statistics, open_statistics
from calr.storage import (
    Store,
    claim,
    destination,
    finished,
    locked,
    model_card,
    prepare,
    recipe_yaml,
    size,
    write,
    writing,
)
from calr.text import Source, calibration_windows, content_of, describe, spread
from calr.training import corrected, windows_needed, windows_used


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
    everything has been computed, but for a rotation that leaves its function as it is; CalrError
    says what is wrong otherwise.

    >>> import torch
    >>> from calr.testing import tiny_llama
    >>> model = compress(tiny_llama(), Recipe(keep=0.5), calibration=torch.ones(2, 8).long())
    >>> type(model.model.layers[0].mlp.up_proj).__name__
    'LowRankLinear'
    """
    recipe = recipe or _default(elastic)
    run = _Compression.of(model, recipe, calibration, tokenizer, elastic)
    if work is None:
        return run.run(Store(), statistics)
    if Path(work).is_file():
        raise CalrError(f"{work}: is a file; name a directory")
    with locked(Path(work) / "lock", str(work)):
        refusal = "holds parts of another run; name another directory or delete it"
        return run.run(claim(Path(work), run.key, refusal), statistics)


def compress_to(
    source: str,
    directory: str | Path,
    recipe: Recipe | None = None,
    *,
    calibration: str = "sampled",
    statistics: str | Path | None = None,
    elastic: bool = False,
    overwrite: bool = False,
    eval_windows: int = 8,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compress a model into a directory, whole or not at all, and return what it became.

    source, dtype, device and trust_remote_code: as in `load`. Finished parts lie in
    DIRECTORY/.calr: the same call continues where a killed one stopped and ends with the same bits.
    What a GGUF file holds is computed with in float32 and stored in bfloat16, where no dtype is
    named; weights that are quantised there are not rotated, off the grid on which they lie.
    eval_windows: windows of held-out built-in text on which the result is compared with the
    dense model, which is loaded again for that; 0: none. Raises CalrError for a directory that
    holds something else (without overwrite), and for what `load` and `compress` refuse.
    """
    started, recipe = time.monotonic(), recipe or _default(elastic)
    place = destination(directory, source, statistics=statistics, overwrite=overwrite)
    file = gguf_file(source) if dtype == "auto" else None
    loading: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    loading |= {"dtype": dtype if file is None else "float32", "lazily": not elastic}
    model, tokenizer = load(source, **loading)
    stored = None if file is None else GGUF_DTYPE
    if recipe.quantised and on_grid(source):
        recipe = dataclasses.replace(recipe, rotate=False)
    run = _Compression.of(model, recipe, calibration, tokenizer, elastic, stored)
    if eval_windows:
        check_window(model, "window", recipe.window)
    summary = {"model": source, "budget": recipe.budget, "method": recipe.method}
    with writing(place):
        done = None if overwrite else finished(place, run.key)
        if done is not None:
            return done | {"bytes": size(place), "directory": str(place)}
        before = tensor_bytes(model) if file is None else file.stat().st_size
        parts = prepare(place, run.key, summary, overwrite=overwrite)
        run.run(parts, statistics)
        results = run.outcome(before)
        if eval_windows:
            dense, _ = load(source, **loading)
            results |= measured(model, dense, tokenizer, eval_windows, recipe.window)
            del dense
        if elastic:
            results["cut_it_with"] = "calr resize DIRECTORY OUTPUT --keep 0.7"
        results["seconds"] = round(time.monotonic() - started, 1)
        options = {"calibration": calibration, "elastic": elastic, "eval_windows": eval_windows}
        options |= {"dtype": dtype, "trust_remote_code": trust_remote_code}
        command = "calr compress {model} OUTPUT --config recipe.yaml"
        card = model_card(source, run.what, command, recipe_yaml(recipe, options), results)
        check = partial(require_same, model, trust_remote_code=trust_remote_code)
        write(saver(model, tokenizer), place, card, key=run.key, results=results, check=check)
    return results | {"bytes": size(place), "directory": str(place)}


def _default(elastic: bool) -> Recipe:
    return Recipe(keep=1.0) if elastic else Recipe()


@dataclass
class _Compression:
    """A compression that can begin: all has been checked that needs no calibration."""

    model: PreTrainedModel
    recipe: Recipe
    calibration: Source | None
    tokenizer: PreTrainedTokenizerBase | None
    elastic: bool
    structure: Structure
    budget: Budget | ByteBudget
    stored: torch.dtype | None  # of the result, where it is another than the dense model's
    rotated: bool = False

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        recipe: Recipe,
        calibration: Source | None,
        tokenizer: PreTrainedTokenizerBase | None,
        elastic: bool,
        stored: torch.dtype | None = None,
    ) -> "_Compression":
        """Check a recipe against a model; CalrError says what does not fit."""
        recipe = every_rank(recipe) if elastic else recipe
        structure = analyse(model, recipe.skip)
        budget = byte_budget(model, structure, recipe, stored) or Budget.of(structure, recipe)
        if isinstance(budget, Budget) and recipe.allocation == "uniform":
            uniform(budget)
        check_finite(model)
        require_supported(model, structure)
        return cls(model, recipe, calibration, tokenizer, elastic, structure, budget, stored)

    @cached_property
    def identity(self) -> str:
        """What the weights are: the only time that they are hashed."""
        return fingerprint(self.model)

    @property
    def key(self) -> str:
        """What the finished parts depend on."""
        given = self.calibration
        content = given if isinstance(given, Tensor) else content_of(given)
        return digest(self.identity, self.recipe, self.elastic, content)

    @property
    def what(self) -> str:
        """What the compressed model is, in words."""
        if isinstance(self.budget, ByteBudget):
            return "its matrices are quantised"
        return LOW_RANK

    def run(self, parts: Store, statistics: str | Path | None) -> PreTrainedModel:
        """Compress the model. parts: where what is finished is kept, and found again."""
        model = self._compressed(parts, statistics)
        if self.stored is not None:
            recast(model, self.stored)
        return model

    def _compressed(self, parts: Store, statistics: str | Path | None) -> PreTrainedModel:
        model, recipe = self.model, self.recipe
        found: dict[str, Any] = {}
        with evaluating(model):
            ids = self._windows(parts)
            self.rotated = self._rotated(parts)
            collected = self._statistics(spread(ids, recipe.samples), parts, statistics)
            if isinstance(self.budget, ByteBudget):
                stored, found = quantised(model, self.budget, recipe, ids, collected, parts)
                found["rotated"] = self.rotated
                attach(model, CalrConfig(layers=stored, recipe=self._described(ids) | found))
                return model
            decompositions = Decompositions(model, self.structure, recipe, collected)
            ranks = self._ranks(self.budget, decompositions)
            layers = factorise(decompositions, ranks, parts.within("blocks"))
            if self.elastic:
                layers = pack(model, complete(model, layers), "two_factor")
            elif recipe.correction_tokens and layers:
                done, layers = corrected(model, layers, ids, recipe, collected.store, parts)
                found["correction"] = dataclasses.asdict(done)
            else:
                layers = pack(model, layers, recipe.layout)
            errors = decompositions.sampled(recipe.rank_step) if self.elastic else None
        for name, layer in layers.items():
            set_submodule(model, name, layer.train(model.training))
        stored = {n: {"layout": layer.layout, "rank": layer.rank} for n, layer in layers.items()}
        attach(model, CalrConfig(layers=stored, recipe=self._described(ids) | found, errors=errors))
        return model

    def _rotated(self, parts: Store) -> bool:
        """Rotate a model that is going to be quantised, if it can be; its function stays."""
        _ = self.identity  # of the weights as they came
        if not (self.recipe.quantised and self.recipe.rotate):
            return False
        keep = parts.within("rotated").keep
        return rotate(self.model, self.structure, self.recipe.seed, keep)

    def _described(self, ids: Tensor) -> dict[str, Any]:
        """State the recipe as it goes into the checkpoint."""
        described = self.recipe.to_dict() | {"calibration": describe(self.calibration)}
        return described | {"tokens": min(len(ids), self.recipe.samples) * ids.shape[1]}

    def outcome(self, before: int) -> dict[str, Any]:
        """Count what the compressed model is made of, bytes first; before: of the source."""
        config: CalrConfig = cast(Any, self.model.config).quantization_config
        found: dict[str, Any] = {"source_bytes": before}
        found |= report.byte_totals(self.structure, tensor_bytes(self.model))
        if isinstance(self.budget, ByteBudget):
            rows = report.quantised_rows(self.budget.matrices, config.layers, self.budget.element)
            widths = Counter(row["bits"] or 8 * self.budget.element for row in rows)
            found |= {f"matrices_of_{bits}_bits": count for bits, count in sorted(widths.items())}
            found["rotated"] = "yes" if self.rotated else "no"
        else:
            found |= report.outcome(self.structure, config.layers)
        training = config.recipe.get("correction", {})
        return found | {f"correction_{name}": round(x, 4) for name, x in training.items()}

    def _windows(self, parts: Store) -> Tensor:
        """Draw all windows of text [S, T] that the run needs, once."""
        recipe, given = self.recipe, self.calibration
        if not isinstance(given, Tensor):
            check_window(self.model, "window", recipe.window)
        if "calibration" not in parts:
            windows = calibration_windows(
                given,
                self.tokenizer,
                self.model,
                samples=max(recipe.samples, windows_needed(recipe)),
                window=recipe.window,
                seed=recipe.seed,
            )
            if recipe.correction_tokens:  # says what is too little before anything is kept
                windows_used(windows, recipe)
            parts.save("calibration", {"ids": windows})
        ids = parts.load("calibration")["ids"]
        check_window(self.model, "window", ids.shape[1])
        check_vocabulary(self.model, "calibration ids", ids)
        return ids

    def _statistics(self, ids: Tensor, parts: Store, directory: str | Path | None) -> Statistics:
        """Open the statistics over windows ids [S, T]; they are collected when they are needed."""
        recipe, method = self.recipe, resolve(self.recipe.method, self.recipe.method_options)
        windows = min(recipe.gradient_samples, len(ids))
        gradients = recipe.quantised or method.needs_gradients(recipe)
        directory = directory or parts.path("statistics")
        parts_of_key = [self.identity, ids, windows, recipe.seed]
        parts_of_key += ["rotated"] if self.rotated else []
        key = "" if directory is None else digest(*parts_of_key)
        return Statistics(
            self.model,
            self.structure,
            ids,
            open_statistics(directory, key),
            gradient_ids=spread(ids, windows) if gradients else None,
            outputs=method.needs_outputs and not recipe.quantised,
            seed=recipe.seed,
        )

    def _ranks(self, budget: Budget, decompositions: Decompositions) -> Ranks:
        """Choose the rank of every layer; None leaves it dense."""
        if self.elastic:
            return {s.name: min(s.out_features, s.in_features) for s in budget.shapes}
        if self.recipe.allocation == "uniform":
            return uniform(budget)
        if self.recipe.allocation == "last_k":
            blocks = by_block(budget, self.structure)
            return last_k(budget, blocks, FinalState(decompositions).error)
        curves = {name: curve.numpy() for name, curve in decompositions.curves().items()}
        return least_error(budget, curves, exact=self.recipe.solver == "exact")
