"""What a model's weights are: their identity, and that they are numbers."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calr.errors import CalrError
from calr.model.absent import Absent, present
from calr.version import __version__
from calr_kernels import QuantizedEmbedding

PART = 1 << 22  # numbers looked at together


def fingerprint(model: PreTrainedModel) -> str:
    """Hash a model's configuration and weights, and this version of calr."""
    found = hashlib.sha256(__version__.encode() + model.config.to_json_string().encode())
    for name, parameter in model.named_parameters():
        found.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        raw = present(parameter).cpu().contiguous().view(-1).view(torch.uint8)
        found.update(raw.numpy().data)
    return found.hexdigest()


def digest(*parts: Any) -> str:
    """Hash tensors, and whatever else prints faithfully: the key of what depends on them."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{list(part.shape)} {part.dtype}".encode() + part.numpy().tobytes())
        else:
            found.update(repr(part).encode())
    return found.hexdigest()


@torch.no_grad()
def recast(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model's floating parameters and persistent buffers to a dtype, as a load would.

    What a load computes anew, such as rotary frequencies, stays as it is.
    """
    absent: dict[int, Absent] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if isinstance(p, Absent) and p.is_floating_point():
                module._parameters[name] = absent.setdefault(id(p), p.like(dtype))
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)
    for module in model.modules():
        if isinstance(module, QuantizedEmbedding):
            module.like = module.get_buffer("like").to(dtype)


def check_finite(model: nn.Module) -> None:
    """Raise CalrError naming the first parameter with a NaN or an infinity, or not in memory."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise CalrError(f"{name}: is not in memory; load the model without offloading")
        require_finite(present(parameter), f"{name}: the values")


def require_finite(tensor: Tensor, what: str, computed: torch.dtype | None = None) -> None:
    """Raise CalrError, beginning with what, for a NaN or an infinity.

    computed: the dtype of the computation, where it is the result of one.
    """
    if all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(PART)):
        return
    remedy = "Check the checkpoint"
    if computed == torch.float16:
        remedy = "They overflow float16: use --dtype bfloat16 or float32"
    raise CalrError(f"{what} hold NaN or infinity. {remedy}")
