"""The decompositions of a model's layers by one method, and their error curves."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calr import parallel
from calr.methods import Decomposition, Moments, resolve
from calr.model import Layer, Structure, weight_of
from calr.progress import progress
from calr.recipe import Recipe
from calr.statistics import Statistics, block_influence

CACHE_BYTES = 4 << 30  # decompositions kept between allocation and factorisation
PROBES = 4  # calibration windows on which hidden states are compared


class Decompositions:
    """Decompose layers by a recipe's method, keeping results while there is room."""

    def __init__(
        self, model: PreTrainedModel, structure: Structure, recipe: Recipe, statistics: Statistics
    ) -> None:
        self.model, self.structure, self.recipe = model, structure, recipe
        self.statistics = statistics
        self.method = resolve(recipe.method, recipe.method_options)
        self._kept: dict[str, Decomposition] = {}
        self._kept_bytes = 0

    def of(self, layer: Layer) -> Decomposition:
        """Decompose one layer, or find what it gave before."""
        if layer.name in self._kept:
            return self._kept[layer.name]
        weight = weight_of(self.model, layer.name)
        moments = self.statistics.moments(layer).with_prior()
        result = self.method.decompose(weight, moments.to(weight.device))
        size = 8 * (weight.numel() + min(weight.shape) ** 2)
        if self._kept_bytes + size <= CACHE_BYTES:
            self._kept[layer.name] = result
            self._kept_bytes += size
        return result

    def last_of(self, layer: Layer) -> Decomposition:
        """As `of`, for the last time: the result is not kept any longer."""
        result = self.of(layer)
        self._kept.pop(layer.name, None)
        return result

    def shifted(self, layer: Layer, shift: Tensor | None, moment: Tensor) -> Decomposition:
        """Decompose `weight @ shift` [K, K] in the norm of the inputs that it really gets.

        moment [K, K]: their second moment.
        """
        self._kept.pop(layer.name, None)
        weight = weight_of(self.model, layer.name).double()
        moments = self.statistics.moments(layer).to(weight.device)
        output = moments.output
        if shift is not None:
            weight = weight @ shift
            if output is not None and layer.out_features > layer.in_features:  # of Wᵀg
                output = (shift.mT @ output.to(shift) @ shift).to(output)
        return self.method.decompose(weight, Moments(moment, moments.gradient, output))

    def curves(self) -> dict[str, Tensor]:
        """Return each layer's error at every rank, from the statistics' store where it is known."""
        name, store = curves_name(self.recipe), self.statistics.store
        if not parallel.agree(name in store):
            curves = parallel.gather(self._curves())
            with parallel.first_then_others():
                if name not in store:
                    store.save(name, curves)
        return store.load(name)

    def sampled(self, step: int) -> dict[str, list[float]]:
        """Return each layer's errors at the multiples of a step."""
        return {name: curve[::step].tolist() for name, curve in self.curves().items()}

    def _curves(self) -> dict[str, Tensor]:
        """Return each layer's expected increase of the loss (or output error) at every rank."""
        curves, influence = {}, None
        if parallel.size() > 1:  # together: one of them may have no layer
            self.statistics.collect()
        layers = self.structure.layers
        costs = [x.parameters * min(x.in_features, x.out_features) for x in layers]
        own = parallel.share(layers, costs)
        for layer in progress(own, desc="error curves", unit="layer", phase="factors"):
            result = self.of(layer)
            curve = result.errors
            if result.unit == "output" and self.recipe.sensitivity == "gradient":
                curve = curve * self.statistics.gradient(layer) / 2  # second order: ½ g² Δy²
            if result.unit == "output" and self.recipe.sensitivity == "influence":
                if influence is None:
                    probes = self.statistics.ids[:PROBES]
                    influence = block_influence(self.model, self.structure, probes)
                energy = curve[0].clamp(min=torch.finfo(curve.dtype).tiny)
                curve = curve / energy * influence[layer.block]
            if result.unit == "output" and self.recipe.sensitivity != "gradient":
                curve = curve * layer.share  # of the tokens, that reach it
            curves[layer.name] = curve
        return curves


def curves_name(recipe: Recipe) -> str:
    """Name the error curves of a method among the statistics."""
    options = "".join(f"-{key}={value:g}" for key, value in sorted(recipe.method_options.items()))
    return f"errors-{recipe.method}{options}-{recipe.sensitivity}"
