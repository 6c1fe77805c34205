"""The decoding benchmark, on a tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch

import calr
from calr.testing import byte_tokenizer, tiny_llama

BENCH = Path(__file__).parents[2] / "bench"


def test_sizes_and_threads_are_kept_side_by_side(source, ids, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    import decode

    monkeypatch.setattr(decode, "ROUNDS", 1)
    monkeypatch.setattr(decode, "NEW", 2)
    found = tmp_path / "decode.json"
    for keep in (0.5, 0.8, 0.5):
        recipe = calr.Recipe(keep=keep, rank_step=2, correction_tokens=0)
        small = tmp_path / f"{keep}"
        calr.compress(tiny_llama(), recipe, calibration=ids).save_pretrained(small)
        byte_tokenizer().save_pretrained(small)
        words = [str(small), "--model", str(source), "--threads", "1", "--output", str(found)]
        monkeypatch.setattr(sys, "argv", ["decode.py", *words])
        monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as if it were not installed
        decode.main()
    rows = json.loads(found.read_text())
    assert [row["keep"] for row in rows] == [0.8] * 6 + [0.5] * 6
    assert {row["model"] for row in rows} == {
        f"{name} {dtype}"
        for name in ("calr", "dense", "dense, optimized")
        for dtype in ("float32", "bfloat16")
    }
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert "tokens/s" in capsys.readouterr().out


@pytest.fixture(autouse=True)
def _forget_the_script_and_its_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in ("decode", "texts"):
        sys.modules.pop(name, None)
