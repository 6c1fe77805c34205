"""The comparison's own parts, on a tiny model: every method builds, heals and is counted right."""

import sys
from pathlib import Path

import pytest
import torch

from calr.errors import CalrError
from calr.model import analyse
from calr.testing import tiny_llama

QUALITY = Path(__file__).parents[2] / "bench/quality"


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(QUALITY))
    import methods
    import report

    yield methods, report
    for name in ("methods", "report"):
        del sys.modules[name]


@pytest.fixture
def bench(quality, tmp_path, monkeypatch):
    methods, _ = quality
    monkeypatch.setattr(methods, "SAMPLES", 4)
    monkeypatch.setattr(methods, "GRADIENT_SAMPLES", 2)
    text = torch.randint(2, 258, (40, 32), generator=torch.Generator().manual_seed(3))
    return methods.Bench(tiny_llama(num_hidden_layers=8), text, tmp_path / "statistics")


METHODS = ["SVD", "SVD-LLM", "ERC-SVD", "ShortGPT", "LaCo", "LoSparse", "CALR"]


@pytest.mark.parametrize("tokens", [0, 32 * 32])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_meets_the_size_and_runs(method, tokens, bench, quality, tmp_path):
    methods, _ = quality
    assert methods.METHODS == METHODS
    dense = bench.dense
    model = bench.build(method, 0.75, tokens, work=tmp_path / "work")
    structure = analyse(dense)
    removed = structure.model_parameters - methods.stored_parameters(model)
    assert removed == pytest.approx(0.25 * structure.linear_parameters, rel=0.1)
    with torch.no_grad():
        assert torch.isfinite(model(bench.ids[:1]).logits).all()
    assert all(map(torch.equal, dense.parameters(), tiny_llama(num_hidden_layers=8).parameters()))


def test_options_reach_the_recipe(bench):
    options = {"method": "svd_llm", "layout": "two_factor", "allocation": "uniform"}
    model = bench.build("CALR", 0.5, 0, **options)
    recipe = model.config.quantization_config.recipe
    assert options.items() <= recipe.items()
    with pytest.raises(CalrError, match="unknown"):
        bench.build("CALR", 0.5, 0, method="x")


def row(method, correct, tokens=0):
    accuracy = {
        task: {"accuracy": sum(c) / len(c), "chance": 0.0, "correct": c}
        for task, c in correct.items()
    }
    return {
        "method": method,
        "keep": 1.0 if method == "dense" else 0.8,
        "healed_tokens": tokens,
        "params": 100 if method == "dense" else 80,
        "perplexity": {"text": 10.0},
        "accuracy": accuracy,
    }


def test_the_paired_error_counts_differences_alone(quality):
    _, report = quality
    dense = row("dense", {"a": [1, 1, 0, 0], "b": [1, 0]})
    assert report.paired_error(dense, dense) == 0
    other = row("CALR", {"a": [1, 0, 0, 0], "b": [1, 0]})
    # a differs once in four: variance of (0, -1, 0, 0) is 1/4, of its mean 1/16, over tasks' sum 1
    assert report.paired_error(other, dense) == pytest.approx(0.25)


def test_tables_and_plot_show_every_cell(quality, tmp_path):
    _, report = quality
    rows = [
        row("dense", {"a": [1, 1, 0, 0]}),
        row("CALR", {"a": [1, 0, 0, 0]}),
        row("CALR", {}, tokens=512),
    ]
    text = report.tables(rows)
    assert "| CALR | 0 | 20.00% | 10.00 | 0.250 | 50.0% | 50.0% | 50.0% |" in text
    assert "| CALR | 512 | 20.00% | 10.00 |  |  |  |  |" in text
    pytest.importorskip("matplotlib")
    report.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
