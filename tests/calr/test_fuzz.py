"""Damaged files of every kind: a sentence and exit code 1, or the right answer; never a traceback.

A few hundred seeded mutants in all; `make fuzz` runs tens of thousands (CALR_FUZZ=8000).
"""

import json
import os
import random
import shutil

import gguf
import pytest
import torch

import calr
from calr.cli import main
from calr.storage import Store
from calr.testing import byte_tokenizer, tiny_llama

MUTANTS = int(os.environ.get("CALR_FUZZ", "200"))
ODD = [None, True, -1, 0, 1, 3.5, 10**20, float("nan"), "", "x", "../..", [], [1], {}, {"a": 1}]


@pytest.fixture(scope="module", params=["pivoted", "elastic", "quantised"])
def checkpoint(request, tmp_path_factory, ids):
    """A compressed checkpoint with its tokenizer."""
    recipe = calr.Recipe(keep=0.6, rank_step=2, correction_tokens=0)
    if request.param == "quantised":
        recipe = calr.Recipe(bits=6, scale_group=32, correction_tokens=0)
    elastic = request.param == "elastic"
    directory = tmp_path_factory.mktemp("fuzz")
    calr.compress(tiny_llama(), recipe, calibration=ids, elastic=elastic).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def places(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    if isinstance(value, dict | list):
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in children:
            yield from places(child, (*path, key))


def mutated_json(value, draw):
    """Change, remove or duplicate one thing in a JSON object."""
    value = json.loads(json.dumps(value))
    path = draw.choice([p for p in places(value) if p])
    home = value
    for key in path[:-1]:
        home = home[key]
    change = draw.randrange(3)
    if change == 0:
        del home[path[-1]]
    elif change == 1:
        home[path[-1]] = draw.choice(ODD)
    elif isinstance(home, dict):
        home[f"{path[-1]}{draw.choice('x_.')}"] = home[path[-1]]
    else:
        home.append(home[path[-1]])
    return value


def mutated_bytes(data, draw, head):
    """Flip, cut, insert or blank some bytes, most of them in the header."""
    data, at = bytearray(data), draw.randrange(head if draw.random() < 0.7 else len(data))
    change = draw.randrange(4)
    if change == 0:
        data[at] ^= 1 << draw.randrange(8)
    elif change == 1:
        del data[at:]
    elif change == 2:
        data[at:at] = draw.randbytes(draw.randrange(1, 9))
    else:
        data[at : at + draw.randrange(1, 64)] = bytes(draw.randrange(1, 64))
    return bytes(data)


def ended_well(arguments, capsys):
    """Whether a command gave an answer or said, in one line, why not."""
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert code in (0, 1)
    assert "Traceback" not in said
    assert code == 0 or "calr: " in said
    return code


@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_damaged_configurations(command, checkpoint, tmp_path, capsys):
    directory = tmp_path / "mutant"
    shutil.copytree(checkpoint, directory)
    config, draw = json.loads((checkpoint / "config.json").read_text()), random.Random(command)
    more = ["--max_new_tokens", 1] if command == "generate" else []
    codes = []
    for _ in range(MUTANTS // (2 if command == "inspect" else 8)):
        mutant = mutated_json(config, draw)
        (directory / "config.json").write_text(json.dumps(mutant))
        codes.append(ended_well([command, directory, *more], capsys))
    assert 1 in codes


def test_damaged_weights(checkpoint, tmp_path, capsys):
    directory = tmp_path / "mutant"
    shutil.copytree(checkpoint, directory)
    data, draw = (checkpoint / "model.safetensors").read_bytes(), random.Random(0)
    head = 8 + int.from_bytes(data[:8], "little")
    codes = []
    for _ in range(MUTANTS // 8):
        (directory / "model.safetensors").write_bytes(mutated_bytes(data, draw, head))
        codes.append(ended_well(["generate", directory, "--max_new_tokens", 1], capsys))
    assert 1 in codes


def test_damaged_gguf_files(gguf_file, tmp_path, capsys):
    path, data, draw = tmp_path / "mutant.gguf", gguf_file.read_bytes(), random.Random(2)
    head = len(data) - sum(len(t.data.tobytes()) for t in gguf.GGUFReader(gguf_file).tensors)
    path.write_bytes(data)
    assert ended_well(["generate", path, "--max_new_tokens", 1], capsys) == 0
    codes = []
    for _ in range(MUTANTS // 8):
        path.write_bytes(mutated_bytes(data, draw, head))
        codes.append(ended_well(["generate", path, "--max_new_tokens", 1], capsys))
    assert 1 in codes


def test_damaged_state_is_never_used(tmp_path):
    tensors = {"x": torch.arange(40.0).view(8, 5), "y": torch.ones(3, dtype=torch.bfloat16)}
    Store(tmp_path).save("a", tensors)
    path, draw = tmp_path / "a.safetensors", random.Random(1)
    data = path.read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    for _ in range(MUTANTS):
        path.write_bytes(mutated_bytes(data, draw, head))
        store = Store(tmp_path)
        if "a" in store:  # what was changed says nothing
            found = store.load("a")
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensors[name]) for name in tensors)
