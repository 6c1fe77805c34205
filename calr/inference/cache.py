"""A cache of keys and values that grows in place: a token is appended, nothing else is copied."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LEAST, GROWTH = 64, 1.5  # positions of room; times what is needed


class Steps:
    """Positions that all layers of a cache took at once; how often one was changed by itself."""

    def __init__(self) -> None:
        self.count, self.changes = 0, 0


class _Buffer:
    """Keys or values [B, heads, capacity, d], of which the first `length` positions are in use."""

    def __init__(self, steps: Steps) -> None:
        self.tensor: Tensor | None = None
        self.steps, self._own = steps, 0  # length: the own part of it, and the steps
        self.least = LEAST  # positions that room is made for
        self._capacity = 0  # positions that fit, 0 where what is held is not contiguous

    @property
    def length(self) -> int:
        """How many positions are in use."""
        return self._own + self.steps.count

    @length.setter
    def length(self, length: int) -> None:
        self._own = length - self.steps.count
        self.steps.changes += 1

    def share(self, steps: Steps) -> None:
        """Count other steps from now on."""
        length = self.length
        self.steps.changes += 1
        self.steps, self.length = steps, length

    def get(self, skipped: int = 0) -> Tensor | None:
        """Return what is in use but for the first positions, a view."""
        if self.tensor is None:
            return None
        return self.tensor.narrow(-2, skipped, self.length - skipped)

    def set(self, tensor: Tensor | None) -> None:
        """Take a tensor in place of what is held; its room stays if it is the beginning of that."""
        own = self.tensor
        same = (
            own is not None
            and tensor is not None
            and tensor.data_ptr() == own.data_ptr()
            and tensor.stride() == own.stride()
            and tensor.shape[:-2] == own.shape[:-2]
            and tensor.shape[-2] <= own.shape[-2]
        )
        if not same:
            self._hold(tensor)
        self.length = 0 if tensor is None else tensor.shape[-2]

    def reserve(self, more: int) -> Tensor:
        """Make room for more positions; return all that is held, contiguous.

        In a copy where that must not be written to: autograd may need it as it is, and inference
        tensors cannot be outside of inference mode.
        """
        own, needed = self.tensor, self.length + more
        assert own is not None
        outside = own.is_inference() and not torch.is_inference_mode_enabled()
        kept = torch.is_grad_enabled() or outside
        if kept or needed > self._capacity:
            fits = needed <= self._capacity
            room = self._capacity if fits else max(self.least, int(GROWTH * needed))
            grown = own.new_empty(*own.shape[:-2], room, own.shape[-1])
            grown.narrow(-2, 0, self.length).copy_(own.narrow(-2, 0, self.length))
            self._hold(grown)
            return grown
        return own

    def _hold(self, tensor: Tensor | None) -> None:
        self.tensor, self._capacity = tensor, 0
        self.steps.changes += 1
        if tensor is not None and tensor.is_contiguous():
            self._capacity = tensor.shape[-2]


class _Growing:
    """What both kinds of growing layers share: `keys` and `values` are views of what has room.

    Everything that reads or replaces them (crop, beam search, batch selection) works on the views.
    """

    is_initialized: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        steps = Steps()
        self._keys, self._values = _Buffer(steps), _Buffer(steps)
        super().__init__(*args, **kwargs)

    @property
    def steps(self) -> Steps:
        """What it takes with the other layers of its cache."""
        return self._keys.steps

    def share(self, steps: Steps) -> None:
        """Take steps with other layers from now on."""
        for buffer in (self._keys, self._values):
            buffer.share(steps)

    @property
    def keys(self) -> Tensor | None:
        """[B, heads, positions, d], or None before anything came."""
        return self._keys.get(self._hidden(self._keys.length))

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._keys.set(tensor)

    @property
    def values(self) -> Tensor | None:
        """As keys."""
        return self._values.get(self._hidden(self._values.length))

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._values.set(tensor)

    @property
    def held(self) -> int:
        """How many positions are held."""
        return self._keys.length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start empty, of these shapes, dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    def expect(self, positions: int) -> None:
        """Make room for so many positions at once, when room is made."""
        self._keys.least = self._values.least = positions

    def room(self, more: int) -> tuple[Tensor, Tensor]:
        """Return keys and values with room for more positions, [B, heads, capacity, d]."""
        return self._keys.reserve(more), self._values.reserve(more)

    def advance(self, new: int) -> None:
        """Count positions that were written behind the last ones."""
        self._keys.length += new
        self._values.length += new

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Write keys and values [B, heads, new, d] behind the last ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        for room, states in zip(self.room(new), (key_states, value_states), strict=True):
            room.narrow(-2, self.held, new).copy_(states)
        self.advance(new)

    def _take(self, layer: DynamicLayer) -> None:
        """Hold what a layer of transformers does."""
        keys, values = layer.keys, layer.values
        if layer.is_initialized and keys is not None and values is not None and keys.dim() == 4:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def _hidden(self, held: int) -> int:
        """Count the positions held that nobody sees any more."""
        return 0


class GrowingLayer(_Growing, DynamicLayer):
    """transformers' DynamicLayer, which appends instead of copying."""

    window = 0

    @classmethod
    def of(cls, layer: DynamicLayer) -> "GrowingLayer":
        """Make one that holds what a DynamicLayer does."""
        made = cls()
        made._take(layer)
        return made

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, heads, new, d]; return all of them."""
        self._append(key_states, value_states)
        return self.keys, self.values  # type: ignore[return-value]

    def get_seq_length(self) -> int:
        """Return how many positions are held."""
        return self.held


class GrowingSlidingLayer(_Growing, DynamicSlidingWindowLayer):
    """transformers' DynamicSlidingWindowLayer, which appends instead of copying.

    It holds some positions more than its window; `keys` and `values` are the last of them.
    """

    @classmethod
    def of(cls, layer: DynamicSlidingWindowLayer) -> "GrowingSlidingLayer":
        """Make one that holds what a DynamicSlidingWindowLayer does."""
        made = cls(sliding_window=layer.sliding_window)
        made._take(layer)
        made.cumulative_length, made.record_past = layer.cumulative_length, layer.record_past
        return made

    @property
    def window(self) -> int:
        """How many positions a token sees, itself included."""
        return int(self.sliding_window)

    @property
    def cumulative_length(self) -> int:
        """How many positions there were, those among them that are held no longer."""
        return self._past + self.steps.count

    @cumulative_length.setter
    def cumulative_length(self, length: int) -> None:
        self._past = length - self.steps.count
        self.steps.changes += 1

    def share(self, steps: Steps) -> None:
        """Take steps with other layers from now on."""
        length = self.cumulative_length
        super().share(steps)
        self.cumulative_length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, heads, new, d]; return those that any of the new ones sees."""
        before = min(self.held, self.window - 1)
        self._append(key_states, value_states)
        seen = before + key_states.shape[-2]
        hidden = self.held - seen
        return self._keys.get(hidden), self._values.get(hidden)  # type: ignore[return-value]

    def room(self, more: int) -> tuple[Tensor, Tensor]:
        """Return keys and values with room for more positions; let those go that nobody sees."""
        buffer, hidden = self._keys.tensor, self._hidden(self.held)
        if hidden and buffer is not None and self.held + more > buffer.shape[-2]:
            self.keys, self.values = self.keys, self.values
        return super().room(more)

    def advance(self, new: int) -> None:
        """Count positions that were written behind the last ones."""
        super().advance(new)
        self.cumulative_length += new

    def _hidden(self, held: int) -> int:
        return 0 if self.record_past else max(0, held - self.window + 1)


GROWING: dict[type, Any] = {
    DynamicLayer: GrowingLayer,
    DynamicSlidingWindowLayer: GrowingSlidingLayer,
}
GROWN = set(GROWING.values())


def grow(layers: list[Any]) -> bool:
    """Replace the layers of a cache by ones that grow in place; tell whether all of them do."""
    if not set(map(type, layers)) <= GROWN:
        for i, layer in enumerate(layers):
            if type(layer) in GROWING:
                layers[i] = GROWING[type(layer)].of(layer)
    return set(map(type, layers)) <= GROWN


def together(layers: list[Any]) -> Steps | None:
    """Have the layers of a cache grow in place and take steps at once: the steps.

    None where a layer does not grow, or not all hold as many positions, or none.
    """
    if not grow(layers):
        return None
    lengths = {layer.get_seq_length() for layer in layers}
    if len(lengths) != 1 or lengths == {0}:
        return None
    steps = Steps()
    for layer in layers:
        layer.share(steps)
    return steps
