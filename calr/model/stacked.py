"""Where each expert's tensors are in a checkpoint's files, which hold all experts' as one, or each
expert's in pieces of other names."""

import copy
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


def experts_in_files(model: PreTrainedModel, pieces: dict[str, Pieces]) -> dict[str, InFile] | None:
    """Return where the parts of tensors of all experts are, by our names.

    pieces: what the files have of each, by transformers' names. What they lack is left out. None
    where experts are stored together in a form that has to be converted as a whole.
    """
    converters = {
        pattern: entry
        for entry in get_model_conversion_mapping(model)
        if isinstance(entry, WeightConverter)
        for pattern in entry.source_patterns
    }
    found: dict[str, InFile] = {}
    for name, ours in stacked_names(model).items():
        owner: Any = model.get_submodule(name.rpartition(".")[0])
        turned = owner.fused.is_transposed and not name.endswith("_bias")
        known = {
            pattern: [tensors[key] for key in sorted(tensors, key=dot_natural_key)]
            for pattern, tensors in pieces[name].items()
        }
        whole = known.pop(None, [])
        if any(len(tensors) == 1 < len(ours) for tensors in known.values()):
            return None
        for expert, own in enumerate(ours):
            if whole and whole[0].shape[0] == len(ours):
                place = InFile(whole[0].shape[1:], partial(whole[0].read, expert))
            elif known and all(len(tensors) == len(ours) for tensors in known.values()):
                parts = {str(pattern): tensors[expert] for pattern, tensors in known.items()}
                place = _converted(model, converters[next(iter(parts))], name, parts)
            else:
                break
            found[own] = _turned(place) if turned else place
    return found


def _turned(place: InFile) -> InFile:
    return InFile(place.shape[::-1], lambda: place.read().mT.contiguous())


def _converted(
    model: Any, converter: WeightConverter, name: str, pieces: dict[str, InFile]
) -> InFile:
    """Return one expert's part of a tensor, made of its pieces as transformers makes all."""

    def make(values: dict[str, Tensor]) -> Tensor:
        alone: Any = copy.deepcopy(converter)
        for pattern, value in values.items():
            alone.add_tensor(name, name, pattern, value)
        made = alone.convert(name, model=model, config=model.config)[name]
        one: Tensor = made[0] if isinstance(made, list) else made
        return one[0]

    empty = {p: torch.empty(piece.shape, device="meta") for p, piece in pieces.items()}
    read = {pattern: piece.read for pattern, piece in pieces.items()}
    return InFile(tuple(make(empty).shape), lambda: make({p: r() for p, r in read.items()}))
