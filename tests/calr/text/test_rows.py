"""Files of text as people have them."""

import json

import pytest

from calr.errors import CalrError
from calr.testing import byte_tokenizer
from calr.text import read_text, spread_windows
from calr.text.rows import decoded

ROW = json.dumps({"text": "some text"})
FILES = {
    "blank.jsonl": (f"{ROW}\n\n", ""),
    "bom.jsonl": (f"\ufeff{ROW}", ""),
    "null.jsonl": ('{"text": null}\n' + ROW, ""),
    "crlf.jsonl": (f"{ROW}\r\n", ""),
    "separator.jsonl": (f"{ROW}\n", ""),
    "C# notes.txt": ("some text", ""),
    "bom.txt": ("\ufeffsome text", ""),
    "plain.txt": ("some text", ""),
    "alpaca.json": (json.dumps([{"output": "some text"}, {"output": None}]), "#output"),
    "C# rows.jsonl": (json.dumps({"body": "some text"}), "#body"),
}


@pytest.mark.parametrize("name", FILES)
def test_text_is_read_as_it_was_meant(name, tmp_path):
    content, field = FILES[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_text(f"{tmp_path / name}{field}") == "some text"


def test_line_ends_become_newlines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert read_text(str(tmp_path / "a.txt")) == "one\ntwo\nthree\n"


def test_half_a_character_becomes_the_sign_of_one_that_is_not_known(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some \\ud83d text \\ud83d\\ude00"}')
    assert read_text(str(tmp_path / "a.jsonl")) == "some \ufffd text \U0001f600"


@pytest.mark.parametrize("code", ["utf-16", "utf-32"])
def test_wide_characters_are_known_by_their_mark(code, tmp_path):
    (tmp_path / "a.txt").write_bytes("some text ä".encode(code))
    assert decoded(tmp_path / "a.txt") == "some text ä"


BAD = {
    "line.jsonl": (f"{ROW}\nnot json", r"line\.jsonl line 2: no JSON object with a field 'text'"),
    "field.jsonl": ('{"body": "x"}', r"line 1: .* name the field as field\.jsonl#field"),
    "list.jsonl": ("[1]", r"line 1: no JSON object"),
    "number.jsonl": ('{"text": 3}', "line 1: holds int where text or chat messages belong"),
    "object.json": ("{}", "must be a list of objects, is one dict"),
    "broken.json": ("[", "no JSON .*name it .jsonl"),
    "row.json": ("[1]", r"row 1: no JSON object"),
    "latin.txt": (b"\xff\xfa", "cannot be read as text"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_text_is_named(name, tmp_path):
    content, message = BAD[name]
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CalrError, match=message):
        read_text(str(tmp_path / name))


def test_chat_messages_go_through_the_template(tmp_path):
    row = {"messages": [{"role": "user", "content": "hello there"}]}
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 20))
    with pytest.raises(CalrError, match="line 1: holds chat messages, which need a tokenizer"):
        read_text(f"{path}#messages")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert read_text(f"{path}#messages", tokenizer).startswith("<user>hello there\n\n<user>")
    assert spread_windows(f"{path}#messages", tokenizer, 2, 32, 0).shape == (2, 32)
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(CalrError, match="refuses these messages: no system message"):
        read_text(f"{path}#messages", tokenizer)
