"""Tensors by number, in bounded memory."""

import torch
from torch import Tensor

from calr.storage.store import Store


class Spilled:
    """Tensors in memory up to a limit of bytes, and in a store beyond it; all of one device."""

    def __init__(self, store: Store, limit: int) -> None:
        self._store, self._limit = store, limit
        self._held: list[Tensor | None] = []
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, number: int) -> Tensor:
        held = self._held[number]
        if held is None:
            return self._store.read(f"{number:04d}", "values").to(self._device)
        return held

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        self._held[number], self._device = None, tensor.device
        held = sum(there.nbytes for there in self._held if there is not None)
        if held + tensor.nbytes <= self._limit:
            self._held[number] = tensor
        else:
            self._store.save(f"{number:04d}", {"values": tensor})

    def append(self, tensor: Tensor) -> None:
        """Add a tensor behind the others."""
        self._held.append(None)
        self[len(self) - 1] = tensor
