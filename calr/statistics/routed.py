"""Statistics of experts, over the tokens that are routed to each: some may see few, or none.

So each also counts tokens that are its block's average, as a prior: PRIOR_TOKENS of the inputs,
where all experts read the same features (elsewhere, and of gradients, only the energy is averaged,
the same in every direction), and one of the gradients.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from calr.integrations.experts import INNER
from calr.model import Layer, Structure
from calr.storage import Store

PRIOR_TOKENS = 128  # of the average, beside an expert's own


def tokens_of(name: str) -> str:
    """Name the number of tokens that a layer's statistics are over."""
    return f"{name}.tokens"


def zeros(model: nn.Module, layers: Iterable[Layer], outputs: bool | None) -> dict[str, Tensor]:
    """Begin the sums of experts' layers, to which perhaps no token adds.

    outputs: of gradients, and whether with their second moments; None: of the inputs.
    """
    found: dict[str, Tensor] = {}
    for layer in layers:
        if layer.routed:
            device = model.get_submodule(layer.name).get_parameter("weight").device
            found[tokens_of(layer.name)] = torch.zeros((), dtype=torch.float64, device=device)
            if outputs is None:
                side = layer.in_features
                found[layer.name] = torch.zeros(side, side, device=device)
            else:
                found[f"{layer.name}.gradient"] = torch.zeros(layer.out_features, device=device)
            if outputs:
                side = min(layer.in_features, layer.out_features)
                found[f"{layer.name}.output"] = torch.zeros(side, side, device=device)
    return found


def rarely_chosen(store: Store, structure: Structure) -> list[str]:
    """Name the experts' layers that fewer tokens reached than they count of their block's average.

    Of the blocks of which a store has the input moments.
    """
    return [
        layer.name
        for layer in structure.layers
        if layer.routed
        and (name := f"inputs-{layer.block:04d}") in store
        and store.read(name, tokens_of(layer.name)) < 2 * PRIOR_TOKENS
    ]


def with_average_inputs(sums: dict[str, Tensor], layers: Iterable[Layer]) -> None:
    """Add PRIOR_TOKENS of its block's average to the second moment of each expert's inputs."""
    for members in _stacks(layers):
        count = torch.stack([sums[tokens_of(layer.name)] for layer in members]).sum()
        average = torch.zeros_like(sums[members[0].name])
        for layer in members:
            average += sums[layer.name] / count
        if members[0].stack.endswith(INNER):
            average = average.diagonal().mean() * torch.eye(len(average), device=average.device)
        for layer in members:
            sums[layer.name].add_(average, alpha=PRIOR_TOKENS)
            sums[tokens_of(layer.name)] += PRIOR_TOKENS


def with_average_gradients(sums: dict[str, Tensor], layers: Iterable[Layer]) -> None:
    """Add one token of its block's average energy to the gradients of each expert's outputs."""
    for members in _stacks(layers):
        count = torch.stack([sums[tokens_of(layer.name)] for layer in members]).sum()
        for kind in ("gradient", "output"):
            known = [sums.get(f"{layer.name}.{kind}") for layer in members]
            found = [
                tensor if tensor.dim() == 1 else tensor.diagonal()
                for tensor in known
                if tensor is not None
            ]
            energy = sum(tensor.mean() for tensor in found) / count
            for tensor in found:
                tensor += energy


def _stacks(layers: Iterable[Layer]) -> list[list[Layer]]:
    """List the experts' layers of each kind."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.routed:
            found.setdefault(layer.stack, []).append(layer)
    return list(found.values())
