"""Elastic models: ordered factors of every layer, cut to any size without calibration data."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from calr.errors import CalrError
from calr.integrations.config import CalrConfig
from calr.integrations.transformers import attach
from calr.methods import resolve
from calr.model import (
    analyse,
    digest,
    fingerprint,
    load,
    load_skeleton,
    low_rank,
    require_same,
    saver,
    set_submodule,
    tensor_bytes,
    two_factor,
)
from calr.progress import progress
from calr.ranks import Budget, Shape, least_error, report
from calr.recipe import Recipe
from calr.storage import (
    destination,
    model_card,
    read_manifest,
    size,
    verify,
    write_at_once,
)
from calr_kernels import LowRankLinear
from calr_kernels.layout import Layout

LOW_RANK = "the decoder's linear layers are stored as low-rank factors"  # in a model card


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
    recipe = Recipe.read(config.recipe | {"keep": keep, "layout": layout, "solver": solver})
    try:
        modules = {name: model.get_submodule(name) for name in errors}
    except AttributeError as error:
        raise CalrError(f"config.json: errors of a layer that the model lacks: {error}") from error
    shapes = {n: Shape(n, m.out_features, m.in_features) for n, m in modules.items()}  # type: ignore[arg-type]
    dense = sum(shape.dense for name, shape in shapes.items() if name not in config.layers)
    elastic = tuple(shapes[name] for name in config.layers)
    budget = Budget(elastic, keep, layout, recipe.rank_step, fixed=dense)
    curves = {s.name: _every_error(errors[s.name], recipe.rank_step, s) for s in elastic}
    ranks = least_error(budget, curves, exact=recipe.solver == "exact")
    cut: dict[str, nn.Module] = {}
    for name, rank in progress(ranks.items(), desc="resizing", unit="layer"):
        old = modules[name]
        assert isinstance(old, LowRankLinear)
        if rank is None:
            cut[name] = old.to_dense()
        else:
            up, down = old.weight.detach()[:, :rank], old.down.weight.detach()[:rank]
            cut[name] = low_rank(up, down, old.bias, layout, old.weight.dtype)
    for name, module in cut.items():
        set_submodule(model, name, module.train(model.training))
    stored = report.stored_at(ranks, layout)
    attach(model, CalrConfig(layers=stored, recipe=config.recipe | recipe.to_dict()))
    return model


def resize_to(
    source: str | Path,
    directory: str | Path,
    keep: float,
    *,
    layout: Layout = "pivoted",
    solver: str = "lagrangian",
    overwrite: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Cut an elastic checkpoint into a directory, whole or not at all; return what it became.

    source, dtype, device and trust_remote_code: as in `load`. Raises CalrError as `resize` does,
    and for a directory that holds something else (without overwrite).
    """
    source = str(source)
    place = destination(directory, source, statistics=None, overwrite=overwrite)
    if read_manifest(Path(source)) is not None:
        verify(Path(source))
    skeleton = load_skeleton(source, trust_remote_code=trust_remote_code, dense=True)
    structure = analyse(skeleton)
    model, tokenizer = load(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    before = tensor_bytes(model)
    options: dict[str, Any] = {"keep": keep, "layout": layout, "solver": solver}
    resize(model, **options)
    config: Any = model.config.quantization_config
    results = {"source_bytes": before} | report.byte_totals(structure, tensor_bytes(model))
    results |= report.outcome(structure, config.layers)
    made = yaml.safe_dump(config.recipe, sort_keys=False)
    command = " ".join(f"--{name} {value}" for name, value in options.items())
    command = f"calr resize {{model}} OUTPUT {command}"
    write_at_once(
        saver(model, tokenizer),
        place,
        model_card(source, LOW_RANK, command, made, results),
        key=digest(fingerprint(model), options),
        summary={"model": source, "keep": keep},
        results=results,
        overwrite=overwrite,
        check=partial(require_same, model, trust_remote_code=trust_remote_code),
    )
    return results | {"bytes": size(place), "directory": str(place)}


def every_rank(recipe: Recipe) -> Recipe:
    """Return the recipe of a model that can be resized: all ranks, no training.

    Raises CalrError for another allocation than global, and for a method whose factors have no
    order.
    """
    if recipe.quantised:
        raise CalrError(
            f"elastic: is a low-rank checkpoint in 16 bit, not of {recipe.budget}; leave bits and "
            "size out (in Python, Recipe(keep=1))"
        )
    if not resolve(recipe.method, recipe.method_options).ordered:
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


def complete(model: nn.Module, layers: dict[str, LowRankLinear]) -> dict[str, LowRankLinear]:
    """Let full-rank factors give the dense weights also where calibration saw nothing.

    A decomposition leaves out directions that calibration gave no energy. A second factor of the
    dense weight's own shape gets a term of zeros more, so that no program that does not know the
    format takes it for that weight.
    """
    made = {}
    for name, layer in layers.items():
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        weight = dense.weight.detach()
        up, down = fill_empty_terms(weight, layer.weight.detach(), layer.down.weight.detach())
        if up.shape == weight.shape:
            up, down = pad(up, (0, 1)), pad(down, (0, 0, 0, 1))
        made[name] = two_factor(dense, up, down)
    return made


def fill_empty_terms(weight: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Fill terms that are zero, up [N, r], down [r, K], with the SVD of what weight has beside."""
    empty = ((up.norm(dim=0) == 0) | (down.norm(dim=1) == 0)).nonzero()[:, 0]
    if not len(empty):
        return up, down
    missing = weight.double() - up.double() @ down.double()
    u, s, vh = torch.linalg.svd(missing, full_matrices=False)
    root, up, down = s[: len(empty)].sqrt(), up.clone(), down.clone()
    up[:, empty] = (u[:, : len(empty)] * root).to(up)
    down[empty] = (root[:, None] * vh[: len(empty)]).to(down)
    return up, down


def _every_error(sampled: list[float], step: int, shape: Shape) -> np.ndarray:
    """Return errors at every rank; between the multiples of the step, which are never chosen, that
    of the multiple below."""
    size = min(shape.out_features, shape.in_features) + 1
    if len(sampled) != -(-size // step):
        raise CalrError(f"config.json: the errors of layer {shape.name} do not fit its shape")
    return np.repeat(np.array(sampled), step)[:size]
