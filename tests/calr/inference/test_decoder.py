"""A decoder whose blocks run in one native call gives what its own forward gives."""

import contextlib
import copy
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.models.llama.modeling_llama import LlamaMLP

import calr
from calr.inference import optimize_for_inference
from calr.testing import tiny_llama
from calr_kernels import Form, QuantizedLinear, eligible, native, records

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama without groups": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2 with windows": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3": (transformers.Qwen3Config, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 6}),
    "smollm3": (transformers.SmolLM3Config, {"no_rope_layers": [1, 1, 0, 1]}),
    "gemma3": (transformers.Gemma3TextConfig, {"sliding_window": 6, "layer_types": MIXED}),
}
OTHERS = {
    "gemma2": (transformers.Gemma2Config, {}),
    "olmo2": (transformers.Olmo2Config, {}),
    "phi3": (transformers.Phi3Config, {}),
    "granite": (transformers.GraniteConfig, {"residual_multiplier": 0.5}),
}
WAYS = ["beams", "sampled", "assisted", "prompt lookup", "continued", "repeated"]
PROMPT, NEW = 5, 20


def family(name, dtype=torch.float32, form=None):
    """A small model of a family with norms and biases that matter."""
    kind, more = (FAMILIES | OTHERS)[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**SMALL | more)).eval()
    for path, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.0 if "gemma" in name or "bias" in path else 0.8, 0.2)
    if form:
        for module in list(model.model.layers.modules()):
            for child, layer in module.named_children():
                if type(layer) is nn.Linear:
                    setattr(module, child, quantised(layer, form))
    return model.to(dtype)


def quantised(layer, form):
    made = QuantizedLinear(layer.in_features, layer.out_features, form, layer.bias is not None)
    codes = torch.randint(1 << form.bits, layer.weight.shape).to(torch.uint8)
    scales = torch.randn(layer.out_features, form.groups(layer.in_features)) / 100
    made.weight.copy_(records.pack(codes, scales, form))
    if layer.bias is not None:
        made.bias.data.copy_(layer.bias.data)
    return made


def decoded(model, mask=None, steps=NEW, cache=None):
    """Logits step by step behind a prompt, of the same tokens whatever they say."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 96, (3, PROMPT + steps), generator=generator)
    cache = DynamicCache(config=model.config) if cache is None else cache
    found = []
    for begin, end in [(0, PROMPT)] + [(PROMPT + i, PROMPT + i + 1) for i in range(steps)]:
        seen = None if mask is None else torch.cat([mask, torch.ones(3, end - PROMPT)], 1).long()
        step = model(
            ids[:, begin:end], past_key_values=cache, attention_mask=seen, position_ids=None
        )
        found.append(step.logits[:, -1])
    return torch.stack(found)


@pytest.fixture
def calls(monkeypatch):
    """How often the blocks of a decoder ran natively."""
    made, decode = [], native.Blocks.decode

    def counted(self, *given):
        made.append(1)
        return decode(self, *given)

    monkeypatch.setattr(native.Blocks, "decode", counted)
    return made


def prepared(model):
    return optimize_for_inference(copy.deepcopy(model))


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("form", [None, Form(5, "formula", 32)], ids=["dense", "quantised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_step_is_that_of_the_model_itself(name, dtype, form, padded, calls):
    plain = family(name, dtype, form)
    fast = prepared(plain)
    assert "forward" in vars(fast.model)
    calls.clear()
    mask = None
    if padded:
        mask = torch.ones(3, PROMPT)
        mask[1, :2] = mask[2, :4] = 0
    found, own, exact = decoded(fast, mask), decoded(plain, mask), decoded(plain.double(), mask)
    assert len(calls) == NEW
    noise = 2e-6 * float(exact.norm())  # where the model's own rounding is as small as that
    assert float((found - exact).norm()) <= 2 * float((own - exact).norm()) + noise


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("before", [False, True], ids=["", "optimized before"])
def test_packed_weights_decode_the_same(before, dtype, calls):
    plain = family("qwen3", dtype)
    fast = prepared(plain) if before else copy.deepcopy(plain)
    if before:
        decoded(fast)
    optimize_for_inference(fast, pack=True)
    assert native.packed_bytes(fast.parameters()) > 0
    calls.clear()
    found, own, exact = decoded(fast), decoded(plain), decoded(plain.double())
    assert len(calls) == NEW
    noise = 2e-6 * float(exact.norm())
    assert float((found - exact).norm()) <= 2 * float((own - exact).norm()) + noise
    fast.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    plain = family("qwen3", dtype)
    plain.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    found, own, exact = decoded(fast), decoded(plain), decoded(plain.double())
    assert float((found - exact).norm()) <= 2 * float((own - exact).norm()) + noise


def test_a_model_of_inference_tensors_decodes_natively(calls):
    plain = tiny_llama()
    with torch.inference_mode():
        fast = optimize_for_inference(copy.deepcopy(plain), pack=True)
        calls.clear()
        found = decoded(fast)
    assert len(calls) == NEW
    with torch.no_grad():
        torch.testing.assert_close(found.clone(), decoded(plain), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_threads_share_a_model_at_different_positions():
    fast = prepared(tiny_llama())
    expected = decoded(fast, steps=80)

    def some(_):
        with torch.no_grad():
            return decoded(fast, steps=80)

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(some, range(12)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["default", "dynamic", "yarn"])
def test_rotary_embeddings_of_any_kind_and_length(kind, calls):
    rope = {"rope_type": kind, "rope_theta": 10000.0}
    if kind != "default":
        rope["factor"] = 4.0
    plain = tiny_llama(max_position_embeddings=32, rope_parameters=rope)
    fast = prepared(plain)
    calls.clear()
    found, own = decoded(fast, steps=80), decoded(plain, steps=80)
    assert len(calls) == 80
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_a_decoder_of_another_form_is_left_alone(name):
    plain = family(name)
    fast = prepared(plain)
    assert "forward" not in vars(fast.model)
    torch.testing.assert_close(decoded(fast), decoded(plain), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("length", [126, 127, 128, 129, 300])
def test_long_contexts_are_gathered_in_stretches(length, calls):
    plain = tiny_llama(max_position_embeddings=512)
    fast = prepared(plain)
    calls.clear()
    ids = torch.randint(2, 258, (2, length + 2), generator=torch.Generator().manual_seed(0))
    logits = []
    for model in (plain, fast):
        cache = DynamicCache(config=model.config)
        model(ids[:, :length], past_key_values=cache)
        steps = [model(ids[:, length + i : length + i + 1], past_key_values=cache) for i in (0, 1)]
        logits.append(torch.cat([step.logits for step in steps]))
    assert len(calls) == 2
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "asked"),
    [
        *(("llama", way) for way in (*WAYS, "returned")),
        *(("gemma3", way) for way in WAYS),  # transformers cannot return what a window has dropped
    ],
)
def test_generate_in_all_its_ways(name, asked):
    plain = family(name)
    fast = prepared(plain)
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "attention_mask": torch.ones_like(ids)}
    found = []
    for model in (plain, fast):
        torch.manual_seed(0)
        own = dict(options)
        if asked == "beams":
            own |= {"num_beams": 3, "do_sample": False}
        elif asked == "sampled":
            own |= {"do_sample": True, "top_k": 5}
        elif asked in ("assisted", "prompt lookup"):
            own |= {"do_sample": False, "attention_mask": torch.ones(1, 9)}
            helper = {"assistant_model": family(name)}
            own |= helper if asked == "assisted" else {"prompt_lookup_num_tokens": 3}
            found.append(model.generate(ids[:1], **own))
            continue
        elif asked == "repeated":
            own |= {"num_return_sequences": 2, "do_sample": True, "top_k": 5}
        elif asked in ("continued", "returned"):
            own |= {"do_sample": False, "return_dict_in_generate": True}
            first = model.generate(ids, **own)
            cache = first.past_key_values
            assert type(cache) is DynamicCache
            if asked == "continued":
                cache = copy.deepcopy(cache)
            else:
                cache.crop(-3)
                first.sequences = first.sequences[:, :-3]
            more = torch.cat([first.sequences, ids[:, :2]], 1)
            own |= {"past_key_values": cache, "attention_mask": torch.ones_like(more)}
            found.append(model.generate(more, **own).sequences)
            continue
        found.append(model.generate(ids, **own))
    assert torch.equal(found[0], found[1])


@torch.no_grad()
@pytest.mark.parametrize(
    "asked",
    [
        "hook",
        "decoder hook",
        "hook on everything",
        "lora",
        "hidden states",
        "fixed cache",
        "window",
        "training",
        "grad",
        "fewer blocks",
    ],
)
def test_what_must_not_be_bypassed_is_not(asked, calls):
    plain = tiny_llama(vocab_size=96, attention_dropout=0.0)
    fast = prepared(plain)
    calls.clear()
    expected = NEW
    logits = []
    for model in (plain, fast):
        cache = None
        if asked == "hook":
            layer = model.model.layers[1].mlp.up_proj
            layer.register_forward_hook(lambda module, given, output: 2 * output)
            expected = 0
        elif asked == "decoder hook":
            model.model.norm.register_forward_hook(lambda module, given, output: 2 * output)
            expected = 0
        elif asked == "lora":
            torch.manual_seed(0)
            get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
            expected = 0
        elif asked == "hidden states":
            model.config.output_hidden_states = True
            expected = 0
        elif asked == "fixed cache":
            cache = StaticCache(model.config, max_cache_len=64)
            expected = 0
        elif asked == "window":
            cache = DynamicCache()
            cache.layers = [DynamicSlidingWindowLayer(sliding_window=4) for _ in range(2)]
            expected = 0
        elif asked == "training":
            model.train()
        elif asked == "fewer blocks":
            model.config.num_hidden_layers = 1
            expected = 0
        everywhere = contextlib.nullcontext()
        if asked == "hook on everything":
            everywhere = register_module_forward_hook(
                lambda module, given, y: 2 * y if isinstance(module, LlamaMLP) else None
            )
            expected = 0
        with torch.set_grad_enabled(asked == "grad"), everywhere:
            logits.append(decoded(model, cache=cache))
        expected = 0 if asked == "grad" else expected
    assert len(calls) == expected
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("how", ["hook", "scaling"])
def test_angles_that_somebody_changes_are_used(how, calls):
    plain = family("llama")
    fast = prepared(plain)
    decoded(fast)
    for model in (plain, fast):
        rotary = model.model.rotary_emb
        if how == "hook":
            rotary.register_forward_hook(lambda module, given, y: (0.5 * y[0], 2 * y[1]))
        else:
            rotary.attention_scaling *= 2
    calls.clear()
    torch.testing.assert_close(decoded(fast), decoded(plain), rtol=1e-4, atol=2e-5)
    assert len(calls) == NEW


@torch.no_grad()
def test_hidden_states_that_were_asked_for_once_leave_the_kernel_in_use(calls):
    fast = prepared(family("llama"))
    assert len(fast(torch.arange(3, 9)[None], output_hidden_states=True).hidden_states) == 5
    calls.clear()
    decoded(fast)
    assert len(calls) == NEW


@pytest.mark.parametrize("followed", [False, True], ids=["", "by autograd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_long_prompt_is_attended_to_by_parts(dtype, followed, monkeypatch):
    monkeypatch.setattr(eligible, "cpu_multiplies_bfloat16", lambda: True)
    plain = family("llama", dtype)
    fast, parts = prepared(plain), []
    own = calr.model.attention.causal_attention
    monkeypatch.setattr(
        calr.model.attention, "causal_attention", lambda *given: parts.append(1) or own(*given)
    )
    ids = torch.randint(3, 96, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(followed):
        found, expected = fast(ids).logits.detach(), plain(ids).logits.detach()
    assert len(parts) == (4 if dtype is torch.bfloat16 and not followed else 0)
    with torch.no_grad():
        exact = plain.double()(ids).logits
    noise = 2e-6 * float(exact.norm())
    assert float((found - exact).norm()) <= 2 * float((expected - exact).norm()) + noise


@torch.no_grad()
def test_a_decoder_alone_gives_the_tuple_that_it_is_asked_for():
    plain = family("llama")
    for model in (plain, prepared(plain)):
        cache, ids = DynamicCache(config=model.config), torch.arange(3, 9)[None]
        for part in (ids[:, :5], ids[:, 5:]):
            assert type(model.model(part, past_key_values=cache, return_dict=False)) is tuple


@torch.no_grad()
def test_an_interrupted_step_leaves_a_cache_that_goes_on(monkeypatch):
    """Between the two counts of a token: the cache's, and the kernel's."""
    plain = family("llama")
    fast = prepared(plain)
    ids, caches = torch.arange(3, 19).view(2, 8), []
    for model in (plain, fast):
        caches.append(DynamicCache(config=model.config))
        for part in ids[:, :5], ids[:, 5:6]:
            model(part, past_key_values=caches[-1])
    plain(ids[:, 6:7], past_key_values=caches[0])

    def interrupted(pasts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(native.decoder.Pasts, "advance", interrupted)
        fast(ids[:, 6:7], past_key_values=caches[1])
    expected, found = (
        m(ids[:, 7:], past_key_values=c).logits for m, c in zip((plain, fast), caches, strict=True)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "how", ["data", "copied", "replaced", "half", "scaling", "epsilon", "another copy"]
)
def test_weights_that_changed_are_used(how, calls):
    plain, other = family("llama", form=Form(4, "table", 32)), family("llama")
    fast = prepared(plain)
    decoded(fast)
    if how == "another copy":
        again = copy.deepcopy(fast)
        fast.model.layers[0].self_attn.q_proj.weight.zero_()
        torch.testing.assert_close(decoded(again), decoded(plain), rtol=1e-4, atol=2e-5)
        return
    for model in (plain, fast):
        mlp, source = model.model.layers[2].mlp, other.model.layers[2].mlp
        if how == "data":
            for parameter in model.model.layers[2].input_layernorm.parameters():
                parameter.data = parameter.data.flip(0)
        elif how == "copied":
            mlp.gate_proj.weight.copy_(mlp.up_proj.weight)
        elif how == "replaced":
            mlp.up_proj = copy.deepcopy(source.up_proj)
        elif how == "half":
            model.half()
        elif how == "scaling":
            model.model.layers[2].self_attn.scaling *= 4
        elif how == "epsilon":
            for norm in model.modules():
                if hasattr(norm, "variance_epsilon"):
                    norm.variance_epsilon = 1.0
    calls.clear()
    tolerance = 1e-1 if how == "half" else 1e-4  # of logits up to 6
    torch.testing.assert_close(decoded(fast), decoded(plain), rtol=0, atol=tolerance)
    assert len(calls) == NEW


@torch.no_grad()
@pytest.mark.parametrize("what", ["hook", "weight", "records", "module", "data"])
def test_what_changes_during_a_generation_is_noticed(what, calls):
    """A hook at once, the rest within a few tokens."""
    plain = family("llama", form=Form(4, "table", 32))
    fast = prepared(plain)
    logits, given = [], torch.tensor([[5], [7]])
    for model in (plain, fast):
        cache, made = DynamicCache(config=model.config), []
        model(given, past_key_values=cache)
        for step in range(16):
            mlp = model.model.layers[1].mlp
            if step == 3 and what == "hook":
                handle = mlp.up_proj.register_forward_hook(lambda module, given, output: 3 * output)
            elif step == 5 and what == "hook":
                handle.remove()
            elif step == 3 and what == "weight":
                model.model.layers[1].input_layernorm.weight.mul_(3)
            elif step == 3 and what == "data":
                norm = model.model.layers[1].input_layernorm.weight
                norm.data = 3 * norm.data
            elif step == 3 and what == "records":
                mlp.up_proj.weight.copy_(mlp.gate_proj.weight)
            elif step == 3 and what == "module":
                mlp.up_proj = copy.deepcopy(mlp.gate_proj)
            made.append(model(given, past_key_values=cache).logits)
        cache.crop(-13)  # all since the change: what was computed before it was noticed
        made += [model(given, past_key_values=cache).logits for _ in range(3)]
        logits.append(torch.stack(made))
    exact = slice(None) if what in ("hook", "weight") else slice(-3, None)
    torch.testing.assert_close(logits[1][exact], logits[0][exact], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_compressed_model_keeps_its_answers(ids, calls):
    recipe = calr.Recipe(keep=0.6, rank_step=2, correction_tokens=0)
    plain = calr.compress(tiny_llama(), recipe, calibration=ids)
    fast = prepared(plain)
    calls.clear()
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = plain.generate(ids[:2, :4], **options)
    assert torch.equal(fast.generate(ids[:2, :4], **options), expected)
    assert len(calls) == 11


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
@torch.no_grad()
def test_threads_that_lose_their_cores_change_no_bit(calls):
    """The team goes on with fewer of them, in the middle of a call, too: here they share a core."""
    fast = optimize_for_inference(tiny_llama(hidden_size=256, intermediate_size=512))
    before, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    alone = decoded(fast)
    torch.set_num_threads(3)
    decoded(fast)  # its threads are there
    try:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {min(cores)})
        for _ in range(3):
            assert torch.equal(decoded(fast), alone)
    finally:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)
        torch.set_num_threads(before)


@torch.no_grad()
def test_two_threads_may_decode_with_one_model():
    from concurrent.futures import ThreadPoolExecutor

    fast = prepared(family("llama", form=Form(4, "table", 32)))
    alone = decoded(fast)

    def run(_):
        with torch.no_grad():
            return decoded(fast)

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(run, range(8)):
            torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
