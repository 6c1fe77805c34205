"""A decoder's blocks on the native kernel, and what lies between their linear layers.

Callers ask `calr_kernels.eligible` first; all tensors are on the CPU and of one type in TYPES.
"""

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calr_kernels.layout import Factors, Records
from calr_kernels.native.linears import Binding
from calr_kernels.native.loader import TYPES, Block, Layer, Past, pointer, required


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Compute weight * x / sqrt(mean(x²) + epsilon) over the last dimension, in float32.

    x [..., K] and weight [K], contiguous. What is multiplied by the weight is rounded to their type
    first, as the norms of transformers' Llama family do.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    k = x.shape[-1]
    required().calr_rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        x.numel() // k,
        k,
        epsilon,
        TYPES[x.dtype],
        torch.get_num_threads(),
    )
    return y


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Turn heads by rotary position embeddings, in place: x * cos + (-second, first half) * sin.

    x [B, heads, d], contiguous, and cosines and sines [B or 1, 1, d]. Products and sum round to
    their type, as in transformers.
    """
    b, heads, d = x.shape
    cosines, sines = cosines.contiguous(), sines.contiguous()
    required().calr_rotate(
        x.data_ptr(),
        cosines.data_ptr(),
        sines.data_ptr(),
        b,
        heads,
        d,
        d if cosines.shape[0] > 1 else 0,
        TYPES[x.dtype],
    )


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Compute softmax(scale q keys') values for one query a head, in float32.

    q [B, heads, d], keys and values [B, key heads, count, d], heads a multiple of key heads ->
    [B, heads, d]. Raises ValueError for what does not fit.
    """
    b, heads, count, d = keys.shape
    shapes = keys.shape == values.shape and q.shape == (b, q.shape[1] // heads * heads, d)
    kinds = {(t.dtype, t.device.type) for t in (q, keys, values)}
    if not shapes or kinds != {(q.dtype, "cpu")}:
        described = [f"{list(t.shape)} {t.dtype} on {t.device}" for t in (q, keys, values)]
        raise ValueError(f"keys and values do not fit the queries: {described}")
    q, keys, values = q.contiguous(), keys.contiguous(), values.contiguous()
    y = torch.empty_like(q)
    required().calr_attend(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        y.data_ptr(),
        b,
        heads,
        q.shape[1] // heads,
        count,
        d,
        scale,
        TYPES[q.dtype],
        torch.get_num_threads(),
    )
    return y


class BlockParts(NamedTuple):
    """One block of a decoder: what struct calr_block of csrc/calr.h holds, as tensors.

    norms: before and after attention, before and after the feed-forward block, [hidden_size] or
    None. attention: q, k, v and o; gated: gate, up and down. rotation: which of the rotations that
    a call names, or -1. window: positions seen, 0 for all.
    """

    norms: tuple[Tensor | None, ...]
    q_norm: Tensor | None
    k_norm: Tensor | None
    attention: tuple[Factors | Records, ...]
    gated: tuple[Factors | Records, ...]
    heads: int
    key_heads: int
    d: int
    window: int
    rotation: int
    activation: int
    from_one: bool
    epsilon: float
    scale: float


class Pasts:
    """What blocks have seen, as the kernel takes it. A token changes nothing but the lengths.

    left: tokens that there is room for. Whoever decodes keeps the tensors alive and in place.
    """

    def __init__(
        self,
        parts: Sequence[BlockParts],
        kind: tuple[int, torch.dtype],
        pasts: Sequence[tuple[Tensor, Tensor, int, int]],
    ) -> None:
        self.array: Any = (Past * len(parts))()
        self.kind, self.left = kind, sys.maxsize
        for past, own, part in zip(self.array, pasts, parts, strict=True):
            keys, values, count, dropped = own
            wanted = (kind[0], part.key_heads, keys.shape[2], part.d)
            for held in (keys, values):
                if held.shape != wanted or held.dtype is not kind[1] or not held.is_contiguous():
                    described = f"{list(held.shape)} {held.dtype}"
                    raise ValueError(f"a past of {described} does not fit {wanted} {kind[1]}")
            past.keys, past.values, past.capacity = keys.data_ptr(), values.data_ptr(), wanted[2]
            past.count, past.dropped = count, dropped
            self.left = min(self.left, past.capacity - count if count >= 0 else 0)
        fields = np.frombuffer(memoryview(self.array), np.int64).reshape(
            -1, ctypes.sizeof(Past) // 8
        )
        self._counts = fields[:, Past.count.offset // 8]

    def advance(self) -> None:
        """Count the token that was decoded."""
        self._counts += 1
        self.left -= 1


class Blocks:
    """Blocks of a decoder, bound to the kernel. They must be kept alive and unchanged.

    norm [hidden_size]: the weight of a norm behind the last block, of its norms' form, or None.
    windows: of every block; plain: whether a layer of a feed-forward block is not quantised.
    """

    def __init__(self, blocks: Sequence[BlockParts], norm: Tensor | None = None) -> None:
        self.parts, self.norm = blocks, norm
        self.windows = [part.window for part in blocks]
        self.plain = any(isinstance(layer, Factors) for part in blocks for layer in part.gated)
        self._bindings = [Binding([*block.attention, *block.gated]) for block in blocks]
        described = map(self._describe, blocks, self._bindings)
        self._array = (Block * len(blocks))(*described)

    @staticmethod
    def _describe(parts: BlockParts, binding: Binding) -> Block:
        numbers = parts._asdict()
        for name in ("norms", "q_norm", "k_norm", "attention", "gated"):
            del numbers[name]
        return Block(
            norms=(ctypes.c_void_p * 4)(*map(pointer, parts.norms)),
            q_norm=pointer(parts.q_norm),
            k_norm=pointer(parts.k_norm),
            attention=(Layer * 4)(*binding.layers[:4]),
            gated=(Layer * 3)(*binding.layers[4:]),
            **numbers,
        )

    def pasts(self, x: Tensor, pasts: Sequence[tuple[Tensor, Tensor, int, int]]) -> Pasts:
        """Describe the pasts of x's sequences, x [B, hidden_size].

        Of each block: keys and values [B, key heads, capacity, d], contiguous, of x's dtype, how
        many positions they hold, and how many earlier ones they hold no longer. Raises ValueError
        for what does not fit.
        """
        return Pasts(self.parts, (len(x), x.dtype), pasts)

    def decode(
        self,
        x: Tensor,
        pasts: Pasts,
        rotations: Sequence[tuple[Tensor, Tensor]],
        starts: Tensor | None = None,
        head: Binding | None = None,
    ) -> Tensor:
        """Send one token of each sequence, x [B, hidden_size], through all: the last hidden states.

        They are x's memory. With a head, one bound layer of as many inputs, its outputs [B, N].

        Its keys and values are written behind the pasts', which do not count them yet. rotations:
        cosines and sines, [B, d] or [1, d] each. starts [B] int64: the first position that a
        sequence sees. Everything is contiguous, on the CPU, of x's dtype. Raises ValueError for
        what does not fit, pasts without room among it.
        """
        b, hidden_size = x.shape
        self._check(x, rotations)
        if pasts.kind != (b, x.dtype):
            raise ValueError(f"pasts of {pasts.kind}: do not fit {b} sequences in {x.dtype}")
        if head is not None and (head.inputs != [hidden_size] or not self.parts):
            raise ValueError(f"a head of {head.inputs} inputs: does not follow {hidden_size}")
        if pasts.left < 1:
            raise ValueError("pasts: have no room for another token")
        shared = all(len(cosines) == 1 for cosines, _ in rotations)
        logits = None if head is None else x.new_empty(b, head.outputs[0])
        required().calr_decode(
            x.data_ptr(),
            self._array,
            pasts.array,
            len(self.parts),
            pointer(self.norm),
            None if head is None else head.layers,
            pointer(logits),
            _addresses([cosines for cosines, _ in rotations]),
            _addresses([sines for _, sines in rotations]),
            shared,
            pointer(starts),
            b,
            hidden_size,
            TYPES[x.dtype],
            torch.get_num_threads(),
        )
        return x if logits is None else logits

    def _check(self, x: Tensor, rotations: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Raise ValueError for x or rotations that are not of the blocks' sizes."""
        if not self.parts:
            return
        first = self.parts[0]
        rows = {len(turn) for both in rotations for turn in both}
        if (
            x.shape[1] != first.norms[0].shape[0]  # type: ignore[union-attr]
            or len(rotations) <= max(part.rotation for part in self.parts)
            or rows not in ({1}, {len(x)}, set())
            or any(
                turn.shape[1:] != (first.d,) or turn.dtype is not x.dtype
                for both in rotations
                for turn in both
            )
        ):
            turns = [list(turn.shape) for both in rotations for turn in both]
            raise ValueError(f"x {list(x.shape)}, rotations {turns}: do not fit the blocks")


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
