"""Second moments of the loss's gradients at the outputs: one backward pass, block by block."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from calr import parallel
from calr.errors import CalrError
from calr.model import BlockRunner, Layer, Structure, hooked, require_finite, requiring, resident
from calr.progress import give_back, progress
from calr.statistics.folded import folded
from calr.statistics.inputs import HELD_BYTES
from calr.statistics.routed import tokens_of, with_average_gradients, zeros
from calr.storage import Store
from calr.text import draw

VOCABULARY = "vocabulary"  # the file of what is known of embeddings and lm_head
LOGITS = 1 << 24  # numbers of logits held at once
PHASE = "gradients"


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
    [N]. With outputs, "<layer>.output", folded: E[g gᵀ] [N, N] where N <= K, else E[Wᵀg (Wᵀg)ᵀ].
    "vocabulary": see `_watch_vocabulary`. The pass back runs each block again, from the inputs that
    were kept of it (Chen et al., arXiv 1604.06174), so that one block's activations are in memory;
    those inputs, windows × tokens × hidden numbers a block, are in files where they are many.
    """
    names = [gradients_name(store, block, outputs) for block in range(structure.blocks)]
    if parallel.agree(all(name in store for name in [*names, VOCABULARY])):
        return
    parallel.require(len(ids), "gradient_samples")
    runner = BlockRunner(model, structure, parallel.mine(ids), ids.shape[1])
    count = sum(hidden.nbytes for hidden in runner.hidden) * structure.blocks
    vocabulary: dict[str, Tensor] = {}
    with (
        store.scratch("backward") as files,
        requiring(model, []),
        hooked(_watch_vocabulary(vocabulary, model)),
    ):
        kept = files if count > HELD_BYTES else Store()
        draw = torch.Generator().manual_seed(seed)
        uniform = [torch.rand(ids.shape[1], 1, generator=draw) for _ in ids]
        gradients = _to_the_end(runner, kept, vocabulary, parallel.mine(uniform))
        for block in progress(reversed(range(structure.blocks)), desc=PHASE, unit="block"):
            layers, inputs = structure.in_block(block), kept.load(f"{block:04d}")
            sums, gradients = _of_block(runner, layers, block, inputs, gradients, outputs)
            if parallel.first():
                store.save(names[block], folded({n: s / ids.numel() for n, s in sums.items()}))
            del sums
            give_back()
        with torch.enable_grad(), resident(*runner.around):
            for batch, gradient in enumerate(gradients):
                runner.embedded(batch).backward(gradient)
    parallel.add_up(vocabulary[name] for name in sorted(vocabulary))
    for name, found in vocabulary.items():
        require_finite(found, f"embeddings and lm_head: the sums of their {name}", model.dtype)
    if parallel.first():
        store.save(VOCABULARY, {name: s / ids.numel() for name, s in vocabulary.items()})
    parallel.wait()


def _of_block(
    runner: BlockRunner,
    layers: list[Layer],
    block: int,
    inputs: dict[str, Tensor],
    gradients: list[Tensor],
    outputs: bool,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Go back through a block; return its layers' sums, and the gradients before it."""
    sums = zeros(runner.model, layers, outputs)
    hooks = [
        runner.model.get_submodule(layer.name).register_forward_hook(_watch(sums, layer, outputs))
        for layer in layers
    ]
    with hooked(hooks), resident(runner.blocks[block]):
        gradients = _back(runner, block, inputs, gradients)
    parallel.add_up(sums[name] for name in sorted(sums))
    with_average_gradients(sums, layers)
    for layer in layers:
        _require_gradient(sums, layer, runner.model)
        sums.pop(tokens_of(layer.name), None)  # the inputs' are kept
    return sums, gradients


def _to_the_end(
    runner: BlockRunner, kept: Store, vocabulary: dict[str, Tensor], uniform: list[Tensor]
) -> list[Tensor]:
    """Run all blocks, keeping their inputs; return the loss's gradients [1, T, H] behind the last,
    a window at a time, and add up what is known of the logits. uniform [T, 1]: of every window."""
    hidden = runner.hidden
    for block in progress(range(len(runner.blocks)), desc="forward", unit="block", phase=PHASE):
        kept.save(f"{block:04d}", {f"{i:04d}": x for i, x in enumerate(hidden)})
        hidden = runner.run(block, hidden)
    windows = list(zip(hidden, uniform, strict=True))
    with resident(*runner.around):
        return [
            _loss_gradient(runner, x, drawn, vocabulary)
            for x, drawn in progress(windows, desc="loss", unit="window", phase=PHASE)
        ]


@torch.enable_grad()
def _loss_gradient(
    runner: BlockRunner, hidden: Tensor, uniform: Tensor, vocabulary: dict[str, Tensor]
) -> Tensor:
    """Return the gradient of one window's loss with respect to hidden [1, T, H].

    The logits of some positions at a time; uniform [T, 1]: numbers by which labels are drawn.
    """
    embeddings: Any = runner.model.get_input_embeddings()
    positions = max(1, LOGITS // int(embeddings.num_embeddings))
    found = []
    parts = zip(hidden.split(positions, 1), uniform.split(positions), strict=True)
    for part, drawn in parts:
        x = part.detach().requires_grad_()
        logits = runner.logits(x)[0].float()
        p = logits.detach().softmax(-1)
        labels = draw(p, drawn)
        _add(vocabulary, "outputs", (p * (1 - p)).sum(0))
        del p
        found.append(torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), x)[0])
    return torch.cat(found, 1)


@torch.enable_grad()
def _back(
    runner: BlockRunner, block: int, inputs: dict[str, Tensor], gradients: list[Tensor]
) -> list[Tensor]:
    """Return the gradients with respect to a block's inputs [1, T, H], from those behind it."""
    found = []
    for batch, (name, gradient) in enumerate(zip(sorted(inputs), gradients, strict=True)):
        x = inputs[name].to(runner.device).requires_grad_()
        runner.run_one(block, batch, x).backward(gradient)
        assert x.grad is not None
        found.append(x.grad)
    return found


def _require_gradient(sums: dict[str, Tensor], layer: Layer, model: PreTrainedModel) -> None:
    if f"{layer.name}.gradient" not in sums:
        raise CalrError(
            f"{layer.name}: the loss has no gradient with respect to its outputs; leave it out "
            "(skip), or use sensitivity=none with another method"
        )
    require_finite(sums[f"{layer.name}.gradient"], f"{layer.name}: its gradients", model.dtype)


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
            if layer.routed:
                sums[tokens_of(layer.name)] += len(g)
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
