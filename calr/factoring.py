"""Turn layers into factors, block by block; what is finished is kept."""

from collections.abc import Sequence

from torch import Tensor, nn

from calr import parallel
from calr.model import Layer, balance, two_factor
from calr.progress import progress
from calr.ranks import Decompositions, Ranks
from calr.storage import Store
from calr.training import BlockFit
from calr_kernels import LowRankLinear


def factorise(
    decompositions: Decompositions, ranks: Ranks, finished: Store
) -> dict[str, LowRankLinear]:
    """Build two-factor float32 layers of given ranks, by name; None leaves a layer out.

    Training wants two balanced factors; `pack` rewrites them in a layout. finished: the store of
    finished blocks. Under shifted_inputs or block_epochs each block is fitted to what the
    compressed ones before it feed it.
    """
    model, structure, recipe = decompositions.model, decompositions.structure, decompositions.recipe

    def make(layer: Layer, shift: Tensor | None, moment: Tensor | None) -> LowRankLinear:
        rank, dense = ranks[layer.name], model.get_submodule(layer.name)
        assert rank is not None and isinstance(dense, nn.Linear)
        if moment is None:
            found = decompositions.last_of(layer)
        else:
            found = decompositions.shifted(layer, shift, moment)
        return two_factor(dense, *balance(*found.factors(rank)))

    fit = None
    if recipe.shifted_inputs or recipe.block_epochs:
        fit = BlockFit(model, structure, recipe, decompositions.statistics.ids, make)
    built: dict[str, LowRankLinear] = {}
    blocks = range(structure.blocks)
    wanted = [[x for x in structure.in_block(b) if ranks.get(x.name) is not None] for b in blocks]
    own = blocks if fit is not None else parallel.mine(blocks)
    if parallel.size() > 1:  # together: what one of them lacks another may have finished
        decompositions.statistics.collect()
    for block in progress(own, desc="factors", unit="block"):
        layers = wanted[block]
        known = _known(model, layers, finished, f"block-{block:04d}")
        if fit is not None:
            made = fit.fit(block, layers, known)
        else:
            made = known or {layer.name: make(layer, None, None) for layer in layers}
        if not known and made and (fit is None or parallel.first()):
            tensors = {f"{n}.up": m.weight for n, m in made.items()}
            tensors |= {f"{n}.down": m.down.weight for n, m in made.items()}
            finished.save(f"block-{block:04d}", tensors)
        built |= {layer.name: made[layer.name] for layer in layers}  # however they were found
    parallel.wait()
    for block in blocks if len(own) < len(blocks) else ():
        built |= _known(model, wanted[block], finished, f"block-{block:04d}")
    return {layer.name: built[layer.name] for layers in wanted for layer in layers}


def _known(
    model: nn.Module, layers: Sequence[Layer], finished: Store, name: str
) -> dict[str, LowRankLinear]:
    """Return the layers of a block that an earlier run finished."""
    if name not in finished:
        return {}
    tensors, found = finished.load(name), {}
    for layer in layers:
        dense = model.get_submodule(layer.name)
        assert isinstance(dense, nn.Linear)
        found[layer.name] = two_factor(
            dense, tensors[f"{layer.name}.up"], tensors[f"{layer.name}.down"]
        )
    return found
