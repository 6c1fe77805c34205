"""LoSparse: UV + S starts at W, S ends at its sparsity, and the least important rows go."""

import pytest
import torch

from calr.baselines.losparse import LoSparse
from calr.errors import CalrError
from calr.model import analyse
from calr.testing import tiny_llama


def backward(model, ids):
    model.zero_grad()
    model(ids).logits.logsumexp(-1).sum().backward()


def test_the_start_is_the_dense_model(ids):
    model = tiny_llama(attention_bias=True)
    with torch.no_grad():
        before = model(ids).logits
        LoSparse(model, 0.5)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [0.2, 0.8])
def test_the_end_meets_the_budget(keep, ids, device):
    model, ids = tiny_llama().to(device), ids.to(device)
    dense = analyse(model).linear_parameters
    pruner = LoSparse(model, keep)
    sizes = []
    for step in range(20):
        backward(model, ids)
        pruner.update(step, 20)
        sizes.append(sum(layer.stored for layer in pruner.layers))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    assert sizes[-5] == sizes[-1] <= keep * dense  # the last steps only train
    assert sizes[-1] > keep * dense - max(layer.sparse.shape[1] for layer in pruner.layers)


def test_rows_of_least_importance_in_the_model_go_first(ids):
    model = tiny_llama()
    pruner = LoSparse(model, 0.5)
    backward(model, ids)
    seen = [(x.sparse * x.sparse.grad).abs().mean(1).detach() for x in pruner.layers]
    pruner.update(0, 1)
    kept = torch.cat([x.kept for x in pruner.layers])
    assert torch.cat(seen)[kept].min() >= torch.cat(seen)[~kept].max()
    assert 0 < int(kept.sum()) < len(kept)


def test_pruned_rows_are_zero_but_still_learn(ids):
    model = tiny_llama()
    pruner = LoSparse(model, 0.5)
    backward(model, ids)
    pruner.update(0, 1)
    layer = next(x for x in pruner.layers if 0 < int(x.kept.sum()) < len(x.kept))
    assert not layer.sparse[~layer.kept].any()
    x = torch.randn(3, layer.sparse.shape[1])
    with torch.no_grad():
        layer.sparse[~layer.kept] = 7.0  # what an optimiser may write there does not count
        rows = layer.sparse * layer.kept[:, None]
        torch.testing.assert_close(layer(x), x @ (layer.up @ layer.down + rows).T)
    backward(model, ids)
    assert layer.sparse.grad[~layer.kept].any()


def test_a_budget_without_room_for_the_sparse_part_is_refused_and_changes_nothing():
    model = tiny_llama()
    with pytest.raises(CalrError, match=r"keep=0\.04 must lie in"):
        LoSparse(model, 0.04)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
