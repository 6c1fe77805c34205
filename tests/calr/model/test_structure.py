"""Blocks, layers and input groups of the real model classes, at a tiny size."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import calr
from calr.errors import CalrError
from calr.model import analyse, find_blocks
from calr.testing import tiny_llama

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
SUPPORTED = {
    "LlamaConfig": {},
    "Qwen2Config": {},
    "Qwen3Config": {"head_dim": 8},
    "Gemma2Config": {"head_dim": 16},
    "Gemma3TextConfig": {
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "MistralConfig": {},
    "Phi3Config": {},
}
REFUSED = {
    "GPT2Config": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, r"c_attn: is a Conv1D"),
    "Gemma3Config": ({}, "is multimodal"),
    "Llama4TextConfig": (
        {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 80},
        r"feed_forward\.experts\.gate_up_proj.*% .* stacked weights of experts",
    ),
}


def build(name, options, device="cpu"):
    config = getattr(transformers, name)(**({} if name == "Gemma3Config" else COMMON) | options)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", SUPPORTED)
def test_groups_are_the_layers_that_read_one_input(name):
    structure = analyse(build(name, SUPPORTED[name]))
    groups: dict[str, list[str]] = {}
    for layer in structure.in_block(1):
        groups.setdefault(layer.group, []).append(layer.name.rpartition(".")[2])
    expected = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    if name == "Phi3Config":
        expected = [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]
    assert list(groups.values()) == expected
    assert structure.coverage > 0.98
    assert structure == analyse(build(name, SUPPORTED[name], device="meta"))


@pytest.mark.parametrize("name", SUPPORTED)
def test_compress_save_load_and_undo(name, ids, tmp_path):
    ids = ids % 96
    model = build(name, SUPPORTED[name])
    dense = model(ids).logits
    calr.compress(model, calr.Recipe(keep=0.7, rank_step=2, correction_tokens=0), calibration=ids)
    error = (model(ids).logits - dense).norm() / dense.norm()
    assert 1e-4 < error < 0.5
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    undone = loaded.dequantize()
    assert not any(isinstance(m, calr.LowRankLinear) for m in undone.modules())
    assert not hasattr(undone.config, "quantization_config")
    torch.testing.assert_close(undone(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_unsupported_is_named(name):
    options, message = REFUSED[name]
    device = "meta" if name == "Gemma3Config" else "cpu"  # its default size is that of the 4B model
    with pytest.raises(CalrError, match=message):
        analyse(build(name, options, device))


def test_a_compressed_model_is_refused(ids):
    model = calr.compress(tiny_llama(), calr.Recipe(keep=0.7, correction_tokens=0), calibration=ids)
    with pytest.raises(CalrError, match="compressed already"):
        calr.compress(model, calr.Recipe(keep=0.5), calibration=ids)


def test_a_quantised_model_is_refused():
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(CalrError, match=r"quantised already \(bitsandbytes\)"):
        analyse(model)


def test_a_shared_layer_is_refused():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(CalrError, match=r"layers\.1\.mlp\.up_proj: shares its weight"):
        analyse(model)


def test_a_skip_pattern_that_matches_nothing_is_refused():
    with pytest.raises(CalrError, match="matches none of the 14 linear layers"):
        analyse(tiny_llama(), ["*.wrong"])


def test_blocks_without_weights_are_refused():
    with torch.device("meta"), pytest.raises(CalrError, match=r"model.layers: .* no weights"):
        analyse(tiny_llama(hidden_size=0, head_dim=8))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(CalrError, match="no list of decoder blocks"):
        find_blocks(torch.nn.Linear(2, 2))
