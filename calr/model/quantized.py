"""Quantised modules in the places of a model's own."""

from typing import Any

import torch
from torch import Tensor, nn

from calr.integrations.modules import quantized_like
from calr.model.absent import Absent, absent, present, read_when_called
from calr_kernels import Form, QuantizedEmbedding, QuantizedLinear
from calr_kernels.nn import Corrective


def quantize(
    model: nn.Module, names: tuple[str, ...], form: Form, stored: dict[str, Tensor]
) -> None:
    """Put quantised modules that share their records in the places of some.

    stored: what the module holds by name, "weight" the records [N, groups, record], numbers in any
    dtype, or what stands for those in a file; biases stay.
    """
    weight = None
    for name in names:
        dense: Any = model.get_submodule(name)
        made: Any = quantized_like(dense, form)
        for key, tensor in stored.items():
            _place(made, key, tensor)
        weight = made.weight if weight is None else weight
        made.weight = weight
        if getattr(dense, "bias", None) is not None:
            made.bias = dense.bias
        if absent(made):
            read_when_called(made)
        model.set_submodule(name, made.train(model.training))


def _place(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Give a module a parameter's values, or the word that they are in a file."""
    there = module.get_parameter(key)
    if isinstance(tensor, Absent):
        inner, _, own = key.rpartition(".")
        module.get_submodule(inner)._parameters[own] = Absent.of(there, tensor.read, there.device)
    else:
        there.data = tensor.to(there.device, there.dtype)


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Return a module's weight, detached, read where it is absent."""
    return present(model.get_submodule(name).get_parameter("weight"))


def parameter_count(model: nn.Module) -> int:
    """Count a model's parameters, shared ones once: of quantised matrices their weights."""
    sizes = {id(p): p.numel() for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            sizes[id(module.weight)] = module.out_features * module.in_features
        elif isinstance(module, QuantizedEmbedding):
            sizes[id(module.weight)] = module.num_embeddings * module.embedding_dim
        elif isinstance(module, Corrective):
            sizes[id(module.down)] = module.rank * module.in_features
            sizes[id(module.up)] = module.rank * module.out_features
    return sum(sizes.values())


def tensor_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Count the bytes of a model's parameters and persistent buffers, shared ones once.

    dtype: what its floating tensors would be stored in; by default their own.
    """
    values = model.state_dict(keep_vars=True).values()
    tensors = {id(t): t for t in values if isinstance(t, torch.Tensor)}
    return sum(t.numel() * _element_size(t, dtype) for t in tensors.values())


def _element_size(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return (dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype).itemsize
