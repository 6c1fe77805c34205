"""Targets: the coarse divergence against its definition, bounds, gradients, reuse."""

import pytest
import torch

from calr import teacher
from calr.store import Store
from calr.teacher import _Divergence, collect_targets, divergence
from calr.testing import VOCABULARY, tiny_llama


def coarse(logits, log_t, tokens):
    """The definition, by autograd in float64: Σ t log(t / p) + T log(T / P), mean over rows."""
    log_p = logits.double().log_softmax(-1).gather(-1, tokens)
    t = log_t.double().exp()
    rest_t, rest_p = 1 - t.sum(-1), 1 - log_p.exp().sum(-1)
    return ((t * (log_t - log_p)).sum(-1) + rest_t * (rest_t / rest_p).log()).mean()


def problem(rows=5, vocabulary=11, top=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=dtype)
    dense = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    log_t, tokens = dense.log_softmax(-1).topk(top)
    return logits.requires_grad_(), log_t.to(dtype), tokens


def test_value_and_gradient_are_those_of_the_definition():
    logits, log_t, tokens = problem()
    found = _Divergence.apply(logits, log_t, tokens)
    expected = coarse(logits, log_t, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    expected_gradient = torch.autograd.grad(expected, logits)[0]
    assert torch.allclose(torch.autograd.grad(found, logits)[0], expected_gradient, atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: _Divergence.apply(z, log_t, tokens), logits)


def test_the_dense_model_is_at_no_distance_from_itself(ids, device, monkeypatch):
    monkeypatch.setattr(teacher, "mixed", lambda model: torch.autocast("cpu", enabled=False))
    model = tiny_llama().to(device)
    found = divergence(model, collect_targets(model, ids, Store()))
    assert found.detach().abs() < 1e-4  # targets are float16


def test_it_bounds_the_whole_divergence_and_grows_with_top(ids, device, monkeypatch):
    monkeypatch.setattr(teacher, "mixed", lambda model: torch.autocast("cpu", enabled=False))
    student, dense, found = tiny_llama(seed=1).to(device), tiny_llama().to(device), []
    for top in (4, 64, 1000):
        monkeypatch.setattr(teacher, "TOP", top)
        targets = collect_targets(dense, ids, Store())
        assert targets.tokens.shape[-1] == min(top, VOCABULARY - 1)
        found.append(float(divergence(student, targets).detach()))
    with torch.no_grad():
        t, p = (m(ids.to(device)).logits.double().log_softmax(-1) for m in (dense, student))
    whole = float((t.exp() * (t - p)).sum(-1).mean())
    assert found[0] < found[1] < found[2]
    assert found[2] == pytest.approx(whole, rel=1e-3)


def test_known_text_is_not_run_again(ids, tmp_path, monkeypatch):
    first = collect_targets(tiny_llama(), ids, Store(tmp_path))
    monkeypatch.setattr(teacher, "_most_probable", None)
    again = collect_targets(tiny_llama(), ids, Store(tmp_path))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.log_probabilities, again.log_probabilities)


def test_a_distribution_within_the_top_tokens_gives_finite_numbers():
    logits, log_t, tokens = problem(dtype=torch.float32)
    sure = torch.full_like(log_t, -30.0)
    sure[:, 0] = 0.0
    loss = _Divergence.apply(logits, sure, tokens)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
