"""Perplexity against cases with a known answer."""

import math

import pytest
import torch

from calr.errors import CalrError
from calr.evaluation import perplexity
from calr.testing import VOCABULARY, tiny_llama


def test_a_model_that_knows_nothing_has_the_vocabularys_perplexity(ids):
    model = tiny_llama()
    model.model.norm.weight.data.zero_()
    result = perplexity(model, ids)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert (result.windows, result.window, result.predicted_tokens) == (8, 32, 8 * 31)


def test_it_is_the_mean_over_predicted_tokens(ids):
    model = tiny_llama()
    with torch.no_grad():
        log = model(ids).logits.double().log_softmax(-1)
    nats = [-log[s, t, ids[s, t + 1]] for s in range(8) for t in range(31)]
    expected = math.exp(torch.stack(nats).mean())
    assert perplexity(model, ids).perplexity == pytest.approx(expected, rel=1e-5)


def test_damaged_models_and_empty_texts_are_refused(ids):
    model = tiny_llama()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(CalrError, match="NaN or infinity"):
        perplexity(model, ids)
    with pytest.raises(CalrError, match=r"evaluation ids \[0, 4\]"):
        perplexity(model, torch.ones(0, 4).long())
