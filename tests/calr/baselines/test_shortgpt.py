"""ShortGPT: the block that does nothing goes first, and what is left is an ordinary model."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from calr.baselines.shortgpt import shortgpt
from calr.errors import CalrError
from calr.testing import tiny_llama


def with_idle(block, blocks=4):
    """A model of which one block adds nothing to the residual stream."""
    model = tiny_llama(num_hidden_layers=blocks)
    with torch.no_grad():
        model.model.layers[block].self_attn.o_proj.weight.zero_()
        model.model.layers[block].mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize("block", [0, 2, 3])
def test_an_idle_block_is_dropped_first_and_nothing_changes(block, ids, device):
    model, ids = with_idle(block).to(device), ids.to(device)
    with torch.no_grad():
        before = model(ids).logits
        assert shortgpt(model, ids, 1) == [block]
        assert len(model.model.layers) == model.config.num_hidden_layers == 3
        torch.testing.assert_close(model(ids).logits, before)


def test_the_rest_saves_loads_and_generates_with_a_cache(ids, tmp_path):
    model = tiny_llama(num_hidden_layers=4)
    shortgpt(model, ids, 2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids[:1], **arguments)
    assert torch.equal(cached, loaded.generate(ids[:1], **arguments, use_cache=False))


def test_dropping_all_blocks_is_refused(ids):
    model = tiny_llama()
    before = copy.deepcopy(model)
    with pytest.raises(CalrError, match="cannot remove 2 of 2 blocks"):
        shortgpt(model, ids, 2)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before(ids).logits)
