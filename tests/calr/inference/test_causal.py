"""The head behind a decoder's blocks in one native call: the logits of the model's forward."""

import copy
import inspect

import pytest
import torch
import transformers
from transformers import DynamicCache

from calr.inference import optimize_for_inference
from calr.inference.causal import CausalForward
from calr.testing import tiny_llama


def step(model, **more):
    """What a model gives for a token behind six others."""
    cache, ids = DynamicCache(config=model.config), torch.arange(3, 17).view(2, 7)
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        return model(ids[:, 6:], past_key_values=cache, **more)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_it_gives_the_logits_of_the_decoder_and_the_head(tied, pack, dtype, heads):
    model = tiny_llama(tie_word_embeddings=tied).to(dtype)
    expected = step(model).logits
    fast = optimize_for_inference(model, pack=pack)
    assert type(vars(fast)["forward"]) is CausalForward
    heads.clear()
    found = step(fast)
    assert len(heads) == 1 and heads[0] is not None
    assert found.logits.shape == expected.shape and found.logits.dtype is dtype
    assert torch.equal(found.logits, fast.lm_head(step(fast.model).last_hidden_state))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(found.logits, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_what_the_head_would_not_do_is_left_to_the_model(heads):
    model = tiny_llama()
    fast = optimize_for_inference(copy.deepcopy(model))
    asked = {
        "labels": torch.full((2, 1), 5),  # which no logits precede: a loss of NaN
        "return_dict": False,
        "output_hidden_states": True,
        "logits_to_keep": torch.tensor([0]),
    }
    for name, value in asked.items():
        expected, found = (step(m, **{name: value}) for m in (model, fast))
        assert type(found) is type(expected) and len(found) == len(expected)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5, equal_nan=True)


@torch.no_grad()
def test_a_hook_on_the_head_is_called(heads):
    model = tiny_llama()
    fast = optimize_for_inference(copy.deepcopy(model))
    heads.clear()
    fast.lm_head.register_forward_hook(lambda module, given, output: 2 * output)
    torch.testing.assert_close(step(fast).logits, 2 * step(model).logits, rtol=1e-5, atol=1e-5)
    assert heads == [None], "the blocks run natively, the head as a module"


@torch.no_grad()
def test_a_head_that_changes_is_noticed():
    fast = optimize_for_inference(tiny_llama(tie_word_embeddings=False), pack=True)
    before = step(fast).logits
    fast.lm_head.weight.mul_(2)
    torch.testing.assert_close(step(fast).logits, 2 * before)
    fast.lm_head.weight = torch.nn.Parameter(fast.lm_head.weight * 2)
    torch.testing.assert_close(step(fast).logits, 4 * before)


@pytest.mark.parametrize(
    ("kind", "own"),
    [("Gemma2", {"final_logit_softcapping": 0.1}), ("Granite", {"logits_scaling": 2})],
)
def test_a_head_of_another_form_keeps_its_own_forward(kind, own):
    """Their logits are capped or scaled."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**small, **own)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    expected = step(copy.deepcopy(model)).logits
    torch.testing.assert_close(
        step(optimize_for_inference(model)).logits, expected, rtol=1e-5, atol=1e-5
    )


def test_a_cap_shows_even_where_logits_are_small():
    """The model is optimised before it gets the weights whose logits the cap bends."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    config = transformers.Gemma3TextConfig(
        **small, final_logit_softcapping=2.0, initializer_range=1.0
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    fast, weights = copy.deepcopy(model), model.state_dict()
    with torch.no_grad():
        fast.lm_head.weight.zero_()
    optimize_for_inference(fast).load_state_dict(weights)
    torch.testing.assert_close(step(fast).logits, step(model).logits, rtol=1e-5, atol=1e-5)


def test_a_forward_of_the_models_own_is_kept():
    model = tiny_llama()
    expected, own = 2 * step(model).logits, model.forward

    def doubled(*given, **more):
        found = own(*given, **more)
        found.logits = 2 * found.logits
        return found

    model.forward = doubled
    fast = optimize_for_inference(model)
    assert fast.forward is doubled
    torch.testing.assert_close(step(fast).logits, expected, rtol=1e-5, atol=1e-5)


class OtherArguments(transformers.LlamaForCausalLM):
    """A forward of fewer arguments, in another order, and with one more, as remote code has."""

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, kinds=None):
        given = {"past_key_values": past_key_values, "attention_mask": attention_mask}
        found = super().forward(input_ids, **given)
        found.logits = found.logits + (0 if kinds is None else 1)
        return found


@torch.no_grad()
def test_a_forward_of_other_arguments_is_called_with_them():
    model = tiny_llama()
    model.__class__ = OtherArguments
    fast = optimize_for_inference(copy.deepcopy(model))
    assert type(vars(fast)["forward"]) is CausalForward
    names = [list(inspect.signature(m.forward).parameters) for m in (model, fast)]
    assert names[0] == names[1]
    ids, found = torch.arange(3, 17).view(2, 7), []
    for m in (model, fast):
        cache = DynamicCache(config=m.config)
        mask = torch.ones(2, 7).tril(5)  # of the second sequence, the first position is padding
        first = m(ids[:, :6], cache, mask[:, :6].flip(1))
        second = m(ids[:, 6:], cache, torch.cat([mask[:, :6].flip(1), mask[:, 6:]], 1))
        found.append([first.logits, second.logits, m(ids, kinds=ids).logits])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_scaled_logits_are_not_taken_for_plain_ones():
    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, *given, **more):
            found = super().forward(*given, **more)
            found.logits = found.logits * 1.5
            return found

    model = tiny_llama()
    expected = step(model).logits * 1.5
    model.__class__ = Scaled
    fast = optimize_for_inference(model)
    assert "forward" not in vars(fast)
    torch.testing.assert_close(step(fast).logits, expected, rtol=1e-5, atol=1e-5)


def test_its_arguments_are_those_that_transformers_looks_for():
    """`generate` asks the signature which arguments a model takes."""
    own = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    taken = inspect.signature(optimize_for_inference(tiny_llama()).forward).parameters
    assert list(taken) == [name for name in own if name != "self"]
