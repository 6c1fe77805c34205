"""ShortGPT (arXiv 2403.03853): drop the decoder blocks that change their input least."""

from collections.abc import Iterable

from torch import Tensor, nn
from transformers import PreTrainedModel

from calr.errors import CalrError
from calr.model import Structure, analyse
from calr.statistics import block_influence


def shortgpt(model: PreTrainedModel, ids: Tensor, count: int) -> list[int]:
    """Drop the count blocks of least influence on windows [S, T], in place; return their indices.

    Raises CalrError when count does not leave a block.
    """
    structure = analyse(model)
    if not 0 <= count < structure.blocks:
        raise CalrError(f"shortgpt: cannot remove {count} of {structure.blocks} blocks")
    influence = block_influence(model, structure, ids)
    dropped = sorted(influence.argsort(stable=True)[:count].tolist())
    remove_blocks(model, structure, dropped)
    return dropped


def remove_blocks(model: PreTrainedModel, structure: Structure, indices: Iterable[int]) -> None:
    """Delete decoder blocks in place and renumber the others, for caches and the configuration."""
    gone = set(indices)
    blocks = list(model.get_submodule(structure.blocks_name).children())
    kept = [i for i in range(len(blocks)) if i not in gone]
    model.set_submodule(structure.blocks_name, nn.ModuleList(blocks[i] for i in kept))
    for index, old in enumerate(kept):
        for module in blocks[old].modules():
            if hasattr(module, "layer_idx"):
                vars(module)["layer_idx"] = index
    config = model.config
    config.num_hidden_layers = len(kept)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == len(blocks):  # one entry a block
            setattr(config, name, [value[i] for i in kept])
