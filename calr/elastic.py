"""Elastic models: ordered factors of every layer, cut to any size without calibration data."""

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from calr import allocation, layouts, methods
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
    config = getattr(model.config, "quantization_config", None)
    errors = getattr(config, "errors", None)
    if not isinstance(config, CalrConfig) or errors is None:
        raise CalrError(
            "the model is not elastic: correction and the pivoted layout lose the order of the "
            "factors; make one with `calr compress MODEL DIRECTORY --elastic`"
        )
    known = {field.name for field in dataclasses.fields(Recipe)}
    made = {name: value for name, value in config.recipe.items() if name in known}
    made |= {"keep": keep, "layout": layout, "solver": solver, "skip": tuple(made.get("skip", ()))}
    recipe = Recipe(**made)
    try:
        modules = {name: model.get_submodule(name) for name in errors}
    except AttributeError as error:
        raise CalrError(f"config.json: errors of a layer that the model lacks: {error}") from error
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
    cut: dict[str, nn.Module] = {}
    for name, rank in logging.tqdm(ranks.items(), desc="resizing", unit="layer"):
        old = modules[name]
        assert isinstance(old, LowRankLinear)
        if rank is None:
            cut[name] = _dense(old)
        else:
            up, down = old.weight.detach()[:, :rank], old.down.weight.detach()[:rank]
            cut[name] = layouts.low_rank(up, down, old.bias, layout, old.weight.dtype)
    for name, module in cut.items():
        set_submodule(model, name, module.train(model.training))
    layers = {n: {"layout": layout, "rank": r} for n, r in ranks.items() if r is not None}
    attach(model, CalrConfig(layers=layers, recipe=config.recipe | recipe.to_dict()))
    return model


def whole(recipe: Recipe) -> Recipe:
    """Return the recipe of a model that can be resized: all ranks, no training.

    Raises CalrError for another allocation than global, and for a method whose factors have no
    order.
    """
    if not methods.resolve(recipe.method, recipe.method_options).ordered:
        raise CalrError(
            f"elastic: the factors of method={recipe.method} have no order in which they could be "
            "cut; use calr, svd_llm or svd"
        )
    if recipe.allocation != "global":
        raise CalrError(f"elastic needs allocation=global, not {recipe.allocation}")
    return dataclasses.replace(
        recipe,
        keep=1.0,
        layout="two_factor",
        correction_tokens=0,
        shifted_inputs=False,
        block_epochs=0,
    )


def complete(weight: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Fill terms that are zero, up [N, r], down [r, K], with the SVD of what is missing.

    A decomposition leaves out directions that calibration gave no energy.
    """
    empty = ((up.norm(dim=0) == 0) | (down.norm(dim=1) == 0)).nonzero()[:, 0]
    if not len(empty):
        return up, down
    missing = weight.double() - up.double() @ down.double()
    u, s, vh = torch.linalg.svd(missing, full_matrices=False)
    root, up, down = s[: len(empty)].sqrt(), up.clone(), down.clone()
    up[:, empty] = (u[:, : len(empty)] * root).to(up)
    down[empty] = (root[:, None] * vh[: len(empty)]).to(down)
    return up, down


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
