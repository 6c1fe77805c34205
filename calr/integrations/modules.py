"""Empty compressed modules in the places of a model's own, as a checkpoint describes them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from calr.errors import CalrError
from calr.integrations.config import is_quantised
from calr_kernels import Form, LowRankLinear, QuantizedEmbedding, QuantizedLinear


def replace(model: nn.Module, name: str, layer: Mapping[str, Any]) -> nn.Module:
    """Put the empty module that `layer` describes in the place of a model's own, and return it.

    On the same device, in the same dtype. Raises CalrError when there is no such module, or none
    that this fits.
    """
    try:
        dense = model.get_submodule(name)
    except AttributeError:
        raise CalrError(f"config.json: layer {name} is no layer of this model") from None
    try:
        if is_quantised(layer):
            made: nn.Module = quantized_like(dense, Form(**layer))
            vars(made)["_is_hf_initialized"] = True  # no random numbers for records on the disk
        else:
            made = low_rank_like(dense, **layer)
    except ValueError as error:
        raise CalrError(f"config.json: layer {name}: {error}") from error
    model.set_submodule(name, made)
    return made


def low_rank_like(dense: nn.Module, layout: Any, rank: int) -> LowRankLinear:
    """Make an empty LowRankLinear for the place of a linear layer; ValueError for what is none."""
    if type(dense) is not nn.Linear:
        raise ValueError(f"is a {type(dense).__name__}, no linear layer")
    return LowRankLinear(
        dense.in_features,
        dense.out_features,
        rank,
        layout,
        bias=dense.bias is not None,
        device=dense.weight.device,
        dtype=dense.weight.dtype,
    )


def quantized_like(dense: nn.Module, form: Form) -> QuantizedLinear | QuantizedEmbedding:
    """Make an empty quantised module for the place of a linear layer or an embedding.

    Raises ValueError for a module of another kind.
    """
    weight: Any = getattr(dense, "weight", None)
    if type(dense) is nn.Linear:
        return QuantizedLinear(
            dense.in_features,
            dense.out_features,
            form,
            bias=dense.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
    if not can_be_quantised(dense):
        raise ValueError(f"is a {type(dense).__name__}, neither a linear layer nor an embedding")
    assert isinstance(dense, nn.Embedding)
    return QuantizedEmbedding(
        dense.num_embeddings,
        dense.embedding_dim,
        form,
        scale=float(getattr(dense, "scalar_embed_scale", 1.0)),
        device=weight.device,
        dtype=weight.dtype,
    )


def can_be_quantised(module: nn.Module | None) -> bool:
    """Tell whether a module does no more than multiply by its weight, or look its rows up (and
    scale them, as Gemma does)."""
    return type(module) in (nn.Linear, nn.Embedding) or (
        isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale")
    )
