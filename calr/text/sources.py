"""Text from where a user says it is: files, hub data sets, what every Python carries.

A source is a text file, FILE.jsonl (an object a line), FILE.json (a list of objects) or a
`datasets` hub id (NAME[:CONFIG][:SPLIT]), all but the first with an optional #field (default text;
chat messages go through the tokenizer's template); "sampled", text sampled from the model itself, a
quarter of it hard-wrapped; "builtin", English reference text that every Python installation
carries; or several of these separated by commas, in equal shares.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from calr.errors import CalrError
from calr.text.rows import Tokenizer, column_texts, decoded, json_texts

EVALUATION_SHARE = 5  # one in so many paragraphs of the built-in text is kept from calibration
FILES = {".txt", ".json", ".jsonl", ".md", ".raw", ".tokens", ".text"}  # hub ids have dots, too
Source = str | Path | Sequence[str] | Tensor


def read_text(source: str | Path | Sequence[str], tokenizer: Tokenizer = None) -> str:
    """Read a text, jsonl, json or hub source, or join a list of texts, into one string.

    tokenizer: whose chat template turns chat messages into text. Raises CalrError naming the
    source, and the line or row, for what is no text.
    """
    if not isinstance(source, str | Path):
        return "\n\n".join(source)
    _require_name(source)
    if source == "builtin":
        return calibration_topics()
    name, field = _split(source)
    path = Path(name)
    try:
        if path.is_dir():
            raise CalrError(f"{source}: is a directory; name a text or jsonl file")
        if path.exists():
            if path.suffix in (".jsonl", ".json"):
                return "\n\n".join(json_texts(path, field or "text", tokenizer))
            return decoded(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CalrError(f"{source}: cannot be read as text: {error}") from error
    if path.suffix in FILES or name.startswith((".", "/")):
        raise CalrError(f"{source}: no such file")
    return "\n\n".join(_hub(name, field or "text", tokenizer))


def _is_there(name: str | Path) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # a list of names is longer than a name may be
        return False


def _require_name(source: object) -> None:
    if source == "":
        raise CalrError("the text's name is empty; name a file, a hub data set or builtin")


def _split(source: str | Path) -> tuple[str, str]:
    """Split FILE#field at its last #, unless all of it is a file's name."""
    name, _, field = str(source).rpartition("#")
    if not name or _is_there(source):
        return str(source), ""
    return name, field


def calibration_topics() -> str:
    """The built-in English text for calibration: the first four fifths of pydoc's topics."""
    paragraphs = _topics()
    return "\n\n".join(paragraphs[: -len(paragraphs) // EVALUATION_SHARE])


def held_out_topics() -> str:
    """The built-in English text that calibration never sees: the last fifth of pydoc's topics."""
    paragraphs = _topics()
    return "\n\n".join(paragraphs[-len(paragraphs) // EVALUATION_SHARE :])


def _topics() -> list[str]:
    """Return the paragraphs in order, each once: topics repeat one another's text."""
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[key] for key in sorted(topics)).split("\n\n")
    return list(dict.fromkeys(paragraphs))


def parts_of(source: str | Path | Sequence[str] | None) -> list[str | Path | Sequence[str]]:
    """Split a source string at its commas, unless it is a file's name; None is "sampled"."""
    if source is None:
        return ["sampled"]
    _require_name(source)
    if isinstance(source, str) and "," in source and not _is_there(_split(source)[0]):
        parts = [part.strip() for part in source.split(",") if part.strip()]
        if not parts:
            raise CalrError(f"calibration={source!r}: names no text")
        return list(parts)
    return [source]


def content_of(source: str | Path | Sequence[str] | None) -> str:
    """Identify text by what its files hold; by name where it is no file (builtin is Python's)."""
    digests = []
    for part in parts_of(source):
        if isinstance(part, str | Path) and (path := Path(_split(part)[0])).is_file():
            try:
                digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
            except OSError as error:
                raise CalrError(f"{part}: cannot be read: {error}") from error
    return f"{source} {digests} {sys.version_info[:2]}"


def _hub(name: str, field: str, tokenizer: Tokenizer) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise CalrError(
            f"{name}: is no file; for a hub data set install datasets (pip install datasets)"
        ) from error
    identifier, config, split = ([*name.split(":"), None, None])[:3]
    try:
        rows = datasets.load_dataset(identifier, config, split=split or "train")
        return column_texts(rows[field], name, tokenizer)
    except CalrError:
        raise
    except Exception as error:  # datasets raises many kinds, all mean the same here
        raise CalrError(f"{name}: neither a file nor a loadable data set: {error}") from error


def name_of(source: object) -> str:
    """Name a source in a message."""
    return str(source) if isinstance(source, str | Path) else "calibration"


def describe(source: Source | None) -> str:
    """Name a source for the record."""
    if source is None:
        return "sampled"
    return str(source) if isinstance(source, str | Path) else "given in memory"
