"""The decoding benchmark, on a tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch

import calr
from calr.testing import byte_tokenizer, tiny_llama

BENCH = Path(__file__).parents[2] / "bench"
MADE = {
    *("dense in transformers", "dense", "dense, packed", "keep 0.5", "keep 0.5, packed"),
    *("8 bits", "4 bits", "4 bits, rank 16", "4 bits, rank 16 in 16 bits"),
}


def test_cells_are_kept_side_by_side(source, ids, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    import decode

    monkeypatch.setattr(decode, "NEW", 2)
    monkeypatch.setattr(decode, "PREFILL", 20)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as if it were not installed
    found, small = tmp_path / "decode.json", tmp_path / "small"
    recipe = calr.Recipe(keep=0.5, rank_step=2, correction_tokens=0)
    calr.compress(tiny_llama(), recipe, calibration=ids).save_pretrained(small)
    byte_tokenizer().save_pretrained(small)
    for batch in (1, 2, 1):
        words = [str(small), "--model", str(source), "--threads", "1", "--batch", str(batch)]
        words += ["--rounds", "1"]
        monkeypatch.setattr(sys, "argv", ["decode.py", *words, "--output", str(found)])
        decode.main()
    rows = json.loads(found.read_text())
    float32 = "dense in transformers, float32"  # its prefill alone
    assert [row["batch"] for row in rows] == [2] * 31 + [1] * 31
    assert {row["model"] for row in rows} == {"small", float32} | MADE
    assert {row["way"] for row in rows} == {"generate", "chained", "prefill"}
    assert {row["way"] for row in rows if row["model"] == float32} == {"prefill"}
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert "| 4 bits, rank 16 |" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only", "8 bits", "--ways", "prefill"])
    decode.main()  # prints its cell, and keeps those that are there
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:4] for line in table[3:]] == [
        [f" {name} ", "  ", "  "] for name in ("small", "8 bits")
    ]
    assert json.loads(found.read_text()) == rows


@pytest.fixture(autouse=True)
def _forget_the_script_and_its_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in ("decode", "texts"):
        sys.modules.pop(name, None)
