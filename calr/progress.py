"""Progress on a terminal; elsewhere one line when a phase begins; and what each phase took."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from transformers.utils import logging

from calr import parallel

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Phase:
    """Seconds, and the peak of the process's resident memory in bytes."""

    seconds: float
    peak_bytes: int


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
    """Let a phase begin, for whoever measures them."""
    for watch in _watches:
        watch.begin(name)


@contextmanager
def measured_phases(first: str) -> Iterator[dict[str, Phase]]:
    """Measure what is done until the end of the block: each phase lasts until the next begins.

    Yields what is known by name, whole at the end. One that comes again is added to. Linux alone
    tells a peak; elsewhere it is what is resident when a phase ends.
    """
    watch = _Watch(first)
    _watches.append(watch)
    try:
        yield watch.found
    finally:
        watch.end()
        _watches.remove(watch)


class _Watch:
    def __init__(self, name: str) -> None:
        self.found: dict[str, Phase] = {}
        self._start(name)

    def begin(self, name: str) -> None:
        self.end()
        self._start(name)

    def end(self) -> None:
        before = self.found.get(self._name, Phase(0.0, 0))
        seconds = before.seconds + time.monotonic() - self._started
        self.found[self._name] = Phase(seconds, max(before.peak_bytes, _peak()))

    def _start(self, name: str) -> None:
        self._name, self._started = name, time.monotonic()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


_watches: list[_Watch] = []


def _peak() -> int:
    """Return the peak of resident memory since it was last reset."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)
