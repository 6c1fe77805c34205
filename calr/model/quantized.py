"""Quantised modules in the places of a model's own."""

from typing import Any

import torch
from torch import Tensor, nn

from calr.integrations.modules import quantized_like
from calr_kernels import Form, QuantizedEmbedding, QuantizedLinear


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


def parameter_count(model: nn.Module) -> int:
    """Count a model's parameters, shared ones once: of quantised matrices their weights."""
    sizes = {id(p): p.numel() for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            sizes[id(module.weight)] = module.out_features * module.in_features
        elif isinstance(module, QuantizedEmbedding):
            sizes[id(module.weight)] = module.num_embeddings * module.embedding_dim
    return sum(sizes.values())


def tensor_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's parameters and persistent buffers, shared ones once."""
    values = model.state_dict(keep_vars=True).values()
    tensors = {id(t): t for t in values if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())
