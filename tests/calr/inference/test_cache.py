"""Caches that grow in place hold what transformers' own do."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from calr.inference.cache import GrowingLayer, GrowingSlidingLayer


@pytest.mark.parametrize("kind", ["full", "sliding"])
@torch.no_grad()
def test_a_growing_layer_is_the_layer_it_stands_for(kind):
    """Whatever is done to both, they hold and return the same."""
    torch.manual_seed(0)
    own = DynamicLayer()
    grown = GrowingLayer()
    if kind == "sliding":
        own, grown = DynamicSlidingWindowLayer(sliding_window=7), GrowingSlidingLayer(7)
    steps = [5, 1, 1, 9, 1, "select", 1, 80, 1, "repeat", 3, "reorder", 1, "reset", 4, "crop", 2]
    for step in steps:
        if isinstance(step, int):
            rows = 2 if own.keys is None else own.keys.shape[0]
            states = torch.randn(2, rows, 3, step, 4)
            expected, found = own.update(*states), grown.update(*states)
            assert all(map(torch.equal, found, expected))
        for layer in (own, grown):
            if step == "select":
                layer.batch_select_indices(torch.tensor([1]))
            elif step == "repeat":
                layer.batch_repeat_interleave(2)
            elif step == "reorder":
                layer.reorder_cache(torch.tensor([1, 1]))
            elif step == "reset":
                layer.reset()
            elif step == "crop":
                layer.crop(-2)
        assert own.get_seq_length() == grown.get_seq_length()
        assert own.get_mask_sizes(1) == grown.get_mask_sizes(1)
        if own.keys is not None:
            assert torch.equal(own.keys, grown.keys)
            assert torch.equal(own.values, grown.values)
        grown = copy.deepcopy(grown)
    assert type(grown).of(own).get_seq_length() == own.get_seq_length()


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_gradients_reach_what_came_earlier(kind):
    """Nothing that autograd has kept is written to."""
    own, grown = DynamicLayer(), GrowingLayer()
    if kind == "sliding":
        own, grown = DynamicSlidingWindowLayer(sliding_window=4), GrowingSlidingLayer(4)
    found = []
    for layer in (own, grown):
        states = torch.linspace(0.1, 1, 24).view(1, 1, 6, 4).requires_grad_()
        total = 0
        for at in range(6):
            keys, values = layer.update(*2 * [states[:, :, at : at + 1].tanh()])
            total = total + (keys.square() * values).sum()
        total.backward()
        found.append(states.grad)
    torch.testing.assert_close(*found)


def test_what_inference_mode_left_is_continued_outside_of_it():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    keys, _ = layer.update(torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4))
    assert keys.sum(-1).tolist() == [2 * [[4.0, 4.0, 4.0, 0.0, 0.0]]]


def test_room_is_made_at_once_for_what_is_expected():
    layer = GrowingLayer.of(DynamicLayer())
    layer.expect(100)
    for _ in range(100):
        layer.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    assert layer.room(0)[0].shape == (1, 2, 100, 4)
    layer.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    assert layer.keys.shape[-2] == 101
    assert layer.room(0)[0].shape[-2] > 101
