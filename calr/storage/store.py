"""Named sets of tensors that survive an interruption."""

import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, uint8
from transformers.utils import logging

from calr.storage.durable import flush

logger = logging.get_logger(__name__)


class Store:
    """Keep sets of tensors by name: in memory, or in a directory of safetensors files.

    Files are written under a temporary name, flushed to disk and renamed, so that one that exists
    is whole; each carries a checksum. A damaged one is named, once, and counts as absent.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._checked: set[str] = set()
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def __contains__(self, name: str) -> bool:
        if self.directory is None:
            return name in self._memory
        if name in self._checked:
            return True
        path = self._path(name)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as opened:
                written = (opened.metadata() or {}).get("sha256")
            if written != _checksum(load_file(path)):
                raise SafetensorError("its checksum is another")
        except SafetensorError as error:
            logger.warning(f"{path}: is damaged ({error}), and not used")
            return False
        self._checked.add(name)
        return True

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
            save_file(tensors, temporary, metadata={"sha256": _checksum(tensors)})
            flush(temporary)
            temporary.rename(self._path(name))
        finally:
            temporary.unlink(missing_ok=True)
        self._checked.add(name)

    def read(self, name: str, key: str) -> Tensor:
        """Return one of the tensors saved under a name."""
        if name not in self:
            raise KeyError(name)
        if self.directory is None:
            return self._memory[name][key]
        with safe_open(self._path(name), framework="pt") as opened:
            found: Tensor = opened.get_tensor(key)
        return found

    def keep(self, name: str, tensor: Tensor) -> Callable[[], Tensor]:
        """Save one tensor under a name, unless it is there, and return what reads it."""
        if name not in self:
            self.save(name, {"values": tensor})
        return partial(self.read, name, "values")

    def remove(self) -> None:
        """Forget everything, and remove the directory."""
        self._memory.clear()
        self._checked.clear()
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)

    @contextmanager
    def scratch(self, name: str) -> Iterator["Store"]:
        """Open a store of this process alone inside of this one, and remove it at the end.

        What a killed one of this machine has left behind goes, too.
        """
        begin = f"{name}.{platform.node()}."
        for left in [] if self.directory is None else self.directory.glob(f"{begin}*"):
            number = left.name.removeprefix(begin)
            if number.isdigit() and not psutil.pid_exists(int(number)):
                shutil.rmtree(left, ignore_errors=True)
        own = self.within(f"{begin}{os.getpid()}")
        try:
            yield own
        finally:
            own.remove()

    def within(self, name: str) -> "Store":
        """Open a store of other names inside of this one."""
        return Store(self.path(name))

    def path(self, name: str) -> Path | None:
        """Return a place inside of the directory; None in memory."""
        return None if self.directory is None else self.directory / name

    def _path(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{name}.safetensors"


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Hash names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(uint8).numpy().data)
    return found.hexdigest()
