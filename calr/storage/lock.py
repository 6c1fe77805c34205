"""One run at a time in a directory: a lock that the system releases, however the run ends."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from calr.errors import CalrError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file path, made for it and gone afterwards, while the block runs.

    Raises CalrError, naming what and the process that holds it, when another run does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another run"
            os.close(file)
            raise CalrError(
                f"{what}: is in use by {holder}; wait for it, or name another directory"
            ) from error
        except OSError:  # a file system without locks
            break
        if _same(file, path):  # not one that its last holder has just removed
            break
        os.close(file)
    written = os.read(file, 200)
    if written and not written.startswith(b"process "):
        os.close(file)
        raise CalrError(f"{path}: is no lock of calr's; move it away or name another directory")
    try:
        os.truncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)  # the read above has moved it
        os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(file)


def _same(file: int, path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return os.fstat(file).st_ino == found.st_ino
