"""One compression: what is checked before it begins, and its steps from text to layers."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from calr import parallel
from calr.elastic import LOW_RANK, complete, every_rank
from calr.estimates import Ways, Work
from calr.factoring import factorise
from calr.integrations.config import CalrConfig
from calr.integrations.experts import take_apart
from calr.integrations.transformers import attach
from calr.limits import ways_within
from calr.methods import resolve
from calr.model import (
    Structure,
    absent,
    analyse,
    check_finite,
    check_vocabulary,
    check_window,
    digest,
    evaluating,
    fast_attention,
    fingerprint,
    pack,
    recast,
    require_supported,
    rotate,
    set_submodule,
    tensor_bytes,
)
from calr.progress import Phase, begin_phase
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
from calr.statistics import Statistics, described, open_statistics
from calr.storage import Store, nearest_rung
from calr.text import Source, calibration_windows, content_of, describe, parts_of, spread
from calr.training import check_trainable, corrected, windows_drawn, windows_used

logger = logging.get_logger(__name__)


@dataclass
class Job:
    """A compression that can begin: all has been checked that needs no calibration."""

    model: PreTrainedModel
    recipe: Recipe
    calibration: Source | None
    tokenizer: PreTrainedTokenizerBase | None
    elastic: bool
    structure: Structure
    budget: Budget | ByteBudget
    work: Work
    ways: Ways
    stored: torch.dtype | None  # of the result, where it is another than the dense model's
    source: str | None = None  # of the model; None: it came in memory
    rotated: bool = False
    rare: int = 0  # experts' layers that few calibration tokens reached

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        recipe: Recipe,
        calibration: Source | None,
        tokenizer: PreTrainedTokenizerBase | None,
        elastic: bool,
        stored: torch.dtype | None = None,
        max_memory: str | None = None,
        device_memory: str | None = None,
        source: str | None = None,
    ) -> "Job":
        """Check a recipe against a model; CalrError says what does not fit."""
        recipe = every_rank(recipe) if elastic else recipe
        take_apart(model)
        structure = analyse(model, recipe.skip)
        budget = byte_budget(model, structure, recipe, stored) or Budget.of(structure, recipe)
        if isinstance(budget, Budget) and recipe.allocation == "uniform":
            uniform(budget)
        recipe = recipe.with_learning_rate(budget.bits if isinstance(budget, ByteBudget) else None)
        check_trainable(recipe, model.dtype)
        sampled = not isinstance(calibration, Tensor) and "sampled" in parts_of(calibration)
        held = 0 if absent(model) else tensor_bytes(model)
        work = Work.of(model, structure, recipe, model.dtype, sampled, held, model.device)
        ways = ways_within(work, max_memory, device_memory)
        check_finite(model)
        require_supported(model, structure)
        return cls(
            model,
            recipe,
            calibration,
            tokenizer,
            elastic,
            structure,
            budget,
            work,
            ways,
            stored,
            source,
        )

    @property
    def expected(self) -> dict[str, Phase]:
        """What every phase is estimated to take."""
        return self.work.phases(self.ways)

    @cached_property
    def identity(self) -> str:
        """What the weights are: the only time that they are hashed."""
        return parallel.agree(fingerprint(self.model) if parallel.first() else "")

    @property
    def key(self) -> str:
        """What the finished parts depend on."""
        given = self.calibration
        content = given if isinstance(given, Tensor) else content_of(given)
        return digest(self.identity, self.recipe, self.elastic, content, str(self.stored))

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
        with evaluating(model), fast_attention():
            ids = self._windows(parts)
            self.rotated = self._rotated(parts)
            collected = self._statistics(spread(ids, recipe.samples), parts, statistics)
            if isinstance(self.budget, ByteBudget):
                again = self.ways.checkpointed
                stored, found = quantised(model, self.budget, recipe, ids, collected, parts, again)
                self._say_what_is_rare(collected)
                found["rotated"] = self.rotated
                attach(model, CalrConfig(layers=stored, recipe=self._described(ids) | found))
                return model
            decompositions = Decompositions(model, self.structure, recipe, collected)
            ranks = self._ranks(self.budget, decompositions)
            layers = factorise(decompositions, ranks, parts.within("blocks"))
            if self.elastic:
                layers = pack(model, complete(model, layers), "two_factor")
            elif recipe.correction_tokens and layers:
                again, store = self.ways.checkpointed, collected.store
                done, layers = corrected(model, layers, ids, recipe, store, parts, again)
                found["correction"] = dataclasses.asdict(done)
            else:
                layers = pack(model, layers, recipe.layout)
            errors = decompositions.sampled(recipe.rank_step) if self.elastic else None
            self._say_what_is_rare(collected)
        for name, layer in layers.items():
            set_submodule(model, name, layer.train(model.training))
        stored = {n: {"layout": layer.layout, "rank": layer.rank} for n, layer in layers.items()}
        attach(model, CalrConfig(layers=stored, recipe=self._described(ids) | found, errors=errors))
        return model

    def _say_what_is_rare(self, statistics: Statistics) -> None:
        rare = statistics.rarely_chosen
        self.rare = len(rare)
        if rare:
            logger.warning(
                f"{rare[0]}: few calibration tokens were routed to it, the first of {len(rare)} "
                "layers of experts for which their block's average stands in (raise samples)"
            )

    def _rotated(self, parts: Store) -> bool:
        """Rotate a model that is going to be quantised, if it can be; its function stays."""
        _ = self.identity  # of the weights as they came
        if not (self.recipe.quantised and self.recipe.rotate):
            return False
        begin_phase("rotation")
        keep = parts.within("rotated").keep
        with parallel.first_then_others():
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
        if any(layer.routed for layer in self.structure.layers):
            found["rarely_chosen_layers"] = self.rare
        if isinstance(self.budget, ByteBudget):
            rows = report.quantised_rows(self.budget.matrices, config.layers, self.budget.element)
            widths = Counter(row["bits"] or 8 * self.budget.element for row in rows)
            found |= {f"matrices_of_{bits}_bits": count for bits, count in sorted(widths.items())}
            found["rotated"] = "yes" if self.rotated else "no"
            if rung := nearest_rung(self.model.config, found["tensor_bytes"]):
                found["nearest_type_of_llama_cpp"] = rung
        else:
            found |= report.outcome(self.structure, config.layers)
        training = config.recipe.get("correction", {})
        return found | {f"correction_{name}": round(x, 4) for name, x in training.items()}

    def _windows(self, parts: Store) -> Tensor:
        """Draw all windows of text [S, T] that the run needs, once."""
        recipe, given = self.recipe, self.calibration
        if not isinstance(given, Tensor):
            check_window(self.model, "window", recipe.window)
        if not parallel.agree("calibration" in parts):
            windows = calibration_windows(
                given,
                self.tokenizer,
                self.model,
                samples=windows_drawn(recipe),
                window=recipe.window,
                seed=recipe.seed,
                cache_bytes=self.ways.cache_bytes,
                natively=self.ways.natively,
            )
            if recipe.correction_tokens:  # says what is too little before anything is kept
                windows_used(windows, recipe)
            with parallel.first_then_others():
                if "calibration" not in parts:
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
        summary = described(
            self.source,
            recipe,
            self.model.dtype,
            self.calibration,
            windows_drawn(recipe),
            self.work.tied,
        )
        return Statistics(
            self.model,
            self.structure,
            ids,
            open_statistics(directory, key, summary),
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
