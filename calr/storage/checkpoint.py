"""Write a checkpoint whole or not at all, and continue an interrupted run.

An unfinished run lives in DIRECTORY/.calr: its ledger says what it computes, finished parts lie
beside it. The checkpoint is completed and checked there first. Then an old config.json goes and the
new files are moved up, config.json last: at every instant a directory with a config.json is whole.
A manifest lists the files with their checksums; only what it lists is ever removed.
"""

import contextlib
import errno
import itertools
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers.utils import logging

from calr.errors import CalrError
from calr.storage.durable import flush
from calr.storage.ledger import LEDGER, read_ledger, write_ledger
from calr.storage.lock import locked
from calr.storage.manifest import MANIFEST, owned, read_manifest, write_manifest
from calr.storage.store import Store

WORK = ".calr"
LOCK = "lock"  # in the work directory: held by the run that is at work there
MOVING = "moving"  # in the work directory: the checkpoint beside it is being replaced
CONFIG = Path("config.json")
LOADED = (  # what transformers would load with a new checkpoint
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)
KEPT = ".before-calr"  # suffix of a file of somebody else's in whose place a new one goes
logger = logging.get_logger(__name__)


def destination(
    directory: str | Path,
    source: str,
    *,
    statistics: str | Path | None,
    overwrite: bool,
    offload: str | Path | None = None,
) -> Path:
    """Return the directory to write to; refuse it before minutes of loading are spent.

    Raises CalrError for the model itself or a directory around it, for statistics or an offload
    directory inside of it, and as `refuse` does.
    """
    directory, home = Path(directory), Path(source).resolve()
    home = home.parent if home.is_file() else home
    if home.exists() and home.is_relative_to(directory.resolve()):
        itself = directory.resolve() == home
        where = "is the model itself" if itself else f"holds the model {source}"
        raise CalrError(f"{directory}: {where}; name another directory")
    for name, other in (("statistics", statistics), ("offload", offload)):
        if other and Path(other).is_file():
            raise CalrError(f"{name}={other}: is a file; name a directory")
        if other and Path(other).resolve().is_relative_to(directory.resolve()):
            raise CalrError(f"{name}={other}: lies in {directory}, which holds only the checkpoint")
    with one_sentence(directory):
        refuse(directory, overwrite=overwrite)
    return directory


def refuse(directory: Path, *, overwrite: bool) -> None:
    """Raise CalrError when a directory holds anything that a run must not replace.

    A file, a `.calr` that is not ours, an adapter, anything beside an unfinished run without
    overwrite or, even with it, something that is no model. Whether an unfinished run is the same
    one is for `prepare` to judge.
    """
    work = directory / WORK
    if directory.exists() and not directory.is_dir():
        raise CalrError(f"{directory}: is a file; name a directory to write to")
    if not directory.exists():
        return
    if work.is_symlink() or (work.exists() and not work.is_dir()) or _foreign(work):
        raise CalrError(f"{work}: is not calr's; move it away or name another directory")
    if (directory / "adapter_config.json").exists():
        raise CalrError(
            f"{directory}: holds an adapter (adapter_config.json), which would be loaded with the "
            "new model; name another directory"
        )
    if (work / MOVING).exists() or _left_behind(directory):
        return
    if all(path.name == WORK for path in directory.iterdir()):
        return
    if not overwrite:
        raise CalrError(f"{directory}: exists; name another directory or pass --overwrite")
    if not (directory / "config.json").exists():
        raise CalrError(
            f"{directory}: holds no model (no config.json), so --overwrite refuses to replace its "
            "files; name another directory"
        )


def prepare(directory: Path, key: str, summary: dict[str, Any], *, overwrite: bool) -> Store:
    """Open the work directory of a new or continued run; key identifies what it computes.

    Raises CalrError as `refuse` does, and for another unfinished run without overwrite.
    """
    refuse(directory, overwrite=overwrite)
    work, there = directory / WORK, read_manifest(directory)
    if not overwrite and there is not None and there["key"] and not (work / MOVING).exists():
        raise CalrError(f"{directory}: exists; name another directory or pass --overwrite")
    found = read_ledger(work)
    if found is not None:
        if found["key"] == key:
            logger.warning(f"{directory}: continuing the unfinished run found there")
            return Store(work)
        if not overwrite and {path.name for path in work.iterdir()} - {LEDGER, LOCK}:
            raise CalrError(
                f"{directory}: holds an unfinished run of something else ({found['summary']}, or "
                "other options); finish it with the same arguments, name another directory, or "
                "pass --overwrite"
            )
    _clear(work, but={LOCK, MOVING})  # what lies beside a torn one is still ours to replace
    work.mkdir(parents=True, exist_ok=True)
    write_ledger(work, key, summary)
    return Store(work)


def finished(directory: Path, key: str) -> dict[str, Any] | None:
    """Return the results of a run that was killed only while it cleaned up, and clean up.

    None where there is no such run.
    """
    found, work = read_manifest(directory), directory / WORK
    ledger = read_ledger(work)
    mine = ledger is None or ledger["key"] == key
    if found is None or found["key"] != key or (work / MOVING).exists() or not mine:
        return None
    _clear(work)
    results: dict[str, Any] = found["results"]
    return results


def write(
    save: Callable[[Path], None],
    directory: Path,
    card: ModelCard,
    *,
    key: str = "",
    results: dict[str, Any] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Save a model and its card in the work directory, check them, and move them into place.

    save: writes the model's files into a directory. check: called with the complete checkpoint;
    what it raises leaves the directory as it was. key and results go into the manifest.
    """
    work = directory / WORK
    complete = work / "checkpoint"
    if complete.exists():
        shutil.rmtree(complete)
    save(complete)
    card.save(complete / "README.md")
    if check is not None:
        check(complete)
    write_manifest(complete, key, results or {})
    new, old = set(owned(complete)), set(owned(directory))
    _require_folders(directory, new)
    (work / MOVING).touch()
    if CONFIG in old:  # first: without it nothing is a checkpoint that could be half replaced
        (directory / CONFIG).unlink(missing_ok=True)
    _set_aside(directory, new, old)
    write_manifest(directory, "", {}, new | old)  # from now on all of these are ours
    for name in old - new:
        _remove(directory, name)
    for name in sorted(new - {CONFIG}):
        (directory / name).parent.mkdir(exist_ok=True)
        os.replace(complete / name, directory / name)
    for folder in sorted({(directory / name).parent for name in new}, reverse=True):
        flush(folder)  # before there is a config.json
    for name in [*({CONFIG} & new), Path(MANIFEST)]:
        os.replace(complete / name, directory / name)
    flush(directory)
    (work / MOVING).unlink()
    _clear(work)


def write_at_once(
    save: Callable[[Path], None],
    directory: Path,
    card: ModelCard,
    *,
    key: str,
    summary: dict[str, Any],
    results: dict[str, Any],
    overwrite: bool,
    check: Callable[[Path], None],
) -> None:
    """Write a checkpoint that needs no work but its writing; see `prepare` and `write`."""
    with writing(directory):
        if overwrite or finished(directory, key) is None:
            prepare(directory, key, summary, overwrite=overwrite)
            write(save, directory, card, key=key, results=results, check=check)


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Be the only run at work in a directory, and say a full disk and the like in one sentence.

    What was finished stays for the next run, and so does a directory that was there before.
    """
    work, made = directory / WORK, not directory.exists()
    with one_sentence(directory):
        try:
            with locked(work / LOCK, str(directory)):
                yield
        finally:
            for place in (work, *([directory] if made else ())):  # that nothing was put into
                with contextlib.suppress(OSError):
                    place.rmdir()


@contextmanager
def one_sentence(directory: Path) -> Iterator[None]:
    """Turn what the file system raises into a CalrError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        place = getattr(error, "filename", None) or directory
        cause = "the disk is full; make room" if full else str(error)
        raise CalrError(
            f"{place}: cannot be written: {cause}. Nothing half-written will be loaded; the same "
            "command continues where it stopped"
        ) from error


def size(directory: Path) -> int:
    """Count the bytes of a directory's weight files."""
    return sum(
        path.stat().st_size
        for pattern in ("*.safetensors", "*.gguf")
        for path in directory.glob(pattern)
    )


def _foreign(work: Path) -> bool:
    """Tell whether a work directory holds something, but no ledger of ours."""
    if not work.is_dir() or (work / LEDGER).exists():
        return False
    return any(path.name != LOCK and path.suffix != ".tmp" for path in work.iterdir())


def _left_behind(directory: Path) -> bool:
    """Tell whether a run was killed while it cleaned up behind a finished checkpoint."""
    return (directory / WORK).exists() and read_manifest(directory) is not None


def _clear(work: Path, but: Collection[str] = (LOCK,)) -> None:
    """Empty and remove a work directory, its ledger last; a lock that is held stays."""
    if not work.is_dir():
        return
    for path in sorted(work.iterdir(), key=lambda path: path.name == LEDGER):
        if path.name in but:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    with contextlib.suppress(OSError):
        work.rmdir()


def _require_folders(directory: Path, names: set[Path]) -> None:
    """Raise CalrError for a link or a file in the place of a folder that new files go into."""
    for name in names:
        place = (directory / name).parent
        if len(name.parts) > 1 and (place.is_symlink() or place.is_file()):
            kind = "link" if place.is_symlink() else "file"
            raise CalrError(f"{place}: is a {kind}; move it away or name another directory")


def _set_aside(directory: Path, new: set[Path], old: set[Path]) -> None:
    """Keep, under another name, files of somebody else's: those in whose place new ones go, and
    those that would be loaded with them. config.json goes first."""
    beside = {path.relative_to(directory) for how in LOADED for path in directory.glob(how)}
    beside = {name for name in beside if (directory / name).is_file() and KEPT not in name.name}
    if read_manifest(directory) is None:
        beside.add(Path(MANIFEST))
    for name in sorted((new | beside) - old, key=lambda name: name != CONFIG):
        path = directory / name
        if not path.exists() and not path.is_symlink():
            continue
        free = (f"{path.name}{KEPT}{'' if i == 0 else f'.{i}'}" for i in itertools.count())
        kept = next(path.with_name(n) for n in free if not path.with_name(n).exists())
        os.replace(path, kept)
        logger.warning(f"{path}: was not written by calr; kept as {kept.name}")


def _remove(directory: Path, name: Path) -> None:
    """Remove a file that the manifest lists, not through a link, and its folder if that is left
    empty."""
    path = directory / name
    if path.parent.is_symlink():
        return
    path.unlink(missing_ok=True)
    if path.parent != directory:
        with contextlib.suppress(OSError):
            path.parent.rmdir()
