"""LoSparse: UV + S starts at W, S ends at its sparsity, and the least important columns go."""

import pytest
import torch

from calr.baselines.losparse import LoSparse
from calr.errors import CalrError
from calr.structure import analyse
from calr.testing import tiny_llama


def backward(model, ids):
    model(ids).logits.logsumexp(-1).sum().backward()


def test_the_start_is_the_dense_model(ids):
    model = tiny_llama()
    with torch.no_grad():
        before = model(ids).logits
        LoSparse(model, 0.5)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [0.2, 0.8])
def test_the_end_meets_the_budget(keep, ids):
    model = tiny_llama()
    dense = analyse(model).linear_parameters
    pruner = LoSparse(model, keep)
    steps = 20
    sizes = []
    for step in range(steps):
        model.zero_grad()
        backward(model, ids)
        pruner.update(step, steps)
        sizes.append(sum(layer.stored for layer in pruner.layers))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    assert sizes[-5] == sizes[-1] <= keep * dense  # the last steps only train
    columns = sum(layer.sparse.shape[0] for layer in pruner.layers)  # one column a layer
    assert sizes[-1] > keep * dense - columns


def test_columns_of_least_importance_go_first(ids):
    model = tiny_llama()
    pruner = LoSparse(model, 0.5)
    backward(model, ids)
    layer = pruner.layers[0]
    seen = (layer.sparse * layer.sparse.grad).abs().mean(0)
    pruner.update(0, 1)
    assert int(layer.kept.sum()) == pruner.columns[0]
    assert seen[layer.kept].min() >= seen[~layer.kept].max()
    with torch.no_grad():
        x = torch.randn(3, layer.sparse.shape[1])
        expected = x @ layer.down.T @ layer.up.T + (x * layer.kept) @ layer.sparse.T
        torch.testing.assert_close(layer(x), expected)


def test_a_budget_without_room_for_the_sparse_part_is_refused():
    with pytest.raises(CalrError, match=r"keep=0\.05 must lie in"):
        LoSparse(tiny_llama(), 0.05)
