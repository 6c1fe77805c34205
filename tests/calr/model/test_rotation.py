"""The rotation: the same function, weights more alike; what is of another form stays as it is."""

import peft
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import calr
from calr.integrations.experts import take_apart
from calr.model import analyse, load, present, rotate, rotation
from calr.storage import Store
from calr.testing import byte_tokenizer, tiny_llama


def apart(model):
    take_apart(model)
    return model


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 258, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
SUITED = {
    "Llama": lambda: tiny_llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "Mixtral": lambda: apart(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))),
    "Qwen3Moe": lambda: apart(
        Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
            )
        )
    ),
    "Phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
}
OTHERS = {
    "tied": lambda: tiny_llama(),
    "norms behind writers": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8)),
    "layer norms": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=258,
        )
    ),
}  # fmt: skip


def at_random(make, dtype=torch.float32):
    """A model whose norms and biases are not 1 and 0."""
    torch.manual_seed(0)
    model = make().eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand(parameter.shape, generator=draw) / 2)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", SUITED)
def test_the_logits_are_the_same_and_norms_are_ones(family, dtype, ids):
    model = at_random(SUITED[family], dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        wanted = model(ids).logits.float()
        assert rotate(model, analyse(model))
        error = (model(ids).logits.float() - wanted).norm() / wanted.norm()
    assert error < (1e-5 if dtype == torch.float32 else 4e-2)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            assert torch.equal(parameter, torch.ones_like(parameter))
        elif parameter.dim() == 2:
            assert not torch.equal(parameter, before[name])
        assert parameter.dtype == dtype


@pytest.mark.parametrize("family", OTHERS)
def test_a_model_of_another_form_stays_as_it_is(family):
    model = at_random(OTHERS[family])
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert not rotate(model, analyse(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_interrupted_it_leaves_the_model_as_it_was(monkeypatch):
    model = at_random(SUITED["Llama"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    whole = rotation._Turn.all

    def interrupted(*arguments):
        whole(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(rotation._Turn, "all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rotate(model, analyse(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_one_large_channel_is_spread():
    model = tiny_llama(tie_word_embeddings=False)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[:, 3] *= 30
    before = float(weight.abs().max() / weight.square().mean().sqrt())
    assert rotate(model, analyse(model))
    after = float(weight.abs().max() / weight.square().mean().sqrt())
    assert after < 0.7 * before


def test_absent_matrices_are_turned_into_files(ids, tmp_path):
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    whole, lazy = (load(str(tmp_path / "dense"), lazily=lazily)[0] for lazily in (False, True))
    store = Store(tmp_path / "rotated")
    assert rotate(whole, analyse(whole)) and rotate(lazy, analyse(lazy), keep=store.keep)
    found, wanted = lazy.state_dict(keep_vars=True), whole.state_dict()
    for name, tensor in wanted.items():
        assert torch.equal(present(found[name]), tensor), name
    with torch.no_grad():
        assert torch.equal(lazy(ids).logits, whole(ids).logits)


def test_a_seed_draws_the_same_and_another_another():
    made = []
    for seed in (0, 0, 1):
        model = tiny_llama(tie_word_embeddings=False)
        rotate(model, analyse(model), seed)
        made.append(model.model.embed_tokens.weight)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("rotated", [False, True])
def test_an_adapter_of_the_dense_model_serves_one_that_is_not_rotated(rotated, ids):
    adapted = []
    for recipe in (None, calr.Recipe(bits=9, rotate=rotated, scale_group=32, correction_tokens=0)):
        model = tiny_llama(tie_word_embeddings=False)
        if recipe is not None:
            model = calr.compress(model, recipe, calibration=ids)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["up_proj", "o_proj"], init_lora_weights=False)
        adapted.append(peft.get_peft_model(model, config).eval())
    with torch.no_grad():
        wanted, found = (model(ids).logits for model in adapted)
    error = float((found - wanted).norm() / wanted.norm())
    assert error > 0.5 if rotated else error < 0.05


@pytest.mark.parametrize("asked", [True, False])
def test_a_checkpoint_says_whether_it_was(asked, ids, tmp_path):
    recipe = calr.Recipe(bits=9, rotate=asked, scale_group=32, correction_tokens=512)
    recipe = calr.Recipe(**{**recipe.to_dict(), "window": 32, "step_tokens": 64})
    dense = tiny_llama(tie_word_embeddings=False)
    model = calr.compress(
        tiny_llama(tie_word_embeddings=False), recipe, calibration=ids.repeat(3, 1)
    )
    assert model.config.quantization_config.recipe["rotated"] is asked
    with torch.no_grad():
        wanted = dense(ids).logits
        assert (model(ids).logits - wanted).norm() < 0.05 * wanted.norm()
