"""Named sets of tensors that survive an interruption."""

import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


class Store:
    """Keep sets of tensors by name: in memory, or in a directory of safetensors files.

    Files are written under a temporary name, flushed to disk and renamed, so that one that exists
    is whole.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self._memory: dict[str, dict[str, Tensor]] = {}
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def __contains__(self, name: str) -> bool:
        if self.directory is None:
            return name in self._memory
        return self._path(name).exists()

    def load(self, name: str) -> dict[str, Tensor]:
        """Return the tensors saved under a name, on the CPU. Raises KeyError if there are none."""
        if name not in self:
            raise KeyError(name)
        return self._memory[name] if self.directory is None else load_file(self._path(name))

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Save tensors under a name, atomically, replacing what is there."""
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        if self.directory is None:
            self._memory[name] = tensors
            return
        temporary = self._path(name).with_suffix(f".{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.rename(self._path(name))
        finally:
            temporary.unlink(missing_ok=True)

    def within(self, name: str) -> "Store":
        """Open a store of other names inside of this one."""
        return Store(self.path(name))

    def path(self, name: str) -> Path | None:
        """Return a place inside of the directory; None in memory."""
        return None if self.directory is None else self.directory / name

    def _path(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{name}.safetensors"
