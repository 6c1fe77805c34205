"""Where the finished parts of a run lie: beside its ledger, or on another disk."""

import hashlib
import shutil
from pathlib import Path

from calr.errors import CalrError
from calr.storage.checkpoint import WORK
from calr.storage.durable import flush
from calr.storage.ledger import read_ledger, write_ledger
from calr.storage.store import Store

NOTE = "offloaded"  # in the work directory: the folder on another disk


def give_up(directory: Path, key: str) -> None:
    """Remove from another disk what a run into a directory left there, unless it is that of key."""
    note, found = directory / WORK / NOTE, read_ledger(directory / WORK)
    if found is not None and found["key"] != key and note.exists():
        folder = Path(note.read_text())
        if folder.name == _named(directory):  # and nothing that somebody wrote there
            shutil.rmtree(folder, ignore_errors=True)


def open_parts(directory: Path, offload: str | Path | None, key: str) -> Store:
    """Open the store of the parts of a run that is prepared in a directory.

    offload: where a folder is made for them; None: in the work directory. What such a folder holds
    of another run into the same directory goes. Raises CalrError where this run has its parts
    elsewhere.
    """
    note, folder = directory / WORK / NOTE, _folder(directory, offload)
    if note.exists() and (elsewhere := note.read_text()) != str(folder):
        raise CalrError(
            f"{directory}: the unfinished run there has its parts in {elsewhere}; name the offload "
            f"directory that this lies in to go on with it, or delete {note} to begin again"
        )
    if folder is None:
        return Store(directory / WORK)
    known = read_ledger(folder)
    if note.exists() and known is not None and known["key"] == key:
        return Store(folder)  # several processes: the first has made it
    if known is not None and known["key"] != key:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_ledger(folder, key, {})
    temporary = note.with_suffix(".tmp")
    temporary.write_text(str(folder))
    flush(temporary)
    temporary.replace(note)
    return Store(folder)


def remove_offloaded(directory: Path, offload: str | Path | None) -> None:
    """Remove what a finished run has left on another disk."""
    folder = _folder(directory, offload)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _folder(directory: Path, offload: str | Path | None) -> Path | None:
    return None if offload is None else Path(offload).resolve() / _named(directory)


def _named(directory: Path) -> str:
    """Name the folder of what belongs to a directory."""
    return f"calr-{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]}"
