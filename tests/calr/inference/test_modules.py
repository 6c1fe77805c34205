"""Prepared for inference, modules give the same outputs, and stay modules like any other."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import prune
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import calr
from calr.inference import optimize_for_inference
from calr.inference.modules import (
    AttentionForward,
    DenseForward,
    GatedForward,
    NormForward,
)
from calr.testing import tiny_llama
from calr_kernels import native


def prepared(ids, compressed=True, dtype=torch.float32, **config):
    """A model as it is, and prepared, but for its decoder as a whole."""
    model = tiny_llama(**config)
    if compressed:
        recipe = calr.Recipe(keep=0.6, rank_step=2, correction_tokens=0)
        model = calr.compress(model, recipe, calibration=ids)
    model = model.to(dtype).eval()
    fast = optimize_for_inference(copy.deepcopy(model))
    vars(fast.model).pop("forward", None)
    return model, fast


@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_outputs_are_equal(compressed, dtype, ids):
    plain, fast = prepared(ids, compressed, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for rows in (1, 3, 32):
        expected = plain(ids[:1, :rows]).logits
        found = fast(ids[:1, :rows]).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    if dtype == torch.float32:
        options = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(
            fast.generate(ids[:1, :4], **options), plain.generate(ids[:1, :4], **options)
        )


@torch.no_grad()
def test_a_pruned_bias_is_applied(ids):
    model, x = tiny_llama(mlp_bias=True), torch.randn(1, 32)
    gate = model.model.layers[0].mlp.gate_proj
    nn.init.ones_(gate.bias)
    prune.custom_from_mask(gate, "bias", torch.arange(80) % 2)
    mlp = model.model.layers[0].mlp
    expected = gate(x), mlp(x)
    optimize_for_inference(model)
    torch.testing.assert_close((gate(x), mlp(x)), expected)


def test_what_is_replaced(ids):
    _, fast = prepared(ids)
    for block in fast.model.layers:
        assert isinstance(vars(block.mlp)["forward"], GatedForward)
        assert isinstance(vars(block.input_layernorm)["forward"], NormForward)
        assert isinstance(vars(block.self_attn)["forward"], AttentionForward)
        for linear in block.self_attn.children():
            assert "forward" not in vars(getattr(linear, "down", nn.Identity()))
    assert isinstance(vars(fast.lm_head)["forward"], DenseForward)


def test_a_block_of_another_form_is_left_alone(ids):
    model = tiny_llama()
    kind = type(model.model.layers[0].mlp)

    class Doubled(kind):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[0].mlp.__class__ = Doubled
    optimize_for_inference(model)
    assert "forward" not in vars(model.model.layers[0].mlp)
    assert "forward" in vars(model.model.layers[1].mlp)


@torch.no_grad()
def test_hooks_and_adapters_are_not_bypassed(ids):
    plain, fast = prepared(ids)
    for model in (plain, fast):
        layer = model.model.layers[0].mlp.up_proj
        layer.register_forward_hook(lambda module, arguments, output: output + 1)
        model.model.layers[1].mlp.gate_proj.down.register_forward_hook(
            lambda module, arguments, output: 2 * output
        )
    expected = plain(ids[:1, :2]).logits
    torch.testing.assert_close(fast(ids[:1, :2]).logits, expected, rtol=0, atol=1e-5)


def test_training_saving_and_copying_still_work(ids, tmp_path):
    plain, fast = prepared(ids)
    assert list(plain.state_dict()) == list(fast.state_dict())
    fast(ids[:1, :2], labels=ids[:1, :2]).loss.backward()
    assert fast.model.layers[0].mlp.up_proj.weight.grad is not None
    other = copy.deepcopy(fast)
    with torch.no_grad():
        fast.lm_head.weight.zero_()
        expected = plain(ids[:1, :2]).logits
        torch.testing.assert_close(other(ids[:1, :2]).logits, expected, rtol=0, atol=1e-5)
        assert not fast(ids[:1, :2]).logits.any()
    other.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, plain(ids).logits)


@torch.no_grad()
def test_weights_loaded_later_are_used(ids):
    plain, fast = prepared(ids)
    fast(ids[:1, :2])
    for model in (plain, fast):
        torch.manual_seed(5)
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.1
    expected = plain(ids[:1, :2]).logits
    torch.testing.assert_close(fast(ids[:1, :2]).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_another_activation_is_used(ids):
    plain, fast = prepared(ids)
    for model in (plain, fast):
        model.model.layers[0].mlp.act_fn = nn.ReLU()
    expected = plain(ids[:1, :2]).logits
    torch.testing.assert_close(fast(ids[:1, :2]).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "asked", ["", "padded", "eager", "cache of fixed length", "hook", "window"]
)
def test_decoding_step_by_step(asked, dtype, ids, monkeypatch):
    config = {"attn_implementation": "eager"} if asked == "eager" else {}
    plain, fast = prepared(ids, dtype=dtype, **config)
    calls, attend = [], native.attend
    monkeypatch.setattr(native, "attend", lambda *a: calls.append(1) or attend(*a))
    found = []
    for model in (plain, fast):
        if asked == "hook":
            layer = model.model.layers[0].self_attn.k_proj
            layer.register_forward_hook(lambda module, arguments, output: 2 * output)
        cache = DynamicCache()
        if asked == "cache of fixed length":
            cache = StaticCache(model.config, max_cache_len=16)
        elif asked == "window":
            cache.layers = [DynamicSlidingWindowLayer(sliding_window=4) for _ in range(2)]
        mask = torch.ones(3, 9, dtype=torch.long)
        if asked == "padded":
            mask[1, :2] = 0
        logits = []
        for begin, end in ((0, 4), (4, 5), (5, 6), (6, 8), (8, 9)):
            step = model(ids[:3, begin:end], past_key_values=cache, attention_mask=mask[:, :end])
            logits.append(step.logits)
        found.append(torch.cat(logits, 1))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-1  # of logits up to 4
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=tolerance)
    assert len(calls) == {"": 6, "hook": 3, "window": 6}.get(asked, 0)  # of 3 steps, 2 layers


@torch.no_grad()
@pytest.mark.parametrize("form", ["scaled", "sink", "norm", "interleaved"])
def test_attention_of_another_form_is_left_alone(form):
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    kind = type(attention)

    class Scaled(kind):
        def forward(self, hidden_states, *rest, **named):
            return super().forward(hidden_states / 2, *rest, **named)

    class Interleaved(kind):  # GPT-J's pairs
        def forward(self, hidden_states, position_embeddings, *rest, **named):
            turned = tuple(p.unflatten(-1, (2, -1)).mT.flatten(-2) for p in position_embeddings)
            return super().forward(hidden_states, turned, *rest, **named)

    if form == "sink":
        attention.sinks = nn.Parameter(torch.zeros(4))
    elif form == "norm":
        attention.q_norm = nn.Identity()
    else:
        attention.__class__ = Scaled if form == "scaled" else Interleaved
    optimize_for_inference(model)
    assert "forward" not in vars(attention)
    assert "forward" in vars(model.model.layers[1].self_attn)


@torch.no_grad()
@pytest.mark.parametrize("form", ["offset", "subclass", "other epsilon"])
def test_a_norm_of_another_form_is_left_alone(form):
    model, x = tiny_llama(), torch.randn(2, 32)
    norm = model.model.norm

    class Offset(type(norm)):  # as Gemma's
        def forward(self, x):
            return super().forward(x) + nn.functional.normalize(x, dim=-1) * 32**0.5

    if form == "offset":
        norm.__class__ = Offset
    elif form == "subclass":
        norm.__class__ = type("Bare", (type(norm),), {"forward": lambda self, x: x * self.weight})
    else:
        norm.variance_epsilon = torch.tensor(norm.variance_epsilon)
    expected = norm(x)
    optimize_for_inference(model)
    assert "forward" not in vars(norm)
    assert torch.equal(norm(x), expected)


@torch.no_grad()
def test_what_a_norm_cannot_bypass_runs_as_before():
    norm, x = tiny_llama().model.norm, torch.randn(1, 2, 32)
    plain = copy.deepcopy(norm)
    fast = optimize_for_inference(nn.Sequential(norm))[0]
    assert "forward" in vars(fast)
    fast.variance_epsilon = plain.variance_epsilon = 0.5
    torch.testing.assert_close(fast(x), plain(x))
    assert torch.equal(fast(x.double()), plain(x.double()))
    with torch.enable_grad():
        fast(x).sum().backward()
    assert fast.weight.grad is not None
    fast.register_forward_hook(lambda module, arguments, output: output + 1)
    torch.testing.assert_close(fast(x), plain(x) + 1)
    with pytest.raises(RuntimeError):
        fast(torch.randn(1, 33))


def test_a_block_that_clamps_is_left_alone():
    """Equal to the plain form for ordinary inputs only."""
    model = tiny_llama()
    kind = type(model.model.layers[0].mlp)

    class Clamped(kind):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10)) * self.up_proj(x))

    model.model.layers[0].mlp.__class__ = Clamped
    optimize_for_inference(model)
    assert "forward" not in vars(model.model.layers[0].mlp)
    assert "forward" in vars(model.model.layers[1].mlp)


def test_blocks_without_plain_weights_are_left_alone(ids):
    """As quantisers leave them: weights in buffers, or modules that are no linear layers."""
    model = tiny_llama()
    for module in model.model.layers.modules():
        if type(module) is nn.Linear:
            weight = module.weight.detach()
            del module.weight
            module.register_buffer("weight", weight)
    expected = model(ids[:1, :2]).logits
    assert torch.equal(optimize_for_inference(model)(ids[:1, :2]).logits, expected)
    assert "forward" not in vars(model.model.layers[0].mlp)


@torch.no_grad()
def test_inputs_of_another_width_are_refused():
    fast = optimize_for_inference(tiny_llama())
    for module in (fast.lm_head, fast.model.layers[0].mlp):
        with pytest.raises(RuntimeError):
            module(torch.randn(1, 100))


def test_a_norm_with_a_gate_is_left_to_itself():
    """Mamba2's takes the gate as a second argument."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 8}
    heads = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
    config = transformers.Mamba2Config(**small, **heads)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        expected = model(tokens).logits
        found = optimize_for_inference(model)(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
