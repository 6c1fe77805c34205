"""Where the finished parts of a run lie: beside its ledger, or on another disk."""

import hashlib
import shutil
from pathlib import Path

from calr.errors import CalrError
from calr.storage.checkpoint import WORK
from calr.storage.ledger import read_ledger, write_ledger
from calr.storage.store import Store

NOTE = "offloaded"  # in the work directory: the folder on another disk


def open_parts(
    directory: Path, offload: str | Path | None, key: str, *, overwrite: bool = False
) -> Store:
    """Open the store of the parts of a run that is prepared in a directory.

    offload: where a folder is made for them; None: in the work directory. What such a folder holds
    of another run into the same directory goes. Raises CalrError where this run has its parts
    elsewhere, without overwrite, which removes them.
    """
    note, folder = directory / WORK / NOTE, _folder(directory, offload)
    if note.exists() and (elsewhere := note.read_text()) != str(folder):
        if not overwrite:
            raise CalrError(
                f"{directory}: the unfinished run there has its parts in {elsewhere}; name the "
                "offload directory that this lies in, or pass --overwrite"
            )
        if _named(directory) == Path(elsewhere).name:  # and nothing that somebody wrote there
            shutil.rmtree(elsewhere, ignore_errors=True)
        note.unlink()
    if folder is None:
        return Store(directory / WORK)
    known = read_ledger(folder)
    if known is not None and known["key"] != key:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_ledger(folder, key, {})
    temporary = note.with_suffix(".tmp")
    temporary.write_text(str(folder))
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
