"""Attention that reads shared keys and values once gives what transformers' own gives."""

import pytest
import torch
import transformers
from transformers import DynamicCache

from calr.inference.grouped import NAME, attend_grouped, grouped_attention
from calr.testing import SETTINGS, tiny_llama

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
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(query, *arguments, **options):
        calls.append(query.shape)
        return attend(query, *arguments, **options)

    monkeypatch.setattr("calr.inference.grouped.scaled_dot_product_attention", counted)
    with grouped_attention(model):
        found = decoded(model, ids, mask)
    keys = config.num_key_value_heads
    assert calls == [(3, keys, 4 // keys, config.head_dim)] * (2 * 9)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_the_models_own_attention_is_back_after_a_failure_and_others_stay():
    model = tiny_llama(attn_implementation="sdpa")
    with pytest.raises(RuntimeError, match="stopped"), grouped_attention(model):
        assert model.config._attn_implementation == NAME
        raise RuntimeError("stopped")
    assert model.config._attn_implementation == "sdpa"
    eager = tiny_llama(attn_implementation="eager")
    with grouped_attention(eager):
        assert eager.config._attn_implementation == "eager"


def test_a_cap_on_scores_is_not_passed_over():
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8)
    with pytest.raises(ValueError, match="softcap"):
        attend_grouped(torch.nn.Module(), q, k, k, None, softcap=30.0)
