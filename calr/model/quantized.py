"""Quantised modules in the places of a model's own."""

from typing import Any

import torch
from torch import Tensor, nn

from calr.integrations.modules import quantized_like
from calr_kernels import Form


def quantize(model: nn.Module, names: tuple[str, ...], form: Form, records: Tensor) -> None:
    """Put quantised modules that share records [N, groups, record] in the places of some.

    Their biases stay.
    """
    weight = None
    for name in names:
        dense: Any = model.get_submodule(name)
        made: Any = quantized_like(dense, form)
        if weight is None:
            weight = nn.Parameter(records.to(dense.weight.device), requires_grad=False)
        made.weight = weight
        if getattr(dense, "bias", None) is not None:
            made.bias = dense.bias
        model.set_submodule(name, made.train(model.training))


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Return a module's weight, detached."""
    return model.get_submodule(name).get_parameter("weight").detach()


def tensor_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's parameters and persistent buffers, shared ones once."""
    values = model.state_dict(keep_vars=True).values()
    tensors = {id(t): t for t in values if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())
