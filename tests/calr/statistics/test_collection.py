"""Statistics against direct computation, and their store."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from calr.errors import CalrError
from calr.model import BlockRunner, analyse, check_finite, digest, fingerprint
from calr.statistics import Statistics, block_influence, gradients, inputs
from calr.storage import Store
from calr.testing import tiny_llama


@pytest.fixture
def model(device):
    return tiny_llama().to(device)


def test_block_by_block_is_the_model(model, ids):
    structure = analyse(model)
    runner = BlockRunner(model, structure, ids)
    hidden = runner.hidden
    for block in range(structure.blocks):
        hidden = runner.run(block, hidden)
    with torch.no_grad():
        expected = model.model(ids.to(model.device)).last_hidden_state
        found = model.model.norm(torch.cat(hidden))
    assert torch.equal(found, expected)


def test_input_moments_are_those_of_a_plain_forward_pass(model, ids):
    structure = analyse(model)
    seen = {}
    hooks = [
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda m, args, name=layer.name: seen.__setitem__(name, args[0])
        )
        for layer in structure.layers
    ]
    with torch.no_grad():
        model(ids.to(model.device))
    for hook in hooks:
        hook.remove()
    statistics = Statistics(model, structure, ids, Store()).collect()
    for layer in structure.layers:
        x = seen[layer.name].flatten(0, 1).double().cpu()
        expected = x.T @ x / len(x)
        found = statistics.moments(layer).input.double()
        assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_gradient_moments_are_the_fisher_of_sampled_labels(model, ids):
    structure = analyse(model)
    statistics = Statistics(
        model, structure, ids, Store(), gradient_ids=ids[:2], outputs=True, seed=3
    ).collect()
    assert all(p.requires_grad for p in model.parameters())
    generator = torch.Generator().manual_seed(3)
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"]  # tall and wide
    rows = {name: [] for name in names}
    for window in ids[:2].split(1):
        outputs = {}
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda m, a, y, name=name, outputs=outputs: outputs.__setitem__(name, y)
            )
            for name in names
        ]
        logits_of = model(window.to(model.device)).logits[0]
        for hook in hooks:
            hook.remove()
        uniform = torch.rand(len(logits_of), 1, generator=generator).to(logits_of.device)
        cumulative = logits_of.detach().softmax(-1).cumsum(-1)
        labels = (cumulative < uniform * cumulative[:, -1:]).sum(1)
        loss = cross_entropy(logits_of, labels, reduction="sum")
        for name, g in zip(names, torch.autograd.grad(loss, list(outputs.values())), strict=True):
            rows[name].append(g[0].double().cpu())
    for layer in structure.layers:
        if layer.name not in names:
            continue
        g = torch.cat(rows[layer.name])
        moments = statistics.moments(layer)
        assert moments.gradient == pytest.approx(float(g.square().mean()), rel=1e-4)
        assert (moments.rows.double() - g.square().mean(0)).norm() <= 1e-4 * moments.rows.norm()
        if layer.out_features > layer.in_features:
            g = g @ model.get_submodule(layer.name).weight.detach().double().cpu()
        expected = g.T @ g / len(g)
        assert (moments.output.double() - expected).norm() <= 1e-4 * expected.norm()


def test_statistics_are_the_same_through_files_and_with_few_logits_at_a_time(
    model, ids, tmp_path, monkeypatch
):
    structure = analyse(model)

    def collected(store):
        found = Statistics(model, structure, ids, store, gradient_ids=ids[:2], outputs=True)
        return found.collect()

    plain = collected(Store())
    for module in (inputs, gradients):
        monkeypatch.setattr(module, "HELD_BYTES", 0)
    monkeypatch.setattr(gradients, "LOGITS", 3 * 258)  # three positions
    filed = collected(Store(tmp_path))
    for layer in structure.layers:
        one, other = plain.moments(layer), filed.moments(layer)
        for wanted, found in ((one.output, other.output), (one.input, other.input)):
            assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("tied", [True, False])
def test_what_embeddings_and_head_are_rounded_by(ids, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    found = Statistics(
        model, analyse(model), ids, Store(), gradient_ids=ids[:2], seed=3
    ).vocabulary()
    generator, seen = torch.Generator().manual_seed(3), {"g": [], "x": [], "p": []}
    for window in ids[:2].split(1):
        embedded = model.model.embed_tokens(window).detach().requires_grad_()
        hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)[0]
        uniform = torch.rand(len(logits), 1, generator=generator)
        cumulative = logits.detach().softmax(-1).cumsum(-1)
        labels = (cumulative < uniform * cumulative[:, -1:]).sum(1)
        loss = cross_entropy(logits, labels, reduction="sum")
        seen["g"].append(torch.autograd.grad(loss, embedded)[0][0])
        seen["x"].append(hidden.detach()[0])
        seen["p"].append(logits.detach().softmax(-1))
    g, x, p = (torch.cat(seen[name]).double() for name in "gxp")
    wanted = {"inputs": g.mT @ g / len(g), "hidden": x.mT @ x / len(x)}
    wanted |= {"outputs": (p * (1 - p)).mean(0)}
    for name, value in wanted.items():
        assert (found[name].double() - value).norm() <= 1e-4 * value.norm(), name
    assert torch.equal(found["tokens"], ids.flatten().bincount(minlength=258).double())


def test_stored_statistics_are_found_again_bit_for_bit(model, ids, tmp_path):
    structure = analyse(model)

    def run(store):
        statistics = Statistics(
            model, structure, ids, store, gradient_ids=ids[:2], outputs=True
        ).collect()
        return [statistics.moments(layer) for layer in structure.layers]

    whole = run(Store(tmp_path / "a"))
    (tmp_path / "a" / "inputs-0001.safetensors").unlink()  # as if killed before the last block
    for first, second in zip(whole, run(Store(tmp_path / "a")), strict=True):
        assert torch.equal(first.input, second.input)
        assert torch.equal(first.output, second.output)
        assert first.gradient == second.gradient


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named(model, ids, value):
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(CalrError, match=r"model.layers.1.mlp.up_proj.weight: the values hold NaN"):
        check_finite(model)


def test_overflowing_activations_are_named(model, ids):
    model.model.layers[0].mlp.up_proj.weight.data *= 1e30
    model.model.layers[0].mlp.gate_proj.weight.data *= 1e30
    with pytest.raises(CalrError, match=r"layers.0.mlp.down_proj: its calibration inputs"):
        Statistics(model, analyse(model), ids, Store()).collect()


def test_few_tokens_warn_with_the_number_needed(model, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    Statistics(model, analyse(model), torch.ones(1, 20, dtype=torch.long), Store()).collect()
    logging.disable_propagation()
    assert "20 calibration tokens are fewer than the 80 inputs" in caplog.text
    assert "at least 320 tokens" in caplog.text


def test_fingerprints_tell_models_and_inputs_apart(ids):
    key = digest(fingerprint(tiny_llama()), ids, 3)
    assert key == digest(fingerprint(tiny_llama()), ids, 3)
    changed = tiny_llama()
    changed.model.norm.weight.data[0] += 1e-3
    others = [
        digest(fingerprint(tiny_llama(seed=1)), ids, 3),
        digest(fingerprint(changed), ids, 3),
        digest(fingerprint(tiny_llama()), ids + 1, 3),
        digest(fingerprint(tiny_llama()), ids, 4),
        digest(fingerprint(tiny_llama()), ids.view(2 * len(ids), -1), 3),
    ]
    assert len({key, *others}) == 6
    scalar = tiny_llama()
    scalar.register_parameter("scale", torch.nn.Parameter(torch.ones(())))
    assert fingerprint(scalar) != fingerprint(tiny_llama())


def test_a_store_never_holds_half_a_file(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.save("a", {"x": torch.ones(3)})

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calr.storage.store.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        store.save("a", {"x": torch.zeros(3)})
    monkeypatch.undo()
    assert torch.equal(store.load("a")["x"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(KeyError):
        store.load("b")


def test_influence_is_one_minus_the_mean_cosine(model, ids):
    with torch.no_grad():
        hidden = model.model(ids.to(model.device), output_hidden_states=True).hidden_states
    expected = 1 - cosine_similarity(hidden[0].double(), hidden[1].double(), dim=-1).mean()
    found = block_influence(model, analyse(model), ids)
    assert found[0] == pytest.approx(float(expected), abs=1e-6)
