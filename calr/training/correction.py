"""Correction: train a compressed model to give the dense model's own outputs again.

CALR (arXiv 2508.16680) adds a trained low-rank path to every compressed layer. A path that is
linear and fitted layer by layer cannot beat truncation at the summed rank, so ours is trained on
what truncation cannot see: the model's output distribution, by KL divergence from the dense model
(Hinton et al., arXiv 1503.02531). The path lies within the layer's own rank.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from calr.errors import CalrError
from calr.model import Swapped, checkpointing, find_blocks, pack, resident
from calr.recipe import Recipe
from calr.storage import Store
from calr.training.loop import Trained, train
from calr.training.targets import Targets, collect_targets
from calr_kernels import LowRankLinear

MEASURED = 8  # windows that are never trained on, only measured on

logger = logging.get_logger(__name__)


def windows_drawn(recipe: Recipe) -> int:
    """Count the windows of text that a recipe takes: statistics and correction share them.

    Those of the correction include what it is only measured on.
    """
    trained = math.ceil(recipe.correction_tokens / recipe.window) + MEASURED
    return max(recipe.samples, trained if recipe.correction_tokens else 0)


def check_trainable(recipe: Recipe, dtype: torch.dtype) -> None:
    """Raise CalrError where a recipe trains a model in a dtype that no training is in."""
    trains = recipe.correction_tokens and recipe.keep != 1
    if trains and dtype == torch.float64:
        raise CalrError(
            "dtype=float64: is not trained in; name float32, or train nothing: correction_tokens=0"
        )


def windows_used(ids: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Split windows [S, T] into those to train on and those, at the end, to measure on.

    Raises CalrError when there is too little text.
    """
    if len(ids) < 2:
        raise CalrError(
            "correction: one window of text is not enough to train on and to measure; give more, "
            "or correction_tokens=0"
        )
    held_out = min(MEASURED, -(-len(ids) // 4))
    windows = min(len(ids) - held_out, -(-recipe.correction_tokens // ids.shape[1]))
    if windows * ids.shape[1] < recipe.correction_tokens:
        logger.warning_once(
            f"correction trains on {windows * ids.shape[1]} tokens instead of "
            f"{recipe.correction_tokens}: there is no more text"
        )
    return ids[:windows], ids[-held_out:]


def recorded_outputs(
    model: PreTrainedModel, ids: Tensor, recipe: Recipe, store: Store
) -> tuple[Targets, Targets]:
    """Record what the dense model says over windows [S, T]: to train on, and to measure on."""
    trained, held_out = windows_used(ids, recipe)
    return collect_targets(model, trained, store), collect_targets(model, held_out, store)


def corrected(
    model: PreTrainedModel,
    layers: dict[str, LowRankLinear],
    ids: Tensor,
    recipe: Recipe,
    recorded: Store,
    work: Store,
    checkpointed: bool = False,
) -> tuple[Trained, dict[str, LowRankLinear]]:
    """Train two-factor layers in their places in a dense model; return them packed.

    ids [S, T]: text to train and to measure on. recorded: where the dense model's outputs are kept,
    work: where an interrupted training continues. checkpointed: activations are computed again for
    the backward pass, for a third more time. The dense layers are back afterwards; the norms,
    trained too, stay trained and, on any failure, are as before.
    """
    targets, held_out = recorded_outputs(model, ids, recipe, recorded)
    before = [(p, p.data) for p in norm_parameters(model)]
    try:
        with Swapped(model, layers), resident(model):
            done = correct(model, layers, targets, held_out, recipe, work, checkpointed)
        return done, pack(model, layers, recipe.layout)
    except BaseException:
        for p, value in before:
            p.data = value
        raise


def corrected_students(
    model: PreTrainedModel,
    students: dict[str, nn.Module],
    targets: Targets,
    held_out: Targets,
    recipe: Recipe,
    work: Store,
    checkpointed: bool = False,
) -> Trained:
    """Train students in their places in a dense model: scales and factors, and the model's norms.

    targets, held_out: `recorded_outputs` of the dense model; work and checkpointed: as in
    `corrected`. The dense modules are back afterwards; the norms stay trained and, on any failure,
    are as before. Scales and factors move in proportion to their size.
    """
    norms = norm_parameters(model)
    own = [p for p in _own_parameters(students) if p.numel()]
    before = [(p, p.data) for p in norms]
    rates = [1.0] * len(norms) + [float(p.detach().float().square().mean().sqrt()) for p in own]
    try:
        with Swapped(model, students), resident(model), _activations(model, checkpointed):
            return _train(model, norms + own, targets, held_out, recipe, work, rates)
    except BaseException:
        for p, value in before:
            p.data = value
        raise


def _own_parameters(students: dict[str, nn.Module]) -> list[nn.Parameter]:
    """List scales and factors of students, those that are shared once; biases are the model's."""
    named = {
        id(p): p
        for student in students.values()
        for name, p in student.named_parameters()
        if name != "bias"
    }
    return list(named.values())


def correct(
    model: PreTrainedModel,
    layers: dict[str, LowRankLinear],
    targets: Targets,
    held_out: Targets,
    recipe: Recipe,
    store: Store,
    checkpointed: bool = False,
) -> Trained:
    """Train the two-factor layers of a compressed model, in place, and its norms; see `train`."""
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    parameters += norm_parameters(model)
    with _activations(model, checkpointed):
        return _train(model, parameters, targets, held_out, recipe, store)


def _activations(model: nn.Module, again: bool) -> AbstractContextManager[None]:
    """Have activations kept for the backward pass, or computed again in it."""
    return checkpointing(list(find_blocks(model)[1]) if again else [])


def _train(
    model: PreTrainedModel,
    parameters: list[nn.Parameter],
    targets: Targets,
    held_out: Targets,
    recipe: Recipe,
    store: Store,
    rates: Sequence[float] | None = None,
) -> Trained:
    return train(
        model,
        parameters,
        targets,
        held_out,
        learning_rate=recipe.learning_rate or 0.0,  # none at keep 1
        rates=rates,
        step_tokens=recipe.step_tokens,
        cross_entropy=recipe.cross_entropy,
        seed=recipe.seed,
        store=store,
    )


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters of a model's norms."""
    modules = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    return [p for module in modules for p in module.parameters(recurse=False)]
