"""Correction: train a compressed model to give the dense model's own outputs again.

CALR (arXiv 2508.16680) adds a trained low-rank path to every compressed layer. A path that is
linear and fitted layer by layer cannot beat truncation at the summed rank, so ours is trained on
what truncation cannot see: the model's output distribution, by KL divergence from the dense model
(Hinton et al., arXiv 1503.02531). The path lies within the layer's own rank.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from calr.blocks import checkpointed
from calr.errors import CalrError
from calr.recipe import Recipe
from calr.store import Store
from calr.structure import find_blocks
from calr.teacher import Targets
from calr.training import Trained, train
from calr_kernels import LowRankLinear

HELD_OUT = 8  # windows that are never trained on

logger = logging.get_logger(__name__)


def windows_needed(recipe: Recipe) -> int:
    """Count the windows that a recipe's correction takes, held-out ones included; 0 without one."""
    if not recipe.correction_tokens:
        return 0
    return math.ceil(recipe.correction_tokens / recipe.window) + HELD_OUT


def windows_used(ids: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Split windows [S, T] into those to train on and those, at the end, to measure on.

    Raises CalrError when there is too little text.
    """
    if len(ids) < 2:
        raise CalrError(
            "correction: one window of text is not enough to train on and to measure; give more, "
            "or correction_tokens=0"
        )
    held_out = min(HELD_OUT, -(-len(ids) // 4))
    windows = min(len(ids) - held_out, -(-recipe.correction_tokens // ids.shape[1]))
    if windows * ids.shape[1] < recipe.correction_tokens:
        logger.warning_once(
            f"correction trains on {windows * ids.shape[1]} tokens instead of "
            f"{recipe.correction_tokens}: there is no more text"
        )
    return ids[:windows], ids[-held_out:]


def correct(
    model: PreTrainedModel,
    layers: dict[str, LowRankLinear],
    targets: Targets,
    held_out: Targets,
    recipe: Recipe,
    store: Store,
) -> Trained:
    """Train the two-factor layers of a compressed model, in place, and its norms; see `train`.

    recipe.trainable: "factors" moves all of them; "corrective" only the trailing terms of each
    layer, corrective_share of its rank, which are the residual of the truncation before them.
    """
    blocks = list(find_blocks(model)[1]) if recipe.gradient_checkpointing else []
    parameters = [p for layer in layers.values() for p in layer.parameters()] + norms(model)
    handles = []
    if recipe.trainable == "corrective":
        for layer in layers.values():
            frozen = layer.rank - max(1, round(recipe.corrective_share * layer.rank))
            handles.append(layer.weight.register_hook(_without(frozen, dim=1)))
            handles.append(layer.down.weight.register_hook(_without(frozen, dim=0)))
    try:
        with checkpointed(blocks):
            return train(
                model,
                parameters,
                targets,
                held_out,
                learning_rate=recipe.peak_learning_rate,
                step_tokens=recipe.step_tokens,
                cross_entropy=recipe.cross_entropy,
                seed=recipe.seed,
                store=store,
            )
    finally:
        for handle in handles:
            handle.remove()


def norms(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters of a model's norms."""
    modules = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    return [p for module in modules for p in module.parameters(recurse=False)]


def _without(count: int, dim: int) -> Callable[[Tensor], Tensor]:
    """Return a gradient hook under which the first count rows or columns stay where they are."""

    def hook(gradient: Tensor) -> Tensor:
        return torch.cat(
            [
                torch.zeros_like(gradient.narrow(dim, 0, count)),
                gradient.narrow(dim, count, gradient.shape[dim] - count),
            ],
            dim,
        )

    return hook
