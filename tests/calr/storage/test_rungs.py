"""What llama.cpp's types are said to take and lose is what was measured of them."""

import json
import statistics
from pathlib import Path

import pytest
from transformers import LlamaConfig

from calr.storage import nearest_rung
from calr.storage.rungs import MEASURED

RESULTS = Path(__file__).parents[3] / "bench/results"
SMOLLM2 = LlamaConfig(hidden_size=576, num_hidden_layers=30, vocab_size=49152)


@pytest.mark.parametrize(
    ("measured", "file"), list(zip(MEASURED, ("frontier.json",), strict=True)), ids=["SmolLM2"]
)
def test_the_table_is_what_was_measured(measured, file):
    rows = {row["rung"]: row for row in json.loads((RESULTS / file).read_text()) if "rung" in row}
    assert {rung.name for rung in measured.rungs} == {name for name in rows if "," not in name}
    for rung in measured.rungs:
        row = rows[rung.name]
        assert rung.tensor_bytes == row["tensor_bytes"]
        texts = row["texts"].values()
        assert rung.kl == round(statistics.mean(text["kl"] for text in texts), 4)
        assert rung.ratio == round(max(text["ratio"] for text in texts), 3)


@pytest.mark.parametrize(
    ("megabytes", "wanted"),
    [(300, "Q8_0 of SmolLM2-135M-Instruct: 143.0 MB"), (91, "Q3_K_M of"), (60, "Q2_K of")],
)
def test_the_nearest_by_bytes_is_named(megabytes, wanted):
    assert nearest_rung(SMOLLM2, megabytes * 10**6).startswith(wanted)


def test_of_other_models_nothing_is_said():
    assert nearest_rung(LlamaConfig(hidden_size=64), 10**6) is None
