"""Attention of one token, and of whole windows, gives what transformers' own gives."""

import contextlib

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from calr.model.attention import NAME, ROWS, attend, causal_attention, fast_attention
from calr.testing import SETTINGS

WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": (transformers.LlamaConfig, {}),
    "without groups": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "one key head": (transformers.LlamaConfig, {"num_key_value_heads": 1}),
    "windows": (transformers.Gemma3TextConfig, {"head_dim": 8} | WINDOWS),
}


def decoded(model, ids, mask):
    """The logits [B, T, V] of tokens that come one by one, after three at once."""
    cache, logits = DynamicCache(config=model.config), []
    for start, end in [(0, 3), *((t, t + 1) for t in range(3, ids.shape[1]))]:
        given = None if mask is None else mask[:, :end]
        found = model(ids[:, start:end], attention_mask=given, past_key_values=cache)
        logits.append(found.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_decoding_is_the_same(name, padded, monkeypatch):
    kind, options = MODELS[name]
    torch.manual_seed(0)
    config = kind(**(SETTINGS | options))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(2, 258, (3, 12))
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
    expected, calls = decoded(model, ids, mask), []
    own = torch.nn.functional.scaled_dot_product_attention

    def counted(query, *arguments, **options):
        calls.append(query.shape)
        return own(query, *arguments, **options)

    monkeypatch.setattr("calr.model.attention.scaled_dot_product_attention", counted)
    with fast_attention():
        found = decoded(model, ids, mask)
    keys = config.num_key_value_heads
    assert calls == [(3, keys, 4 // keys, config.head_dim)] * (2 * 9)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_transformers_own_attention_is_back_after_a_failure():
    before = ALL_ATTENTION_FUNCTIONS[NAME]
    with pytest.raises(RuntimeError, match="stopped"), fast_attention():
        assert ALL_ATTENTION_FUNCTIONS[NAME] is attend
        raise RuntimeError("stopped")
    assert ALL_ATTENTION_FUNCTIONS[NAME] is before


@pytest.mark.parametrize("more", [{"softcap": 30.0}, {"position_bias": torch.zeros(1, 4, 1, 5)}])
def test_what_else_is_asked_of_it_goes_to_transformers(more, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "calr.model.attention.sdpa_attention_forward", lambda *_, **others: asked.append(others)
    )
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8)
    attend(torch.nn.Module(), q, k, k, None, **more)
    assert more.items() <= asked[0].items()


def exact(q, k, v, scale):
    """Causal attention in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = scale * q @ k.mT
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(2, 4, 2, 300, 16, 16), (1, 3, 1, 129, 8, 24), (1, 2, 2, 7, 8, 8)]
)
def test_windows_and_their_gradients_are_exact_within_rounding(shape, dtype):
    b, heads, key_heads, t, d, out = shape
    generator = torch.Generator().manual_seed(0)

    def random(*sizes):
        x = torch.randn(b, t, *sizes, generator=generator).to(dtype)
        return x.transpose(1, 2).requires_grad_()  # as models have them

    given = random(heads, d), random(key_heads, d), random(key_heads, out)
    y, expected = causal_attention(*given, 0.4), exact(*given, 0.4)
    assert y.dtype is dtype
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    pairs = [(y, expected)]
    pairs += zip(
        torch.autograd.grad(y, given, grad.to(dtype)),
        torch.autograd.grad(expected, given, grad),
        strict=True,
    )
    tolerance = 8 * torch.finfo(dtype).eps
    for found, right in pairs:
        error = torch.linalg.vector_norm(found.double() - right.double())
        assert error <= tolerance * torch.linalg.vector_norm(right.double())


@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
def test_what_all_scores_have_in_common_costs_no_precision(offset):
    """As the biases of Qwen2's keys give it; and values, for the gradients of scores."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 200, 16, generator=generator) for _ in range(3))
    q[..., 0], k[..., 0] = 1.0, offset
    v[..., 1] += offset
    given = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    y, expected = causal_attention(*given, 1.0), exact(*given, 1.0)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(y, given, grad.bfloat16())
    right = torch.autograd.grad(expected, given, grad)
    for a, b in ((y, expected), *zip(found, right, strict=True)):
        assert torch.linalg.vector_norm(a.double() - b) <= 0.03 * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_bfloat16_attends_to_windows_in_parts(name, monkeypatch):
    kind, options = MODELS[name]
    torch.manual_seed(0)
    config = kind(**(SETTINGS | options))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(2, 258, (2, ROWS + 5))
    calls = []
    monkeypatch.setattr(
        "calr.model.attention.causal_attention",
        lambda *given: calls.append(given[0].dtype) or causal_attention(*given),
    )
    once = [torch.bfloat16] * (1 if name == "windows" else 2)  # the other of its blocks has a mask
    with fast_attention():
        for how in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
            with how:
                expected = model(ids).logits
        assert calls == once  # by autocast alone
        padded = torch.ones_like(ids).index_fill_(1, torch.tensor([0]), 0)
        with torch.autocast("cpu", torch.bfloat16):
            model(ids[:, :ROWS])
            model(ids, attention_mask=padded)
        assert calls == once
        found = model.bfloat16()(ids).logits
        assert calls == 2 * once
    error = torch.linalg.vector_norm(found.double() - expected.double())
    assert error <= 0.02 * torch.linalg.vector_norm(expected.double())


def test_attention_that_somebody_registered_stays(monkeypatch):
    def own(*given, **others):
        return sdpa_attention_forward(*given, **others)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, NAME, own)
    with fast_attention():
        assert ALL_ATTENTION_FUNCTIONS[NAME] is own
