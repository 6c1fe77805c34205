"""Elastic models: any size from one, equal to compressing directly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import calr
from calr import elastic
from calr.elastic import fill_empty_terms
from calr.errors import CalrError
from calr.testing import tiny_llama
from calr_kernels import LowRankLinear

OPTIONS = {"keep": 0.8, "rank_step": 2, "correction_tokens": 0}


@pytest.fixture(scope="module")
def text():
    return torch.randint(2, 258, (16, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def directory(text, tmp_path_factory):
    model = calr.compress(tiny_llama(), calr.Recipe(**OPTIONS), calibration=text, elastic=True)
    path = tmp_path_factory.mktemp("elastic")
    model.save_pretrained(path)
    return path


def weights(model):
    """Every linear layer's effective matrix."""
    return {
        name: m.dense_weight() if isinstance(m, LowRankLinear) else m.weight
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and not name.endswith("down")
    }


def test_the_elastic_model_is_the_dense_one(directory, ids):
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert all(layer["rank"] > 0 for layer in model.config.quantization_config.layers.values())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny_llama()(ids).logits, rtol=0, atol=1e-3)


def test_16_bit_factors_cost_what_rounding_costs(text, ids):
    """Compared with compressing directly in bfloat16, whose own distance to float32 is the rule."""
    recipe = calr.Recipe(**OPTIONS | {"keep": 0.6})
    exact = calr.compress(tiny_llama().bfloat16().float(), recipe, calibration=text)
    direct = calr.compress(tiny_llama().bfloat16(), recipe, calibration=text)
    whole = calr.compress(tiny_llama().bfloat16(), recipe, calibration=text, elastic=True)
    ranks = exact.config.quantization_config.layers
    found = calr.resize(whole, 0.6)
    same = [n for n, x in found.config.quantization_config.layers.items() if ranks.get(n) == x]
    assert len(same) > len(ranks) / 2  # moments of a 16-bit model differ a little
    target = weights(exact)

    def error(model):
        made = weights(model)
        return sum((made[n].detach().float() - target[n].detach()).norm() for n in same)

    assert error(found) < 2 * error(direct)


@settings(max_examples=12, deadline=None)
@given(st.floats(0.2, 1.0), st.sampled_from(["pivoted", "two_factor"]))
def test_resizing_equals_compressing_directly(directory, text, keep, layout):
    recipe = calr.Recipe(layout=layout, **OPTIONS | {"keep": keep})
    direct = calr.compress(tiny_llama(), recipe, calibration=text)
    found = calr.resize(AutoModelForCausalLM.from_pretrained(directory), keep, layout=layout)
    assert found.config.quantization_config.layers == direct.config.quantization_config.layers
    expected = weights(direct)
    for name, weight in weights(found).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-3)


def test_a_resized_model_saves_and_loads_but_resizes_no_more(directory, tmp_path, ids):
    model = calr.resize(AutoModelForCausalLM.from_pretrained(directory), 0.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(CalrError, match="the model is not elastic"):
        calr.resize(loaded, 0.4)


@pytest.mark.parametrize(
    "make",
    [
        lambda text: tiny_llama(),
        lambda text: calr.compress(tiny_llama(), calr.Recipe(**OPTIONS), calibration=text),
    ],
    ids=["dense", "pivoted"],
)
def test_other_models_are_refused(make, text):
    with pytest.raises(CalrError, match="order of the factors"):
        calr.resize(make(text), 0.5)


def test_skipped_layers_stay_dense_and_count(text):
    recipe = calr.Recipe(**OPTIONS, skip=("*.0.self_attn.*",))
    model = calr.compress(tiny_llama(), recipe, calibration=text, elastic=True)
    resized = calr.resize(model, 0.6)
    direct = calr.Recipe(skip=recipe.skip, **OPTIONS | {"keep": 0.6})
    expected = calr.compress(tiny_llama(), direct, calibration=text)
    layers = resized.config.quantization_config.layers
    assert layers == expected.config.quantization_config.layers
    assert not any(".0.self_attn." in name for name in layers)


def test_errors_of_an_absent_layer_are_refused(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.config.quantization_config.errors["model.layers.9.mlp.up_proj"] = [1.0]
    with pytest.raises(CalrError, match="errors of a layer that the model lacks"):
        calr.resize(model, 0.5)


@pytest.mark.parametrize("culprit", ["low_rank", "to_dense"])
def test_an_interrupted_resize_changes_nothing(culprit, directory, ids, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    model = AutoModelForCausalLM.from_pretrained(directory)
    before = model(ids).logits
    with monkeypatch.context() as patch:
        patch.setattr(elastic if culprit == "low_rank" else LowRankLinear, culprit, killed)
        with pytest.raises(KeyboardInterrupt):
            calr.resize(model, 0.95 if culprit == "to_dense" else 0.5)
    assert torch.equal(model(ids).logits, before)
    assert calr.resize(model, 0.5).config.quantization_config.layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "erc_svd"}, "no order in which they could be cut"),
        ({"allocation": "uniform"}, "elastic needs allocation=global"),
    ],
)
def test_what_has_no_order_is_refused_and_changes_nothing(options, message, text):
    model = tiny_llama()
    with pytest.raises(CalrError, match=message):
        recipe = calr.Recipe(**(OPTIONS | options))
        calr.compress(model, recipe, calibration=text, elastic=True)
    assert all(map(torch.equal, model.parameters(), tiny_llama().parameters()))


def test_empty_terms_take_what_is_missing():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 6, generator=generator)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    up, down = u * s, vh.clone()
    up[:, 3:] = 0  # directions without energy
    up, down = fill_empty_terms(weight, up, down)
    torch.testing.assert_close(up @ down, weight)


@pytest.mark.parametrize("errors", [[1.0], {"layer": "x"}, {}])
def test_malformed_errors_in_the_config_are_refused(errors, directory):
    from calr.integrations.transformers import CalrConfig

    layers = {"layer": {"layout": "two_factor", "rank": 4}}
    with pytest.raises(CalrError, match="errors"):
        CalrConfig(layers=layers, errors=errors)


def test_a_damaged_elastic_checkpoint_is_not_resized(source, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    recipe = calr.Recipe(**OPTIONS, samples=4, gradient_samples=2, window=32)
    calr.compress_to(
        str(source), whole, recipe, calibration="builtin", elastic=True, eval_windows=0
    )
    weights_file = whole / "model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[-5] ^= 1
    weights_file.write_bytes(data)
    with pytest.raises(CalrError, match=r"model\.safetensors: differs from what calr wrote"):
        calr.resize_to(str(whole), out, 0.7)
    assert not out.exists()
    data[-5] ^= 1
    weights_file.write_bytes(data)
    calr.resize_to(str(whole), out, 0.7)
    assert (out / "config.json").exists()
