"""Progress on a terminal; elsewhere one line when a phase begins; and what each phase took."""

import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.utils import logging

from calr import parallel

logger = logging.get_logger(__name__)
INTERVAL = 0.02  # seconds between two looks at the memory


@dataclass(frozen=True)
class Phase:
    """Seconds, the peak of the process's resident memory in bytes, and of what it holds on GPUs."""

    seconds: float
    peak_bytes: int
    gpu_bytes: int = 0

    def to_dict(self, prefix: str = "") -> dict[str, float]:
        """Return the figures by name, that of GPUs where one is in use."""
        found = {"seconds": round(self.seconds, 1), "peak_bytes": self.peak_bytes}
        if self.gpu_bytes:
            found["gpu_bytes"] = self.gpu_bytes
        return {prefix + name: value for name, value in found.items()}


def progress(
    items: Any = None, *, desc: str, unit: str, phase: str | None = None, **options: Any
) -> Any:
    """Show how far a loop over items is (or, without items, what `update` is told), on stderr.

    Where stderr is no terminal, the description alone is logged. phase: what this is a part of;
    by default a phase of its own. options: those of tqdm.
    """
    begin_phase(phase or desc)
    if not sys.stderr.isatty() or not parallel.first():
        options["disable"] = True
        if parallel.first():
            logger.info(desc)
    return logging.tqdm(items, desc=desc, unit=unit, **options)


def begin_phase(name: str) -> None:
    """Let a phase begin, for whoever measures them; freed memory goes back to the system."""
    give_back()
    for watch in _watches:
        watch.begin(name)


@contextmanager
def measured_phases(first: str) -> Iterator[dict[str, Phase]]:
    """Measure what is done until the end of the block: each phase lasts until the next begins.

    Yields what is known by name, whole at the end. One that comes again is added to. Memory is
    looked at every few milliseconds, and so is the peak that Linux counts, where that grew.
    """
    watch = _Watch(first)
    _watches.append(watch)
    try:
        yield watch.found
    finally:
        watch.close()
        _watches.remove(watch)


def give_back() -> None:
    """Give freed memory back that the C library keeps for its own next use; glibc alone can.

    For loops whose rounds take and free much: what it keeps falls into pieces, and grows with them.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class _Current:
    """The phase that goes on; each has its own, so that a late look counts for the one it saw."""

    def __init__(self, name: str) -> None:
        self.name, self.started, self.before, self.most = name, time.monotonic(), _peak(), 0


class _Watch:
    def __init__(self, name: str) -> None:
        self.found: dict[str, Phase] = {}
        self._process, self._done = psutil.Process(), threading.Event()
        self._start(name)
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def begin(self, name: str) -> None:
        self._end()
        self._start(name)

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        self._end()

    def _start(self, name: str) -> None:
        self._current = _Current(name)
        for gpu in _gpus():
            torch.cuda.reset_peak_memory_stats(gpu)

    def _end(self) -> None:
        self._see()
        current, peak = self._current, _peak()
        known = self.found.get(current.name, Phase(0.0, 0))
        most = max(current.most, known.peak_bytes, peak if peak > current.before else 0)
        gpu = sum(torch.cuda.max_memory_allocated(gpu) for gpu in _gpus())
        seconds = known.seconds + time.monotonic() - current.started
        self.found[current.name] = Phase(seconds, most, max(gpu, known.gpu_bytes))

    def _see(self) -> None:
        current = self._current
        seen = self._process.memory_info().rss
        current.most = max(current.most, seen)

    def _look(self) -> None:
        while not self._done.wait(INTERVAL):
            self._see()


def _gpus() -> range:
    """Number the GPUs, where one is in use."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def _peak() -> int:
    """Return the peak of the process's resident memory; 0 where the system does not tell it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


_watches: list[_Watch] = []
