"""Write a checkpoint whole or not at all, and continue an interrupted run.

An unfinished run lives in DIRECTORY/.calr: its ledger says what it computes, finished parts lie
beside it. The checkpoint is completed there first. Then an old config.json is deleted and the new
files are moved up, config.json last: at every instant a directory with a config.json is whole.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from calr.errors import CalrError
from calr.storage.ledger import LEDGER, read_ledger, write_ledger
from calr.storage.store import Store

WORK = ".calr"
MOVING = "moving"  # in the work directory: the checkpoint beside it is being replaced
CHECKPOINT_FILES = (  # what an old checkpoint leaves behind; other files are not ours to delete
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "README.md",
)
logger = logging.get_logger(__name__)


def destination(
    directory: str | Path, source: str, *, statistics: str | Path | None, overwrite: bool
) -> Path:
    """Return the directory to write to; refuse it before minutes of loading are spent.

    Raises CalrError for the model itself, for statistics inside of it, and as `refuse` does.
    """
    directory, home = Path(directory), Path(source).resolve()
    home = home.parent if home.is_file() else home
    if home.exists() and directory.resolve() == home:
        raise CalrError(f"{directory}: is the model itself; name another directory")
    if statistics and Path(statistics).resolve().is_relative_to(directory.resolve()):
        raise CalrError(
            f"statistics={statistics}: lies in {directory}, which holds only the checkpoint"
        )
    refuse(directory, overwrite=overwrite)
    return directory


def refuse(directory: Path, *, overwrite: bool) -> None:
    """Raise CalrError when a directory holds anything that a run must not replace.

    A file, anything beside an unfinished run without overwrite or, even with it, something that is
    no model. Whether the unfinished run is the same one is for `prepare` to judge.
    """
    if directory.exists() and not directory.is_dir():
        raise CalrError(f"{directory}: is a file; name a directory to write to")
    if not directory.exists() or (directory / WORK / MOVING).exists():
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
    work = directory / WORK
    found = read_ledger(work)
    if found is not None:
        if found["key"] == key:
            logger.warning(f"{directory}: continuing the unfinished run found there")
            return Store(work)
        if not overwrite and {path.name for path in work.iterdir()} - {LEDGER}:
            raise CalrError(
                f"{directory}: holds an unfinished run of something else ({found['summary']}); "
                "finish it with the same arguments, name another directory, or pass --overwrite"
            )
    torn = (work / MOVING).exists()  # what lies beside is still ours to replace
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if torn:
        (work / MOVING).touch()
    write_ledger(work, key, summary)
    return Store(work)


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    card: ModelCard,
) -> None:
    """Save model, tokenizer and card in the work directory, then move them into place."""
    work = directory / WORK
    complete = work / "checkpoint"
    shutil.rmtree(complete, ignore_errors=True)
    model.save_pretrained(complete)
    tokenizer.save_pretrained(complete)
    card.save(complete / "README.md")
    (work / MOVING).touch()
    (directory / "config.json").unlink(missing_ok=True)
    for path in [path for pattern in CHECKPOINT_FILES for path in directory.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in sorted(complete.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, directory / path.name)
    shutil.rmtree(work)


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn a full disk and the like into one sentence; what was finished stays for the next run."""
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
