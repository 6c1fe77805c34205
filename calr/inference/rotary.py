"""Cosines and sines of rotary position embeddings for the tokens of a generation."""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from calr_kernels import eligible

STATIC = {"default", "linear", "llama3", "yarn"}  # whose angles follow from the position alone
AHEAD = 32  # positions whose angles are computed at once


class Turns:
    """What a decoder's rotary embedding gives, of every kind of layers that has its own."""

    def __init__(self) -> None:
        # of what, the first position, and angles; replaced whole: threads may share a model
        self._held: tuple[Any, int, list[tuple[Tensor, Tensor]]] = (None, 0, [])

    def at(
        self, module: Any, x: Tensor, position_ids: Tensor | None, count: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return cosines and sines [B or 1, d] at positions [B or 1, 1], by default at `count`."""
        rotary = module.rotary_emb
        if position_ids is not None and position_ids.numel() > 1:
            return _turns(module, x, position_ids)
        position = count if position_ids is None else int(position_ids)
        if not _static(rotary):
            return _turns(module, x, torch.tensor([[position]], device="cpu"))
        state = (
            x.dtype,
            rotary,
            getattr(rotary, "attention_scaling", None),
            list(map(_state, rotary._buffers.values())),
        )
        of, first, turns = self._held
        if of != state or not first <= position < first + AHEAD:
            first, positions = position, torch.arange(position, position + AHEAD, device="cpu")
            turns = _turns(module, x, positions[None])
            self._held = state, first, turns
        i = position - first
        return [(cosines[i : i + 1], sines[i : i + 1]) for cosines, sines in turns]


def kinds(module: Any) -> list[tuple[str, ...]]:
    """List what a decoder's rotary embedding is called with: kinds of layers, where it has some."""
    rotary: Any = type(module.rotary_emb)
    if _takes_kinds(rotary):
        return [(kind,) for kind in sorted(set(module.config.layer_types))]
    return [()]


def _turns(module: Any, x: Tensor, position_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Ask the rotary embedding for all positions, [B, 1] or [1, T]: [B T, d]."""
    found = (module.rotary_emb(x, position_ids, *kind) for kind in kinds(module))
    return [(c.flatten(0, 1).contiguous(), s.flatten(0, 1).contiguous()) for c, s in found]


def _state(buffer: Tensor | None) -> tuple[int, int] | None:
    """Return where a buffer lies and how often it was written to, which inference tensors do not
    count."""
    if buffer is None:
        return None
    return buffer.data_ptr(), 0 if buffer.is_inference() else buffer._version


def _static(rotary: Any) -> bool:
    """Tell whether angles follow from the position alone, and nobody changes them."""
    stated = getattr(rotary, "rope_type", None)
    return (
        eligible.unhooked(rotary)
        and set(stated.values() if isinstance(stated, dict) else [stated]) <= STATIC
    )


@cache
def _takes_kinds(rotary: Any) -> bool:
    return "layer_type" in inspect.signature(rotary.forward).parameters
