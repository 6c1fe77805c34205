"""What the parts in a directory belong to: one small file, written before the first of them."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from calr.errors import CalrError
from calr.storage.durable import write_json
from calr.storage.store import Store

LEDGER = "ledger.json"


def read_ledger(directory: Path) -> dict[str, Any] | None:
    """Return a directory's {"key", "summary"}: what is computed there; None without one.

    Raises CalrError for a damaged one: whose the parts beside it are is not known then.
    """
    path = directory / LEDGER
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        whole = isinstance(found["key"], str) and isinstance(found["summary"], dict)
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise CalrError(
            f"{path}: is damaged, or no ledger of calr's; move it away or name another directory"
        )
    return found


def write_ledger(
    directory: Path, key: str, summary: dict[str, Any], *, replace: bool = True
) -> None:
    """Note what the parts in a directory will belong to, atomically; replace one that is there."""
    temporary = directory / f"{LEDGER}.{os.getpid()}.tmp"
    write_json(temporary, {"key": key, "summary": summary})
    if not replace:
        with contextlib.suppress(OSError):  # it is there, or the file system has no links
            os.link(temporary, directory / LEDGER)
    if replace or not (directory / LEDGER).exists():
        temporary.rename(directory / LEDGER)
    temporary.unlink(missing_ok=True)


def claim(directory: Path, key: str, refusal: str, summary: dict[str, Any] | None = None) -> Store:
    """Open a directory as a store for what key stands for; summary: that in words.

    Raises CalrError when it is a file and, with the refusal, when its ledger names another key.
    """
    if directory.is_file():
        raise CalrError(f"{directory}: is a file; name a directory")
    store = Store(directory)
    summary = summary or {}
    if read_ledger(directory) is None:  # another run may write one just now
        write_ledger(directory, key, summary, replace=False)
    found = read_ledger(directory)
    if found is None or found["key"] != key:
        raise CalrError(f"{directory}: {refusal}")
    if found["summary"] != summary:  # of an earlier version, or of another such run
        write_ledger(directory, key, summary)
    return store
