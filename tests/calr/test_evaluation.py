"""Perplexity against cases with a known answer."""

import math

import pytest
import torch

from calr.errors import CalrError
from calr.evaluation import compare, perplexity
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


@torch.no_grad()
def test_a_comparison_is_the_divergence_of_the_two_models(ids):
    dense, model = tiny_llama(), tiny_llama(seed=1)
    found = compare(model, dense, ids[:2])
    log_p, log_q = (m(ids[:2]).logits[:, :-1].double().log_softmax(-1) for m in (dense, model))
    assert found.kl == pytest.approx(
        float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5
    )
    same = log_p.argmax(-1) == log_q.argmax(-1)
    assert found.agreement == pytest.approx(float(same.double().mean()))
    ratio = perplexity(model, ids[:2]).perplexity / perplexity(dense, ids[:2]).perplexity
    assert found.ratio == pytest.approx(ratio, rel=1e-5)


@torch.no_grad()
def test_a_token_that_both_models_rule_out_costs_nothing(ids):
    dense, model = tiny_llama(), tiny_llama(seed=1)
    expected = compare(model, dense, ids[:1])
    never = int((torch.bincount(ids[0], minlength=dense.config.vocab_size) == 0).nonzero()[0])
    for one in (dense, model):
        one.lm_head.register_forward_hook(
            lambda module, given, y: y.index_fill(-1, torch.tensor([never]), -math.inf)
        )
    found = compare(model, dense, ids[:1])
    assert found.kl == pytest.approx(expected.kl, rel=0.1)
