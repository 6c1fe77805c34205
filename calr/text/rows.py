"""Rows of text in files and data sets: JSON lines, lists, chat messages."""

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from calr.errors import CalrError

Tokenizer = PreTrainedTokenizerBase | None


def decoded(path: Path) -> str:
    """Read a file as UTF-8 or, where its byte order mark says so, UTF-16 or UTF-32.

    Without the mark; line ends become newlines.
    """
    data, code = path.read_bytes(), "utf-8-sig"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        code = "utf-16"
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # the former begins as UTF-16's
        code = "utf-32"
    text = data.decode(code)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_texts(path: Path, field: str, tokenizer: Tokenizer) -> list[str]:
    """Read the texts of a .jsonl file, an object a line, or of a .json file, a list of objects.

    Blank lines and null are skipped. Raises CalrError naming the line, or the row, that is neither.
    """
    text = decoded(path)
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise CalrError(
                f"{path}: no JSON ({error}); for an object a line name it .jsonl"
            ) from error
        if not isinstance(rows, list):
            raise CalrError(f"{path}: must be a list of objects, is one {type(rows).__name__}")
        return list(_texts(enumerate(rows, 1), field, f"{path} row", path.name, tokenizer))
    return list(_texts(_lines(path, text, field), field, f"{path} line", path.name, tokenizer))


def column_texts(values: Iterable[Any], name: str, tokenizer: Tokenizer) -> list[str]:
    """Return the texts of a data set's column; null is skipped."""
    found = (_text(value, f"{name} row {i}", tokenizer) for i, value in enumerate(values, 1))
    return [text for text in found if text is not None]


def _lines(path: Path, text: str, field: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise CalrError(
                f"{path} line {number}: no JSON object with a field {field!r}; name the field as "
                f"{path.name}#field"
            ) from error


def _texts(
    rows: Iterable[tuple[int, Any]], field: str, place: str, name: str, tokenizer: Tokenizer
) -> Iterator[str]:
    for number, row in rows:
        if not isinstance(row, dict) or field not in row:
            raise CalrError(
                f"{place} {number}: no JSON object with a field {field!r}; name the field as "
                f"{name}#field"
            )
        text = _text(row[field], f"{place} {number}", tokenizer)
        if text is not None:
            yield text


def _text(value: Any, place: str, tokenizer: Tokenizer) -> str | None:
    """Return a value's text; chat messages go through the tokenizer's template."""
    if isinstance(value, str):  # halves of characters, which JSON can name, become U+FFFD
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(x, dict) and "role" in x for x in value):
        raise CalrError(f"{place}: holds {type(value).__name__} where text or chat messages belong")
    if tokenizer is None or not tokenizer.chat_template:
        raise CalrError(
            f"{place}: holds chat messages, which need a tokenizer with a chat template; name "
            "another field, or a model that has one"
        )
    try:
        return str(tokenizer.apply_chat_template(value, tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise CalrError(f"{place}: the chat template refuses these messages: {error}") from error
