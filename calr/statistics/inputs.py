"""Second moments of the inputs, and what each block does to its input: forward passes alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel
from transformers.utils import logging

from calr import parallel
from calr.model import BlockRunner, Layer, Structure, hooked, require_finite
from calr.progress import give_back, progress
from calr.statistics.folded import folded
from calr.statistics.routed import tokens_of, with_average_inputs, zeros
from calr.storage import Spilled, Store
from calr_kernels import gram

PHASE = "second moments"
HELD_BYTES = 256 << 20  # of hidden states, above which they are kept in files
logger = logging.get_logger(__name__)


@torch.no_grad()
def input_moments(model: PreTrainedModel, structure: Structure, ids: Tensor, store: Store) -> None:
    """Save E[x xᵀ] [K, K] float32 of every input group, block by block, folded: "inputs-<block>".

    An expert's is over the tokens that were routed to it, "<layer>.tokens" with those that it
    counts of its block's average.
    """
    names = [f"inputs-{block:04d}" for block in range(structure.blocks)]
    known = parallel.agree([name in store for name in names])
    if all(known):
        return
    _warn_if_few(structure, ids)
    parallel.require(len(ids), "samples")
    with store.scratch("hidden") as kept:
        hidden = Spilled(kept, HELD_BYTES)
        runner = BlockRunner(model, structure, parallel.mine(ids), first=hidden)
        for block in progress(range(structure.blocks), desc=PHASE, unit="block"):
            if known[block]:
                runner.advance(block, hidden)
            else:
                sums = _of_block(runner, structure.in_block(block), block, hidden)
                if parallel.first():
                    store.save(names[block], sums)
                del sums
                give_back()
    parallel.wait()


def _of_block(
    runner: BlockRunner, layers: list[Layer], block: int, hidden: Spilled
) -> dict[str, Tensor]:
    """Run a block; return the second moments of its groups, folded, and their numbers of tokens."""
    model = runner.model
    sums = zeros(model, layers, None)
    groups = dict.fromkeys(layer.group for layer in layers)
    with hooked(
        model.get_submodule(group).register_forward_pre_hook(_accumulate(sums, group))
        for group in groups
    ):
        runner.advance(block, hidden)
    parallel.add_up(sums[name] for name in sorted(sums))
    with_average_inputs(sums, layers)
    for group in groups:
        require_finite(sums[group], f"{group}: its calibration inputs", model.dtype)
        sums[group] /= sums[tokens_of(group)]
    return folded(sums)


def block_influence(model: PreTrainedModel, structure: Structure, ids: Tensor) -> Tensor:
    """Return BI = 1 - E[cos(block input, block output)] over all tokens, per block [L].

    ShortGPT's block influence (arXiv 2403.03853, equation 1); needs no backward pass.
    """
    runner = BlockRunner(model, structure, ids)
    hidden, found = runner.hidden, []
    for block in range(structure.blocks):
        after = runner.run(block, hidden)
        pairs = zip(hidden, after, strict=True)
        alike = [cosine_similarity(x.double(), y.double(), dim=-1).sum() for x, y in pairs]
        found.append(1 - torch.stack(alike).sum() / ids.numel())
        hidden = after
    return torch.stack(found).cpu()


def _accumulate(
    sums: dict[str, Tensor], group: str
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])  # [tokens, K]
        sums[group] = gram(x.float() if x.dtype == torch.float64 else x, sums.get(group))
        count = torch.tensor(len(x), dtype=torch.float64, device=x.device)
        sums[tokens_of(group)] = sums.get(tokens_of(group), 0) + count

    return hook


def _warn_if_few(structure: Structure, ids: Tensor) -> None:
    widest = max(structure.layers, key=lambda layer: layer.in_features / layer.share)
    tokens = int(ids.numel() * widest.share)
    if tokens < widest.in_features:
        logger.warning(
            f"{tokens} calibration tokens are fewer than the {widest.in_features} inputs of "
            f"{widest.name}, so its second moment is singular; use at least "
            f"{4 * widest.in_features / widest.share:.0f} tokens (raise samples or window)"
        )
