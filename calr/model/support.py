"""Whether calr can run a model as it must: causal, block by block."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calr.errors import CalrError
from calr.model.blocks import BlockRunner
from calr.model.structure import Structure, decoder
from calr.model.swapping import evaluating, hooked

TOKENS = 8


@torch.no_grad()
def require_supported(model: PreTrainedModel, structure: Structure) -> None:
    """Raise CalrError for a model that looks ahead, or whose blocks do not run one by one.

    By two short forward passes, and one through the blocks alone; nothing for a model on the meta
    device.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    family = type(model).__name__
    ids = torch.arange(1, TOKENS + 1, device=device)[None] % model.config.vocab_size
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % model.config.vocab_size
    outputs: list[Tensor] = []
    last = model.get_submodule(f"{structure.blocks_name}.{structure.blocks - 1}")

    def record(_: object, __: object, out: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(out[0] if isinstance(out, tuple) else out)

    with evaluating(model):
        with hooked([last.register_forward_hook(record)]):
            for window in (ids, other):
                decoder(model)(input_ids=window, use_cache=False)
        if len(outputs) != 2:
            raise CalrError(f"{family}: runs its blocks more than once a pass; it is not supported")
        if not all(bool(torch.isfinite(output).all()) for output in outputs):
            return  # for whoever names the layer that overflows
        first, second = (output[0, : TOKENS - 1] for output in outputs)
        if not alike(first, second):
            raise CalrError(
                f"{family}: is not causal (a later token changes what comes before it; is_decoder "
                "is false?), so there is no language model to compress"
            )
        try:
            runner = BlockRunner(model, structure, ids)
            hidden = runner.hidden
            for block in range(structure.blocks):
                hidden = runner.run(block, hidden)
            same = alike(hidden[0], outputs[0])
        except Exception as error:  # whatever another form of block raises
            raise CalrError(
                f"{family}: its blocks are of a form that calr cannot run one by one ({error}); it "
                "is not supported"
            ) from error
    if not same:
        raise CalrError(
            f"{family}: its blocks give something else when calr runs them one by one; it is not "
            "supported"
        )


def alike(found: Tensor, wanted: Tensor, fine: float = 1e-4, coarse: float = 3e-2) -> bool:
    """Compare up to what another order of sums may change; coarse: in types of 16 bit."""
    if found.shape != wanted.shape:
        return False
    tolerance = fine if wanted.dtype in (torch.float32, torch.float64) else coarse
    wrong = torch.linalg.vector_norm((found - wanted).float())
    return bool(wrong <= tolerance * torch.linalg.vector_norm(wanted.float()))
