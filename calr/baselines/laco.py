"""LaCo (arXiv 2402.11187): collapse rear decoder blocks into earlier ones."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from calr.baselines.shortgpt import remove_blocks
from calr.errors import CalrError
from calr.model import BlockRunner, Structure, analyse

MERGES = (4, 3, 2)  # C: blocks in one collapse, the one that stays included
INTERVAL = 2  # I: blocks between the places of two collapses
THRESHOLDS = [t / 100 for t in range(98, -101, -2)]  # T, from the strictest
PROBES = 1  # windows on which the final hidden states are compared


def laco(model: PreTrainedModel, ids: Tensor, count: int) -> list[int]:
    """Collapse blocks until count are gone, in place; return the indices of those.

    From the top down (Algorithm 1): the matrices of blocks l+1 … l+m, m < C, are added into those
    of l as differences, θ_l + Σ (θ_{l+i} - θ_l), and this stays when the cosine similarity of the
    final hidden states (normalised, mean over tokens) to the dense model's on windows [S, T]
    exceeds T. The strictest T that loses count blocks is taken, its last collapse cut to the count.
    The paper sets C by hand for each model; here the C that ends most similar is taken. Raises
    CalrError when none loses count blocks.
    """
    structure = analyse(model)
    if not 0 <= count < structure.blocks:
        raise CalrError(f"laco: cannot remove {count} of {structure.blocks} blocks")
    search = _Search(model, structure, ids[:PROBES])
    try:
        found = [found for merge in MERGES if (found := search.strictest(merge, count))]
        if not found:
            raise CalrError(f"laco: no threshold removes {count} of {structure.blocks} blocks")
        _, threshold, merge = max(found)
        search.restore()
        gone = search.collapse(merge, threshold, count)
    except BaseException:
        search.restore()
        raise
    remove_blocks(model, structure, gone)
    return sorted(gone)


class _Search:
    """The blocks of a model, some of them collapsed, and what they do to a few windows."""

    def __init__(self, model: PreTrainedModel, structure: Structure, ids: Tensor) -> None:
        self.runner = BlockRunner(model, structure, ids)
        self.original = [_parameters(block) for block in self.runner.blocks]
        self.inputs = [self.runner.hidden]  # of every dense block, then the final hidden states
        for block in range(structure.blocks):
            self.inputs.append(self.runner.run(block, self.inputs[-1]))
        self.known: dict[tuple[object, ...], float] = {}  # similarities after these collapses
        self.rejected = -math.inf  # the largest similarity that was too small
        self.similarity = 1.0  # after the last collapse that stayed
        parent = model.get_submodule(structure.blocks_name.rpartition(".")[0])
        self.norms = [m for m in parent.children() if "norm" in type(m).__name__.lower()]
        self.final = self._normalised(self.inputs[-1])

    def strictest(self, merge: int, count: int) -> tuple[float, float, int] | None:
        """Return the similarity at the strictest threshold that loses count blocks, that threshold
        and merge; None if no threshold does."""
        thresholds = THRESHOLDS
        while thresholds:
            self.restore()
            if len(self.collapse(merge, thresholds[0], count)) == count:
                return self.similarity, thresholds[0], merge
            thresholds = [t for t in thresholds if t < self.rejected]  # others change nothing
        return None

    def collapse(self, merge: int, threshold: float, count: int) -> list[int]:
        """Collapse from the top down at one threshold; return at most count lost blocks."""
        kept = list(range(len(self.runner.blocks)))
        gone: list[int] = []
        done: tuple[object, ...] = ()  # (block, blocks added into it), …
        self.rejected, self.similarity = -math.inf, 1.0
        at = len(kept) - merge
        while at >= 0 and len(gone) < count:
            taken = kept[at + 1 : at + 1 + min(merge - 1, count - len(gone))]
            before = _parameters(self.runner.blocks[kept[at]])
            self._add(kept[at], taken)
            left = [block for block in kept if block not in taken]
            after = (*done, (kept[at], *taken))
            if after not in self.known:  # most are, from the thresholds before
                self.known[after] = self._similarity(left, at)
            similarity = self.known[after]
            if similarity > threshold:
                gone, kept, done = gone + taken, left, after
                at = min(at - INTERVAL, len(kept) - merge)
                self.similarity = similarity
            else:
                self.rejected = max(self.rejected, similarity)
                _assign(self.runner.blocks[kept[at]], before)
                at -= 1
        return gone

    def restore(self) -> None:
        """Undo every collapse."""
        for block, values in zip(self.runner.blocks, self.original, strict=True):
            _assign(block, values)

    def _add(self, block: int, taken: list[int]) -> None:
        """Add the differences of the taken blocks' parameters to a block's."""
        base = _parameters(self.runner.blocks[block])
        others = [dict(self.runner.blocks[i].named_parameters()) for i in taken]
        _assign(
            self.runner.blocks[block],
            {name: p + sum(other[name] - p for other in others) for name, p in base.items()},
        )

    def _similarity(self, kept: list[int], first: int) -> float:
        """Compare with the dense model; all of kept before the first changed one is dense."""
        hidden = self.inputs[first]
        for block in kept[first:]:
            hidden = self.runner.run(block, hidden)
        pairs = zip(self._normalised(hidden), self.final, strict=True)
        found = [cosine_similarity(x.double(), y.double(), dim=-1).flatten() for x, y in pairs]
        return float(torch.cat(found).mean())

    @torch.no_grad()
    def _normalised(self, hidden: list[Tensor]) -> list[Tensor]:
        """Apply the model's final norm, without which a few huge channels are all that counts."""
        for norm in self.norms:
            hidden = [norm(x) for x in hidden]
        return hidden


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    """Copy a block's matrices."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.dim() >= 2}


@torch.no_grad()
def _assign(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        module.get_parameter(name).copy_(value)
