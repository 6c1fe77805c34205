"""What calibration tells of every layer: collected when it is first needed, kept in a store."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from calr.methods import Moments
from calr.model import Layer, Structure, digest
from calr.statistics.folded import unfold
from calr.statistics.gradients import VOCABULARY, gradient_moments, gradients_name
from calr.statistics.inputs import input_moments
from calr.statistics.routed import rarely_chosen
from calr.storage import Store, claim

FORMAT = 2  # of what is in a store


class Statistics:
    """Moments of every layer over calibration windows ids [S, T].

    gradient_ids [S', T]: windows of the backward pass; None without one. outputs: also the second
    moments of the gradients, not only their mean square. Holds the activations of one block
    boundary, S T H numbers, and one block's input moments, half of K² numbers each where they are
    kept; with gradients also of min(N, K)² float32 numbers of every layer.
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


def open_statistics(directory: str | Path | None, key: str) -> Store:
    """Open a directory of calibration statistics, refusing one that holds those of another run."""
    if directory is None:
        return Store()
    return claim(
        Path(directory),
        digest(key, FORMAT),
        "holds statistics of another model, of other calibration windows or of another version; "
        "model, calibration, samples, gradient_samples, window, correction_tokens and seed must be "
        "the same; name another directory or delete it",
    )
