"""Resize an elastic model: cut ordered factors to any size, without calibration data."""

import dataclasses

import numpy as np
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from calr import allocation, layouts
from calr.allocation import Shape
from calr.blocks import set_submodule
from calr.errors import CalrError
from calr.integrations.transformers import CalrConfig, attach
from calr.recipe import Recipe
from calr_kernels import LowRankLinear
from calr_kernels.nn import Layout


def resize(
    model: PreTrainedModel, keep: float, *, layout: Layout = "pivoted", solver: str = "lagrangian"
) -> PreTrainedModel:
    """Cut a model from `compress(…, elastic=True)` to keep, in place, and return it.

    Gives what compressing the dense model to keep without correction gives, up to the rounding of
    the elastic model's factors to its dtype (a layer left dense is their product). Raises
    CalrError for a model that is not elastic: training and pivoting lose the order of the factors.
    """
    config = model.config.quantization_config if is_calr(model) else None
    errors = getattr(config, "errors", None)
    if config is None or errors is None:
        raise CalrError(
            "the model is not elastic: correction and the pivoted layout lose the order of the "
            "factors; make one with `calr compress MODEL DIRECTORY --elastic`"
        )
    known = {field.name for field in dataclasses.fields(Recipe)}
    made = {name: value for name, value in config.recipe.items() if name in known}
    made |= {"keep": keep, "layout": layout, "solver": solver, "skip": tuple(made["skip"])}
    recipe = Recipe(**made)
    modules = {name: model.get_submodule(name) for name in errors}
    shapes = {n: Shape(n, m.out_features, m.in_features) for n, m in modules.items()}  # type: ignore[arg-type]
    ranks = allocation.globally(
        [shapes[name] for name in config.layers],
        [_whole_curve(errors[name], recipe.rank_step, shapes[name]) for name in config.layers],
        keep,
        layout,
        recipe.rank_step,
        fixed=sum(shape.dense for name, shape in shapes.items() if name not in config.layers),
        exact=recipe.solver == "exact",
    )
    made_of: dict[str, nn.Module] = {}
    for name, rank in logging.tqdm(ranks.items(), desc="resizing", unit="layer"):
        old = modules[name]
        assert isinstance(old, LowRankLinear)
        if rank is None:
            made_of[name] = _dense(old)
        else:
            up, down = old.weight.detach()[:, :rank], old.down.weight.detach()[:rank]
            made_of[name] = layouts.low_rank(up, down, old.bias, layout, old.weight.dtype)
    for name, module in made_of.items():
        set_submodule(model, name, module.train(model.training))
    layers = {n: {"layout": layout, "rank": r} for n, r in ranks.items() if r is not None}
    attach(model, CalrConfig(layers=layers, recipe=config.recipe | recipe.to_dict()))
    return model


def is_calr(model: PreTrainedModel) -> bool:
    """Tell whether a model in memory was compressed by calr."""
    return isinstance(getattr(model.config, "quantization_config", None), CalrConfig)


def _whole_curve(sampled: list[float], step: int, shape: Shape) -> np.ndarray:
    """Return errors at every rank; between the multiples of the step, which are never chosen, that
    of the multiple below."""
    size = min(shape.out_features, shape.in_features) + 1
    if len(sampled) != -(-size // step):
        raise CalrError(f"config.json: the errors of layer {shape.name} do not fit its shape")
    return np.repeat(np.array(sampled), step)[:size]


def _dense(layer: LowRankLinear) -> nn.Linear:
    dense = nn.Linear(
        layer.in_features, layer.out_features, layer.bias is not None, device="meta"
    ).to_empty(device=layer.weight.device)
    product = layer.weight.detach().double() @ layer.down.weight.detach().double()
    dense.weight = nn.Parameter(product.to(layer.weight.dtype))
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().clone())
    return dense
