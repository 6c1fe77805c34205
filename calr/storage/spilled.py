"""Tensors by number, in bounded memory."""

from torch import Tensor

from calr.storage.store import Store


class Spilled:
    """Tensors in memory up to a limit of bytes, and in a store beyond it, until it is removed."""

    def __init__(self, store: Store, limit: int) -> None:
        self._store, self._limit = store, limit
        self._held: list[Tensor | None] = []
        self._like: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, number: int) -> Tensor:
        held = self._held[number]
        if held is None:
            return self._store.read(f"{number:04d}", "values").to(self._like[number].device)
        return held

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        self._held[number], self._like[number] = None, tensor.new_empty(0)
        held = sum(there.nbytes for there in self._held if there is not None)
        if held + tensor.nbytes <= self._limit:
            self._held[number] = tensor
        else:
            self._store.save(f"{number:04d}", {"values": tensor})

    def append(self, tensor: Tensor) -> None:
        """Add a tensor behind the others."""
        self._held.append(None)
        self._like.append(tensor)
        self[len(self) - 1] = tensor

    def remove(self) -> None:
        """Forget all of them."""
        self._held.clear()
        self._store.remove()
