"""Where each expert's tensors are in a checkpoint's files, which hold all experts' as one, or each
expert's in pieces of other names."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key

from calr.integrations.experts import PARTS, all_experts
from calr.model.files import InFile

Pieces = dict[str | None, dict[str, InFile]]  # by what converts them and by name in the files


def stacked_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return, by transformers' name of each tensor of all experts, ours of its parts."""
    found = {}
    for name, experts in all_experts(model):
        for own, part in PARTS.items():
            layers: Any = getattr(experts, own, [])
            for tensor, whole in (("weight", part), ("bias", f"{part}_bias")):
                if len(layers) and getattr(layers[0], tensor, None) is not None:
                    names = [f"{name}.{own}.{i}.{tensor}" for i in range(len(layers))]
                    found[f"{name}.{whole}"] = names
    return found


def experts_in_files(model: PreTrainedModel, name: str, pieces: Pieces) -> dict[str, InFile]:
    """Return where the parts of a tensor of all experts are, by our names; nothing if some lack.

    pieces: what the files have of it.
    """
    names = stacked_names(model)[name]
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    turned = owner.fused.is_transposed and not name.endswith("_bias")
    whole, converters = pieces.get(None), _converters(model)
    found = {}
    for expert, ours in enumerate(names):
        if whole:
            (tensor,) = whole.values()
            if tensor.shape[0] != len(names):
                return {}
            shape, read = tensor.shape[1:], partial(tensor.read, expert)
        else:
            if not pieces or any(len(known) != len(names) for known in pieces.values()):
                return {}
            own = {
                str(pattern): known[sorted(known, key=dot_natural_key)[expert]]
                for pattern, known in pieces.items()
            }
            converter = converters[next(iter(own))]
            empty = {p: torch.empty(piece.shape, device="meta") for p, piece in own.items()}
            shape = tuple(_converted(model, converter, name, empty).shape)
            read = partial(_read, model, converter, name, own)
        found[ours] = InFile(shape[::-1], partial(_turned, read)) if turned else InFile(shape, read)
    return found


def _read(
    model: PreTrainedModel, converter: WeightConverter, name: str, pieces: dict[str, InFile]
) -> Tensor:
    return _converted(model, converter, name, {p: piece.read() for p, piece in pieces.items()})


def _turned(read: Callable[[], Tensor]) -> Tensor:
    return read().mT.contiguous()


def _converted(
    model: Any, converter: WeightConverter, name: str, pieces: dict[str, Tensor]
) -> Tensor:
    """Make one expert's part of a tensor of its pieces, as transformers makes all experts'."""
    alone: Any = copy.deepcopy(converter)
    for pattern, piece in pieces.items():
        alone.add_tensor(name, name, pattern, piece)
    made = alone.convert(name, model=model, config=model.config)[name]
    one: Tensor = made[0] if isinstance(made, list) else made
    return one[0]


def _converters(model: Any) -> dict[str, WeightConverter]:
    return {
        pattern: entry
        for entry in get_model_conversion_mapping(model)
        if isinstance(entry, WeightConverter)
        for pattern in entry.source_patterns
    }
