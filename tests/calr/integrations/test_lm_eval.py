"""Zero-shot tasks offline on local files, through the real harness."""

import json

import pytest

from calr.errors import CalrError
from calr.integrations.lm_eval import evaluate, retention
from calr.testing import byte_tokenizer, tiny_llama

pytest.importorskip("lm_eval")
ROWS = {
    "arc_easy.test": [
        {"query": f"Question: {i}?", "choices": ["a", "b", "c", "d"], "gold": i % 4}
        for i in range(6)
    ],
    "piqa.validation": [
        {"goal": f"do {i}", "sol1": "yes", "sol2": "no", "label": i % 2} for i in range(4)
    ],
    "lambada_openai.test": [{"context": f"one two {i}", "continuation": "x"} for i in range(3)],
    "boolq.validation": [
        {"question": "is it", "passage": "It is.", "answer": bool(i % 2)} for i in range(4)
    ],
}


@pytest.fixture
def data(tmp_path):
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_tasks_on_local_files(data, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(data / "cache"))
    tasks = [name.split(".")[0] for name in ROWS]
    results = evaluate(tiny_llama(), byte_tokenizer(), tasks, data=str(data), limit=4)
    assert {t: r["rows"] for t, r in results.items()} == dict(zip(tasks, (4, 4, 3, 4), strict=True))
    assert {t: r["chance"] for t, r in results.items()} == dict(
        zip(tasks, (0.25, 0.5, 0.0, 0.5), strict=True)
    )
    for result in results.values():
        assert result["accuracy"] == sum(result["correct"]) / result["rows"]
    assert retention(results, results)["retention"] == 1


def test_nothing_to_divide_by_is_no_number():
    results = {"arc": {"accuracy": 0.0, "chance": 0.25}}
    assert retention(results, results) == {"retention": None, "above_chance": 1.0}


@pytest.mark.parametrize("row", ["", "no JSON", "[1, 2]", '{"other": 1}'])
def test_damaged_data_of_tasks_are_one_sentence(row, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "arc_easy.test.jsonl").write_text(row + "\n")
    with pytest.raises(CalrError, match="task_data"):
        evaluate(tiny_llama(), byte_tokenizer(), ["arc_easy"], data=str(tmp_path))


def test_what_is_missing_is_named(data):
    with pytest.raises(CalrError, match="no task 'arc_hard'"):
        evaluate(tiny_llama(), byte_tokenizer(), ["arc_hard"])
    with pytest.raises(CalrError, match=r"holds neither sciq\.test\.jsonl nor sciq"):
        evaluate(tiny_llama(), byte_tokenizer(), ["sciq"], data=str(data))
