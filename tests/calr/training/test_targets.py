"""Targets: the coarse divergence against its definition, bounds, gradients, reuse."""

import pytest
import torch

from calr.storage import Store
from calr.testing import VOCABULARY, tiny_llama
from calr.training import targets as module
from calr.training.targets import _Divergence, collect_targets, divergence


def definition(logits, log_t, tokens, following, share):
    """By autograd in float64: (1 - s) (Σ t log(t / p) + T log(T / P)) - s log p_y, row means."""
    log_p = logits.double().log_softmax(-1)
    log_y, log_p = log_p.gather(-1, following)[:, 0], log_p.gather(-1, tokens)
    t, s = log_t.double().exp(), share[:, 0].double()
    rest_t, rest_p = 1 - t.sum(-1), 1 - log_p.exp().sum(-1)
    divergences = (t * (log_t - log_p)).sum(-1) + rest_t * (rest_t / rest_p).log()
    return ((1 - s) * divergences - s * log_y).mean()


def problem(share=0.0, rows=5, vocabulary=11, top=4, dtype=torch.float64):
    """Logits, the top of other logits, and the tokens that follow: inside the top and outside."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=dtype)
    dense = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    log_t, tokens = dense.log_softmax(-1).topk(top)
    following = torch.cat([tokens[:2, :1], dense.argmin(-1, keepdim=True)[2:]])
    shares = torch.full((rows, 1), share)
    shares[-1] = 0
    return logits.requires_grad_(), log_t.to(dtype), tokens, following, shares


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_value_and_gradient_are_those_of_the_definition(share):
    logits, *rest = problem(share)
    found = _Divergence.apply(logits, *rest)
    expected = definition(logits, *rest)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    expected_gradient = torch.autograd.grad(expected, logits)[0]
    assert torch.allclose(torch.autograd.grad(found, logits)[0], expected_gradient, atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: _Divergence.apply(z, *rest), logits)


def test_cross_entropy_is_with_the_next_token_of_the_window(ids, device, monkeypatch):
    monkeypatch.setattr(module, "mixed", lambda model: torch.autocast("cpu", enabled=False))
    model = tiny_llama(seed=1).to(device)
    targets = collect_targets(tiny_llama().to(device), ids, Store())
    found = divergence(model, targets, cross_entropy=0.3)
    shares = torch.full(ids.shape, 0.3)
    shares[:, -1] = 0  # nothing follows
    following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    with torch.no_grad():
        logits = model(ids.to(device)).logits.cpu().flatten(0, 1)
    flat = targets.log_probabilities.flatten(0, 1), targets.tokens.long().flatten(0, 1)
    expected = definition(logits, *flat, following.view(-1, 1), shares.view(-1, 1))
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_the_dense_model_is_at_no_distance_from_itself(ids, device, monkeypatch):
    monkeypatch.setattr(module, "mixed", lambda model: torch.autocast("cpu", enabled=False))
    model = tiny_llama().to(device)
    found = divergence(model, collect_targets(model, ids, Store()))
    assert found.detach().abs() < 1e-4  # targets are float16


def test_it_bounds_the_whole_divergence_and_grows_with_top(ids, device, monkeypatch):
    monkeypatch.setattr(module, "mixed", lambda model: torch.autocast("cpu", enabled=False))
    student, dense, found = tiny_llama(seed=1).to(device), tiny_llama().to(device), []
    for top in (4, 64, 1000):
        monkeypatch.setattr(module, "TOP", top)
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
    monkeypatch.setattr(module, "_most_probable", None)
    again = collect_targets(tiny_llama(), ids, Store(tmp_path))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.log_probabilities, again.log_probabilities)


def test_a_distribution_within_the_top_tokens_gives_finite_numbers():
    logits, log_t, *rest = problem(0.5, dtype=torch.float32)
    sure = torch.full_like(log_t, -30.0)
    sure[:, 0] = 0.0
    loss = _Divergence.apply(logits, sure, *rest)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
