"""Models that calr cannot run as it must are refused in one sentence that says why."""

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import calr
from calr.errors import CalrError
from calr.testing import tiny_llama

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "head_dim": 8,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "pad_token_id": 1,
}
REFUSED = {
    "RwkvConfig": ({"attention_hidden_size": 32, "context_length": 128}, "run one by one"),
    "BambaConfig": (
        {
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "attn_layer_indices": [1],
        },
        "run one by one",
    ),
    "HrmTextConfig": ({}, "more than once a pass"),
    "FalconConfig": ({"new_decoder_architecture": True}, "FalconLinear is not nn.Linear"),
    "BertConfig": ({}, "is not causal"),
}


def compressed(model, ids):
    recipe = calr.Recipe(keep=0.7, rank_step=2, correction_tokens=0)
    return calr.compress(model, recipe, calibration=ids)


def built(name, options):
    torch.manual_seed(0)
    left_out = {"head_dim"} if name == "FalconConfig" else set()
    settings = {k: v for k, v in SMALL.items() if k not in left_out} | options
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings)).eval()


@pytest.mark.parametrize("name", REFUSED)
def test_an_unusual_family_is_refused_by_reason(name, ids):
    options, reason = REFUSED[name]
    with pytest.raises(CalrError, match=reason):
        compressed(built(name, options), ids)


def test_embeddings_that_are_changed_in_place_are_fine(ids):
    """CTRL scales them in place, before the gradient statistics' backward pass."""
    model = compressed(built("CTRLConfig", {"dff": 80}), ids)
    assert model.config.quantization_config.layers
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_with_an_adapter_is_refused(wrapped, ids):
    model = tiny_llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(CalrError, match="is a PEFT adapter; merge it"):
        compressed(adapted if wrapped else model, ids)
    assert compressed(adapted.merge_and_unload(), ids).config.quantization_config.layers
