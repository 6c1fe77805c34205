"""The manifest of a finished checkpoint: its files and their checksums."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from calr.errors import CalrError
from calr.storage.durable import flush, write_json

MANIFEST = "calr.json"
BLOCK = 1 << 20  # bytes read at a time


def write_manifest(
    directory: Path, key: str, results: dict[str, Any], names: set[Path] | None = None
) -> None:
    """List files of a directory, by default all, with their checksums, and flush them to disk.

    key and results: of the run that made them. Names that are given are listed without checksums:
    those of files that are about to come or go.
    """
    if names is None:
        found = sorted(path for path in directory.rglob("*") if path.is_file())
        files = {path.relative_to(directory).as_posix(): _flushed(path) for path in found}
    else:
        files = {name.as_posix(): "" for name in sorted(names)}
    temporary = directory / f"{MANIFEST}.tmp"
    write_json(temporary, {"key": key, "results": results, "files": files})
    os.replace(temporary, directory / MANIFEST)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return {"key", "results", "files"} of a finished checkpoint; None where there is none."""
    try:
        found = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    shaped = isinstance(found, dict) and {"key", "results", "files"} <= found.keys()
    return found if shaped and isinstance(found["files"], dict) else None


def listed(directory: Path) -> list[Path]:
    """List the files that a manifest says calr wrote: names without a way out of the directory."""
    found = read_manifest(directory)
    names = [] if found is None else [Path(str(name)) for name in found["files"]]
    return [name for name in names if not name.is_absolute() and ".." not in name.parts]


def owned(directory: Path) -> list[Path]:
    """List the files of a manifest that are still as calr wrote them, or are not there.

    One that was changed since is somebody else's.
    """
    found = read_manifest(directory)
    sums = {} if found is None else found["files"]

    def ours(name: Path) -> bool:
        path, written = directory / name, sums[name.as_posix()]
        return not path.is_file() or not written or _checksum(path) == written

    return [name for name in listed(directory) if ours(name)]


def verify(directory: Path) -> int:
    """Compare every listed file with its checksum; return how many there are.

    Raises CalrError naming the first that is missing or differs, and where there is no manifest.
    """
    found = read_manifest(directory)
    if found is None:
        raise CalrError(f"{directory}: has no manifest ({MANIFEST}) to verify it by")
    for name in listed(directory):
        path = directory / name
        if not path.is_file():
            raise CalrError(f"{path}: is missing; copy the checkpoint again")
        if _checksum(path) != found["files"][name.as_posix()]:
            raise CalrError(f"{path}: differs from what calr wrote; copy the checkpoint again")
    return len(found["files"])


def _flushed(path: Path) -> str:
    """Flush a file to disk and return its checksum."""
    flush(path)
    return _checksum(path)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
