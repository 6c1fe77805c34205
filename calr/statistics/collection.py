"""What calibration tells of every layer: collected when it is first needed, kept in a store."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calr.errors import CalrError
from calr.methods import Moments
from calr.model import Layer, Structure, digest
from calr.recipe import Recipe
from calr.statistics.folded import unfold
from calr.statistics.gradients import VOCABULARY, gradient_moments, gradients_name
from calr.statistics.inputs import input_moments
from calr.statistics.routed import rarely_chosen
from calr.storage import Store, claim, read_ledger
from calr.text import Source, parts_of

FORMAT = 2  # of what is in a store


class Statistics:
    """Moments of every layer over calibration windows ids [S, T].

    gradient_ids [S', T]: windows of the backward pass; None without one. outputs: also the second
    moments of the gradients, not only their mean square. Holds the activations of one block
    boundary, S T H numbers, and one block's input moments, half of K² numbers each where they are
    kept; with gradients also min(N, K)² float32 numbers of every layer of a block.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        structure: Structure,
        ids: Tensor,
        store: Store,
        *,
        gradient_ids: Tensor | None = None,
        outputs: bool = False,
        seed: int = 0,
    ) -> None:
        self.model, self.structure, self.ids, self.store = model, structure, ids, store
        self._gradient_ids, self._outputs, self._seed = gradient_ids, outputs, seed
        self._collected = False
        self._block: tuple[int, dict[str, Tensor]] = (-1, {})

    def collect(self) -> "Statistics":
        """Collect what the store lacks.

        Raises CalrError naming the layer where a weight, activation or gradient is not finite.
        """
        input_moments(self.model, self.structure, self.ids, self.store)
        if self._gradient_ids is not None:
            gradient_moments(
                self.model,
                self.structure,
                self._gradient_ids,
                self.store,
                outputs=self._outputs,
                seed=self._seed,
            )
        self._collected = True
        return self

    @property
    def rarely_chosen(self) -> list[str]:
        """Names of experts' layers that few tokens reached: mostly their block's average counts.

        As far as statistics are collected.
        """
        return rarely_chosen(self.store, self.structure)

    def moments(self, layer: Layer) -> Moments:
        """Return the statistics of a layer."""
        tensors, gradients = self._of_block(layer.block), self._gradient_ids is not None
        return Moments(
            input=unfold(tensors[layer.group]),
            gradient=self.gradient(layer) if gradients else None,
            output=unfold(tensors[f"{layer.name}.output"]) if self._outputs else None,
            rows=tensors[f"{layer.name}.gradient"] if gradients else None,
        )

    def gradient(self, layer: Layer) -> float:
        """Return the mean square of a layer's output gradients alone."""
        return float(self._of_block(layer.block)[f"{layer.name}.gradient"].mean())

    def _of_block(self, block: int) -> dict[str, Tensor]:
        if not self._collected:
            self.collect()
        if self._block[0] != block:
            tensors = self.store.load(f"inputs-{block:04d}")
            if self._gradient_ids is not None:
                name = gradients_name(self.store, block, self._outputs)
                tensors = tensors | self.store.load(name)
            self._block = block, tensors
        return self._block[1]

    def let_go(self) -> None:
        """Hold nothing in memory until it is asked for again."""
        self._block = (-1, {})

    def vocabulary(self) -> dict[str, Tensor]:
        """Return what the backward pass found of embeddings and lm_head, and "tokens" [V]: how
        often each occurs in the windows."""
        if not self._collected:
            self.collect()
        found = self.store.load(VOCABULARY)
        embeddings: Any = self.model.get_input_embeddings()
        counts = self.ids.flatten().bincount(minlength=embeddings.num_embeddings).double()
        return found | {"tokens": counts}


def described(
    source: str | None,
    recipe: Recipe,
    dtype: torch.dtype,
    calibration: Source | None,
    windows: int,
    tied: bool,
) -> dict[str, Any]:
    """Say what statistics are of, as far as it can be told without weights; None: it cannot.

    source: of the model, None for one in memory; dtype: in which it computes; windows: of text that
    the run draws in all; tied: lm_head is the embedding.
    """
    return {
        "model": None if source is None else _placed(source),
        "dtype": str(dtype).removeprefix("torch."),
        "calibration": _named(calibration),
        "windows of text": windows,
        "samples": recipe.samples,
        "gradient_samples": min(recipe.gradient_samples, recipe.samples),
        "window": recipe.window,
        "seed": recipe.seed,
        "rotate": recipe.rotate if recipe.quantised and not tied else None,
    }


def _named(calibration: Source | None) -> str | None:
    """Name text, a file by its place; None for what is in memory."""
    if not (calibration is None or isinstance(calibration, str | Path)):
        return None
    return ", ".join(_placed(str(part)) for part in parts_of(calibration))


def _placed(name: str) -> str:
    """Return where a file or directory is, or the name of what is neither."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def open_statistics(
    directory: str | Path | None, key: str, summary: dict[str, Any] | None = None
) -> Store:
    """Open a directory of calibration statistics, refusing one that holds those of another run.

    summary: what `described` says of them.
    """
    if directory is None:
        return Store()
    refusal = (
        "holds statistics of another model, of other calibration windows or of another version; "
        "model, dtype, calibration, samples, gradient_samples, window, correction_tokens, seed and "
        "rotation must be the same (bits and size rotate a model that can be, without rotate=False,"
        " keep does not); name another directory or delete it"
    )
    return claim(Path(directory), digest(key, FORMAT), refusal, summary)


def known_statistics(directory: str | Path, summary: dict[str, Any]) -> Store:
    """Open a directory of statistics as far as they were collected, writing nothing.

    Raises CalrError where there are none, and where they are not of what the summary says.
    """
    place = Path(directory)
    ledger = read_ledger(place) if place.is_dir() else None
    if ledger is None:
        raise CalrError(f"{directory}: holds no statistics; compress with it first")
    for name, wanted in summary.items():
        there = ledger["summary"].get(name)
        if None not in (there, wanted) and there != wanted:
            raise CalrError(
                f"{directory}: its statistics are of {name}={there}, not {wanted}; name what they "
                "are of, or another directory"
            )
    return Store(place)
