"""Calibration statistics: second moments of inputs, and of the loss's gradients at the outputs."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel
from transformers.utils import logging

from calr import __version__
from calr.blocks import BlockRunner
from calr.errors import CalrError
from calr.methods import Moments
from calr.store import Store, claim
from calr.structure import Layer, Structure
from calr_kernels import gram

logger = logging.get_logger(__name__)


class Statistics:
    """Moments of every layer, read from a store block by block."""

    def __init__(self, structure: Structure, store: Store, gradients: bool, outputs: bool) -> None:
        self.store, self._gradients, self._outputs = store, gradients, outputs
        self._block: tuple[int, dict[str, Tensor]] = (-1, {})

    def moments(self, layer: Layer) -> Moments:
        """Return the statistics collected for a layer."""
        if self._block[0] != layer.block:
            tensors = self.store.load(f"inputs-{layer.block:04d}")
            if self._gradients:
                tensors = tensors | self.store.load(
                    gradients_name(self.store, layer.block, self._outputs)
                )
            self._block = layer.block, tensors
        tensors = self._block[1]
        return Moments(
            input=tensors[layer.group],
            gradient=float(tensors[f"{layer.name}.gradient"]) if self._gradients else None,
            output=tensors[f"{layer.name}.output"] if self._outputs else None,
        )


def collect(
    model: PreTrainedModel,
    structure: Structure,
    ids: Tensor,
    store: Store,
    *,
    gradient_ids: Tensor | None = None,
    outputs: bool = False,
    seed: int = 0,
) -> Statistics:
    """Collect what is not in the store yet; ids [S, T], gradient_ids [S', T] for a backward pass.

    outputs: also the second moments of the gradients, not only their mean square. Holds the
    activations of one block boundary, S T H numbers, and one block's input moments; with gradients
    also min(N, K)² float32 numbers of every layer. Raises CalrError naming the layer where a
    weight, activation or gradient is not finite.
    """
    _warn_if_few(structure, ids)
    input_moments(model, structure, ids, store)
    if gradient_ids is not None:
        gradient_moments(model, structure, gradient_ids, store, outputs=outputs, seed=seed)
    return Statistics(structure, store, gradient_ids is not None, outputs)


@torch.no_grad()
def input_moments(model: PreTrainedModel, structure: Structure, ids: Tensor, store: Store) -> None:
    """Save E[x xᵀ] [K, K] float32 of every input group, block by block, as "inputs-<block>"."""
    if all(f"inputs-{block:04d}" in store for block in range(structure.blocks)):
        return
    runner = BlockRunner(model, structure, ids)
    hidden = runner.hidden
    for block in logging.tqdm(range(structure.blocks), desc="second moments", unit="block"):
        if f"inputs-{block:04d}" in store:
            hidden = runner.run(block, hidden)
            continue
        sums: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(group).register_forward_pre_hook(_accumulate(sums, group))
            for group in dict.fromkeys(layer.group for layer in structure.in_block(block))
        ]
        try:
            hidden = runner.run(block, hidden)
        finally:
            for handle in handles:
                handle.remove()
        moments = {group: total / ids.numel() for group, total in sums.items()}
        for group, moment in moments.items():
            _require_finite(moment, f"{group}: its calibration inputs")
        store.save(f"inputs-{block:04d}", moments)


def block_influence(model: PreTrainedModel, structure: Structure, ids: Tensor) -> Tensor:
    """Return BI = 1 - E[cos(block input, block output)] over all tokens, per block [L].

    ShortGPT's block influence (arXiv 2403.03853, equation 1); needs no backward pass.
    """
    runner = BlockRunner(model, structure, ids)
    hidden, found = runner.hidden, []
    for block in range(structure.blocks):
        after = runner.run(block, hidden)
        pairs = zip(hidden, after, strict=True)
        alike = [cosine_similarity(x.double(), y.double(), dim=-1).sum() for x, y in pairs]
        found.append(1 - torch.stack(alike).sum() / ids.numel())
        hidden = after
    return torch.stack(found).cpu()


def gradient_moments(
    model: PreTrainedModel,
    structure: Structure,
    ids: Tensor,
    store: Store,
    *,
    outputs: bool,
    seed: int,
) -> None:
    """Save gradient statistics at the outputs of every layer, block by block.

    g is the gradient, with respect to y = Wx, of the loss summed over tokens, with labels sampled
    from the model's own distribution (the true Fisher). "<layer>.gradient": mean of g² over tokens
    and outputs. With outputs, "<layer>.output": E[g gᵀ] [N, N] where N <= K, else
    E[Wᵀg (Wᵀg)ᵀ] [K, K].
    """
    names = [gradients_name(store, block, outputs) for block in range(structure.blocks)]
    if all(name in store for name in names):
        return
    sums: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(layer.name).register_forward_hook(_watch(sums, layer, outputs))
        for layer in structure.layers
    ]
    hooks.append(
        model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            for window in logging.tqdm(ids.split(1), desc="gradients", unit="window"):
                window = window.to(model.device)
                logits = model(input_ids=window, use_cache=False).logits[0].float()
                labels = _sample(logits.detach(), generator)
                cross_entropy(logits, labels, reduction="sum").backward()
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    for layer in structure.layers:
        sums[f"{layer.name}.gradient"] /= layer.out_features
        _require_finite(sums[f"{layer.name}.gradient"], f"{layer.name}: its gradients")
    for block in range(structure.blocks):
        prefix = f"{structure.blocks_name}.{block}."
        chosen = {name: s / ids.numel() for name, s in sums.items() if name.startswith(prefix)}
        store.save(names[block], chosen)


def gradients_name(store: Store, block: int, outputs: bool) -> str:
    """Name the gradient statistics of a block; those with output moments serve both needs."""
    full = f"curvature-{block:04d}"
    return full if outputs or full in store else f"gradients-{block:04d}"


def open_statistics(directory: str | Path | None, key: str) -> Store:
    """Open a directory of calibration statistics, refusing one that holds those of another run."""
    if directory is None:
        return Store()
    return claim(
        Path(directory),
        key,
        "holds statistics of another model, of other calibration windows or of another version; "
        "model, calibration, samples, gradient_samples, window, correction_tokens and seed must be "
        "the same; name another directory or delete it",
    )


def fingerprint(model: PreTrainedModel, *parts: Any) -> str:
    """Hash a model's configuration and weights, this version, and what prints faithfully."""
    digest = hashlib.sha256(__version__.encode() + model.config.to_json_string().encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        raw = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{list(part.shape)} {part.dtype}".encode() + part.numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def check_finite(model: nn.Module) -> None:
    """Raise CalrError naming the first parameter with a NaN or an infinity, or not in memory."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise CalrError(f"{name}: is not in memory; load the model without offloading")
        _require_finite(parameter.detach(), f"{name}: the values")


def _require_finite(tensor: Tensor, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise CalrError(f"{what} hold NaN or infinity; nothing was written. Check the checkpoint")


def _accumulate(
    sums: dict[str, Tensor], group: str
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])  # [tokens, K]
        sums[group] = gram(x, sums.get(group))

    return hook


def _watch(
    sums: dict[str, Tensor], layer: Layer, outputs: bool
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    """Add a layer's output gradients to the sums when they arrive."""

    def add(name: str, value: Tensor) -> None:
        if name in sums:
            sums[name] += value
        else:
            sums[name] = value

    def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        def receive(gradient: Tensor) -> None:
            g = gradient.reshape(-1, gradient.shape[-1]).float()  # [tokens, N]
            add(f"{layer.name}.gradient", g.square().sum())
            if outputs:
                if layer.out_features > layer.in_features:
                    g = g @ module.get_parameter("weight").detach().float()
                add(f"{layer.name}.output", g.mT @ g)

        y.register_hook(receive)

    return hook


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one label per row [tokens, vocabulary] by inverting the cumulative distribution.

    The uniform numbers come from the CPU generator on every device.
    """
    uniform = torch.rand(logits.shape[0], 1, generator=generator).to(logits.device)
    cumulative = logits.softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).squeeze(1)
    return drawn.clamp(max=logits.shape[1] - 1)


def _warn_if_few(structure: Structure, ids: Tensor) -> None:
    widest = max(structure.layers, key=lambda layer: layer.in_features)
    if ids.numel() < widest.in_features:
        logger.warning(
            f"{ids.numel()} calibration tokens are fewer than the {widest.in_features} inputs of "
            f"{widest.name}, so its second moment is singular; use at least "
            f"{4 * widest.in_features} tokens (raise samples or window)"
        )
