"""The block `quantization_config` of a compressed checkpoint: the format, and what is malformed."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from calr.errors import CalrError
from calr.recipe import Recipe
from calr_kernels.forms import Form
from calr_kernels.layout import LAYOUTS

QUANT_METHOD = "calr"
FORMAT_VERSIONS = (1, 2)  # 2 has quantised modules


class CalrConfig(QuantizationConfigMixin):
    """The block `quantization_config` of a compressed checkpoint.

    layers: {module name: {"layout": "two_factor" | "pivoted", "rank": int}} or, quantised,
    {"bits", "levels", "scale_group"}; a module that is not listed is dense. recipe: how the
    checkpoint was made. errors, of an elastic checkpoint alone: {layer name: error at ranks 0,
    rank_step, 2 rank_step, …}. Raises CalrError, naming the layer or the field, for anything
    malformed and for a format version that this release does not know.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        format_version: int | None = None,
        recipe: dict[str, Any] | None = None,
        errors: dict[str, list[float]] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if format_version not in (None, *FORMAT_VERSIONS):
            raise CalrError(
                f"config.json: format_version {format_version!r} of the checkpoint is not one of "
                f"{FORMAT_VERSIONS}, which this release of calr reads; upgrade calr"
            )
        if unknown:
            raise CalrError(f"config.json: unknown field {next(iter(unknown))!r} in its calr block")
        if not isinstance(layers, dict):
            raise CalrError("config.json: quantization_config.layers must map names to layers")
        for name, layer in layers.items():
            _check_layer(name, layer)
        self.quant_method: Any = quant_method
        quantised = any(map(is_quantised, layers.values()))
        self.format_version = format_version or FORMAT_VERSIONS[quantised]
        if self.format_version < FORMAT_VERSIONS[quantised]:
            raise CalrError("config.json: quantised layers need format_version 2")
        self.layers = layers
        if recipe is not None and not isinstance(recipe, dict):
            raise CalrError(f"config.json: the recipe is {recipe!r}, must be an object")
        try:
            Recipe.read(recipe or {})
        except CalrError as error:
            raise CalrError(f"config.json: the recipe's {error}") from error
        self.recipe = recipe or {}
        if errors is not None:
            _check_errors(errors, layers)
            self.errors = errors


def is_quantised(layer: Any) -> bool:
    """Tell whether an entry of `layers` describes a quantised module."""
    return isinstance(layer, dict) and "bits" in layer


def _check_layer(name: str, layer: Any) -> None:
    if is_quantised(layer):
        try:
            Form(**layer)
        except (TypeError, ValueError) as error:
            raise CalrError(f"config.json: layer {name}: {error}") from error
        return
    if not isinstance(layer, dict) or set(layer) != {"layout", "rank"}:
        raise CalrError(f"config.json: layer {name} must have exactly a layout and a rank")
    if layer["layout"] not in LAYOUTS:
        raise CalrError(f"config.json: layer {name} has the unknown layout {layer['layout']!r}")
    if type(layer["rank"]) is not int or layer["rank"] < 1:
        raise CalrError(f"config.json: layer {name} has the impossible rank {layer['rank']!r}")


def _check_errors(errors: Any, layers: Iterable[str]) -> None:
    if not isinstance(errors, dict):
        raise CalrError("config.json: quantization_config.errors must map names to lists")
    for name in {*layers, *errors}:
        curve = errors.get(name)
        if not isinstance(curve, list) or not all(
            type(x) in (float, int) and 0 <= x < math.inf for x in curve
        ):
            raise CalrError(f"config.json: the errors of layer {name} must be a list of numbers")
        if any(later > earlier for earlier, later in itertools.pairwise(curve)):
            raise CalrError(f"config.json: the errors of layer {name} must fall with the rank")
