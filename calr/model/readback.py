"""Whether what was written is what was meant: load it, and compare."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calr.errors import CalrError
from calr.model.absent import absent, present
from calr.model.loading import load

TOKENS = 24  # whose logits are compared: too many for kernels that keep copies of the weights


@torch.no_grad()
def require_same(
    model: PreTrainedModel, directory: Path, *, trust_remote_code: bool = False
) -> None:
    """Load a checkpoint that was just written and compare it with the model in memory.

    Every tensor bit for bit, then the logits of a few tokens. Raises CalrError naming what differs.
    """
    device = str(model.device)
    loaded, _ = load(
        str(directory), device=device, trust_remote_code=trust_remote_code, lazily=absent(model)
    )
    found, wanted = (m.state_dict(keep_vars=True) for m in (loaded, model))
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found or name not in wanted or not _same(found[name], wanted[name]):
            raise CalrError(
                f"{name}: is another one when the checkpoint is loaded again; nothing was moved "
                "into place. This model's family is not supported"
            )
    ids = torch.arange(1, TOKENS + 1, device=model.device)[None] % model.config.vocab_size
    training = model.training
    logits = [m.eval()(input_ids=ids, use_cache=False).logits for m in (loaded, model)]
    model.train(training)
    if not torch.equal(logits[0].nan_to_num(), logits[1].nan_to_num()):
        raise CalrError(
            "the checkpoint gives other logits when it is loaded again; nothing was moved into "
            "place. This model's family is not supported"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bits(present(a)), _bits(present(b)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
