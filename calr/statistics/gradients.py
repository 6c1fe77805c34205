"""Second moments of the loss's gradients at the outputs: one backward pass a window."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from calr.errors import CalrError
from calr.model import Layer, Structure, hooked, require_finite, requiring
from calr.progress import progress
from calr.storage import Store

VOCABULARY = "vocabulary"  # the file of what is known of embeddings and lm_head


def gradient_moments(
    model: PreTrainedModel,
    structure: Structure,
    ids: Tensor,
    store: Store,
    *,
    outputs: bool,
    seed: int,
) -> None:
    """Save gradient statistics at the outputs of every layer, block by block, and of the tokens.

    g is the gradient, with respect to y = Wx, of the loss summed over tokens, with labels sampled
    from the model's own distribution (the true Fisher). "<layer>.gradient": mean of g² over tokens
    [N]. With outputs, "<layer>.output": E[g gᵀ] [N, N] where N <= K, else E[Wᵀg (Wᵀg)ᵀ] [K, K].
    "vocabulary": see `_watch_vocabulary`.
    """
    names = [gradients_name(store, block, outputs) for block in range(structure.blocks)]
    if all(name in store for name in [*names, VOCABULARY]):
        return
    sums: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(layer.name).register_forward_hook(_watch(sums, layer, outputs))
        for layer in structure.layers
    ]
    vocabulary: dict[str, Tensor] = {}
    hooks += _watch_vocabulary(vocabulary, model)
    generator = torch.Generator().manual_seed(seed)
    with hooked(hooks), requiring(model, []), torch.enable_grad():
        for window in progress(ids.split(1), desc="gradients", unit="window"):
            window = window.to(model.device)
            logits = model(input_ids=window, use_cache=False).logits[0].float()
            labels = _sample(logits.detach(), generator)
            p = logits.detach().softmax(-1)
            _add(vocabulary, "outputs", (p * (1 - p)).sum(0))
            cross_entropy(logits, labels, reduction="sum").backward()
    for layer in structure.layers:
        if f"{layer.name}.gradient" not in sums:
            raise CalrError(
                f"{layer.name}: the loss has no gradient with respect to its outputs; leave it out "
                "(skip), or use sensitivity=none with another method"
            )
        require_finite(sums[f"{layer.name}.gradient"], f"{layer.name}: its gradients", model.dtype)
    for block in range(structure.blocks):
        prefix = f"{structure.blocks_name}.{block}."
        chosen = {name: s / ids.numel() for name, s in sums.items() if name.startswith(prefix)}
        store.save(names[block], chosen)
    store.save(VOCABULARY, {name: s / ids.numel() for name, s in vocabulary.items()})


def gradients_name(store: Store, block: int, outputs: bool) -> str:
    """Name the gradient statistics of a block; those with output moments serve both needs."""
    full = f"curvature-{block:04d}"
    return full if outputs or full in store else f"gradients-{block:04d}"


def _watch(
    sums: dict[str, Tensor], layer: Layer, outputs: bool
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    """Add a layer's output gradients to the sums when they arrive."""

    def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        def receive(gradient: Tensor) -> None:
            g = gradient.reshape(-1, gradient.shape[-1]).float()  # [tokens, N]
            _add(sums, f"{layer.name}.gradient", g.square().sum(0))
            if outputs:
                if layer.out_features > layer.in_features:
                    g = g @ module.get_parameter("weight").detach().float()
                _add(sums, f"{layer.name}.output", g.mT @ g)

        y.register_hook(receive)

    return hook


def _watch_vocabulary(sums: dict[str, Tensor], model: PreTrainedModel) -> list[RemovableHandle]:
    """Add up what embeddings and lm_head are rounded and priced by.

    "inputs": E[g gᵀ] [d, d], g the gradient at the embeddings' outputs; "hidden": the second moment
    [d, d] of lm_head's inputs. Beside them "outputs" is E[p (1 - p)] [V], the curvature of the loss
    with respect to each logit.
    """

    def first(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        def receive(gradient: Tensor) -> None:
            g = gradient.reshape(-1, gradient.shape[-1]).float()
            _add(sums, "inputs", g.mT @ g)

        y = out.detach().requires_grad_()
        y.register_hook(receive)
        return y.clone()  # no leaf: it may be changed

    def last(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        _add(sums, "hidden", x.mT @ x)

    hooks = [model.get_input_embeddings().register_forward_hook(first)]
    head = model.get_output_embeddings()
    return hooks if head is None else [*hooks, head.register_forward_pre_hook(last)]


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one label per row [tokens, vocabulary] by inverting the cumulative distribution.

    The uniform numbers come from the CPU generator on every device.
    """
    uniform = torch.rand(logits.shape[0], 1, generator=generator).to(logits.device)
    cumulative = logits.softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).squeeze(1)
    return drawn.clamp(max=logits.shape[1] - 1)
