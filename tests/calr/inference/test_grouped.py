"""Attention that reads shared keys and values once gives what transformers' own gives."""

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from calr.inference.grouped import NAME, attend_grouped, grouped_attention
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
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(query, *arguments, **options):
        calls.append(query.shape)
        return attend(query, *arguments, **options)

    monkeypatch.setattr("calr.inference.grouped.scaled_dot_product_attention", counted)
    with grouped_attention():
        found = decoded(model, ids, mask)
    keys = config.num_key_value_heads
    assert calls == [(3, keys, 4 // keys, config.head_dim)] * (2 * 9)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_transformers_own_attention_is_back_after_a_failure():
    before = ALL_ATTENTION_FUNCTIONS[NAME]
    with pytest.raises(RuntimeError, match="stopped"), grouped_attention():
        assert ALL_ATTENTION_FUNCTIONS[NAME] is attend_grouped
        raise RuntimeError("stopped")
    assert ALL_ATTENTION_FUNCTIONS[NAME] is before


@pytest.mark.parametrize("more", [{"softcap": 30.0}, {"position_bias": torch.zeros(1, 4, 1, 5)}])
def test_what_else_is_asked_of_it_goes_to_transformers(more, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "calr.inference.grouped.sdpa_attention_forward", lambda *_, **others: asked.append(others)
    )
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8)
    attend_grouped(torch.nn.Module(), q, k, k, None, **more)
    assert more.items() <= asked[0].items()
