"""A model decodes natively for a while, and nothing of it stays."""

import pytest
import torch
import transformers
from transformers import DynamicCache

from calr.inference import optimize_for_inference
from calr.inference.causal import CausalForward
from calr.inference.temporary import decoding_natively, may_decode
from calr.testing import SETTINGS, tiny_llama
from calr_kernels import native


def step(model):
    cache, ids = DynamicCache(config=model.config), torch.arange(3, 17).view(2, 7)
    model(ids[:, :6], past_key_values=cache)
    return model(ids[:, 6:], past_key_values=cache).logits


def weights(model):
    return [m.weight for m in model.modules() if type(m) is torch.nn.Linear]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forwards_and_panels_are_as_before(dtype, heads):
    model = tiny_llama().to(dtype)
    assert native.pack(model.lm_head.weight)  # somebody has
    held = native.packed_bytes(weights(model))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), decoding_natively(model) as natively:
            assert natively and native.packed_bytes(weights(model)) > held
            heads.clear()
            step(model)
            assert len(heads) == 1 and heads[0] is not None
            raise KeyboardInterrupt
        assert not any("forward" in vars(module) for module in model.modules())
        assert native.packed_bytes(weights(model)) == held > 0
    fast = optimize_for_inference(model)
    with decoding_natively(fast) as again:
        assert not again
    assert type(vars(fast)["forward"]) is CausalForward


def test_names_and_sequences_say_what_may_decode():
    model = tiny_llama()
    assert may_decode(model, torch.float32, 16) and not may_decode(model, torch.float32, 17)
    assert not may_decode(model, torch.float64, 1)
    with torch.device("meta"):
        assert may_decode(tiny_llama(), torch.bfloat16, 8)
    experts = transformers.MixtralConfig(**SETTINGS, num_local_experts=2)
    mixture = transformers.AutoModelForCausalLM.from_config(experts)
    assert not may_decode(mixture, torch.float32, 1)
