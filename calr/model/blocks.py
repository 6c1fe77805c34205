"""Run a decoder block by block, each block with exactly the arguments that the model gives it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from calr.model.absent import resident
from calr.model.structure import Structure, decoder, find_blocks
from calr.model.swapping import hooked

BATCH_TOKENS = 4096  # enough rows for matrix products to run at full speed


@dataclass
class Call:
    """The arguments of one block for one batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Batches(Protocol):
    """Hidden states [B, T, H] by batch: a list, or what holds less in memory."""

    def __len__(self) -> int: ...
    def __getitem__(self, batch: int, /) -> Tensor: ...
    def __setitem__(self, batch: int, hidden: Tensor, /) -> None: ...
    def append(self, hidden: Tensor, /) -> None:
        """Add the next batch's."""


class BlockRunner:
    """The blocks of a model over a fixed set of token windows.

    ids [S, T]. The inputs [B, T, H] of block 0 are, batch by batch, in `hidden`, or where `first`
    says. Masks, positions and whatever else the model passes to each block are recorded once, in a
    pass in which the blocks themselves do nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        structure: Structure,
        ids: Tensor,
        batch_tokens: int = BATCH_TOKENS,
        first: Batches | None = None,
    ) -> None:
        self.model = model
        self.blocks = list(model.get_submodule(structure.blocks_name).children())
        inside = {id(module) for block in self.blocks for module in block.modules()}
        self.around = [
            module
            for module in model.modules()
            if id(module) not in inside and not any(id(m) in inside for m in module.modules())
        ]
        self.tuple_output = structure.tuple_output
        self.device = next(self.blocks[0].parameters()).device
        self.batches = ids.split(max(1, batch_tokens // ids.shape[1]))
        self.hidden: list[Tensor] = []
        self._calls: list[list[Call]] = []
        for batch in self.batches:
            with torch.no_grad():
                hidden, calls = self._begun(batch)
            (self.hidden if first is None else first).append(hidden)
            self._calls.append(calls)

    @torch.no_grad()
    def run(self, block: int, hidden: list[Tensor]) -> list[Tensor]:
        """Run one block on every batch: inputs [B, T, H] each -> outputs [B, T, H] each."""
        with resident(self.blocks[block]):
            return [self.run_one(block, batch, x) for batch, x in enumerate(hidden)]

    @torch.no_grad()
    def advance(self, block: int, hidden: Batches) -> None:
        """Put a block's outputs in the place of its inputs, batch by batch."""
        with resident(self.blocks[block]):
            for batch in range(len(hidden)):
                hidden[batch] = self.run_one(block, batch, hidden[batch])

    def run_one(self, block: int, batch: int, hidden: Tensor) -> Tensor:
        """Run one block on one batch [B, T, H], with gradients where they are enabled."""
        call = self._calls[batch][block]
        output = self.blocks[block](hidden, *call.args, **call.kwargs)
        return cast(Tensor, output[0] if self.tuple_output else output)

    def embedded(self, batch: int) -> Tensor:
        """Return the inputs [B, T, H] of block 0, with gradients where they are enabled."""
        return self._begun(self.batches[batch])[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [B, t, V] that the model makes of what its last block gives.

        hidden [B, t, H]: of any positions, since what follows the blocks looks at each alone.
        """
        return _logits(self.model, self.blocks, self.tuple_output, hidden)

    def _begun(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """Return the inputs of block 0, and the other arguments of every block."""
        first: list[Tensor] = []
        calls: list[Call] = []

        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            first.append(hidden_states)
            calls.append(Call(args, kwargs))
            return (hidden_states,) if self.tuple_output else hidden_states

        with self._replaced(record):
            decoder(self.model)(input_ids=ids.to(self.device), use_cache=False)
        return first[0], calls

    def _replaced(self, forward: Callable[..., Any]) -> AbstractContextManager[None]:
        return _forwards(self.blocks, [forward] * len(self.blocks))


def behind_blocks(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Run a model's blocks on ids [S, T]; with gradients where they are enabled.

    Returns what the last gives [S, T, H], and what makes logits [B, t, V] of that, of any positions
    [B, t, H].
    """
    found: list[Any] = []
    blocks = list(find_blocks(model)[1])
    with hooked([blocks[-1].register_forward_hook(lambda m, args, out: found.append(out))]):
        decoder(model)(input_ids=ids.to(model.device), use_cache=False)
    whole = isinstance(found[0], tuple)
    return found[0][0] if whole else found[0], partial(_logits, model, blocks, whole)


def _logits(
    model: PreTrainedModel, blocks: list[nn.Module], tuple_output: bool, hidden: Tensor
) -> Tensor:
    output = (hidden,) if tuple_output else hidden
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    with _forwards(blocks, [lambda *args, **kwargs: output] * len(blocks)):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@contextmanager
def checkpointing(blocks: list[nn.Module]) -> Iterator[None]:
    """Keep only the blocks' inputs for the backward pass, which runs each block again.

    For a third more time, memory for activations falls to about one block's (Chen et al., arXiv
    1604.06174). Unlike transformers' own switch it does not need the model in training mode.
    """
    again = [partial(checkpoint, block.forward, use_reentrant=False) for block in blocks]
    with _forwards(blocks, again):
        yield


@contextmanager
def _forwards(blocks: list[nn.Module], forwards: Iterable[Callable[..., Any]]) -> Iterator[None]:
    """Give blocks other forward functions for a while."""
    saved = [block.__dict__.get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block, before in zip(blocks, saved, strict=True):
            del block.forward
            if before is not None:
                block.forward = before
