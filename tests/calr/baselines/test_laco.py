"""LaCo: collapsing equal blocks changes no parameter, and the sums are those of the paper."""

import pytest
import torch

from calr.baselines import laco as module
from calr.baselines.laco import _Search, laco
from calr.errors import CalrError
from calr.model import analyse
from calr.testing import tiny_llama


@pytest.mark.parametrize("count", [1, 3, 5])
def test_equal_blocks_collapse_into_one_of_them(count, ids, device):
    model = tiny_llama(num_hidden_layers=8).to(device)
    values = {name: p.clone() for name, p in model.model.layers[0].named_parameters()}
    for block in model.model.layers:
        block.load_state_dict(values)
    gone = laco(model, ids, count)
    assert len(gone) == count
    assert len(model.model.layers) == model.config.num_hidden_layers == 8 - count
    for block in model.model.layers:
        for name, p in block.named_parameters():
            torch.testing.assert_close(p, values[name])


def test_a_collapse_adds_the_differences(ids):
    model = tiny_llama(num_hidden_layers=5)
    before = [b.mlp.up_proj.weight.clone() for b in model.model.layers]
    search = _Search(model, analyse(model), ids[:2])
    assert search.collapse(4, -2.0, 3) == [2, 3, 4]  # any similarity will do
    expected = before[1] + sum(before[i] - before[1] for i in (2, 3, 4))
    torch.testing.assert_close(model.model.layers[1].mlp.up_proj.weight, expected)
    search.restore()
    for block, weight in zip(model.model.layers, before, strict=True):
        assert torch.equal(block.mlp.up_proj.weight, weight)


def test_nothing_collapses_above_the_threshold(ids):
    model = tiny_llama(num_hidden_layers=5)
    search = _Search(model, analyse(model), ids[:2])
    before = [p.clone() for p in model.parameters()]
    assert search.collapse(4, 1.0, 3) == []
    assert all(map(torch.equal, model.parameters(), before))


def test_what_no_threshold_reaches_is_refused_and_undone(ids, monkeypatch):
    monkeypatch.setattr(module, "THRESHOLDS", [1.0])
    model = tiny_llama(num_hidden_layers=5)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CalrError, match="no threshold removes 2 of 5"):
        laco(model, ids, 2)
    assert all(map(torch.equal, model.parameters(), before))
    with pytest.raises(CalrError, match="cannot remove 5 of 5"):
        laco(model, ids, 5)


def test_the_merge_that_ends_most_similar_is_taken(ids):
    found = {}
    for merge in module.MERGES:
        search = _Search(tiny := tiny_llama(num_hidden_layers=8), analyse(tiny), ids[:1])
        found[merge] = search.strictest(merge, 3)
    model = tiny_llama(num_hidden_layers=8)
    gone = laco(model, ids, 3)
    best = max(x for x in found.values() if x)
    search = _Search(tiny := tiny_llama(num_hidden_layers=8), analyse(tiny), ids[:1])
    assert gone == sorted(search.collapse(best[2], best[1], 3))
