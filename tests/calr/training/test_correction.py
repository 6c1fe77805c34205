"""Correction: it helps, never harms, continues after an interruption, and changes nothing else."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy as cross_entropy_of

import calr
from calr.errors import CalrError
from calr.model import lowrank
from calr.storage import Store
from calr.testing import tiny_llama
from calr.training import correction, loop, recorded_outputs
from calr.training import targets as targets_
from calr.training.correction import correct
from calr.training.targets import collect_targets

RECIPE = {"keep": 0.4, "rank_step": 2, "window": 32, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, 258, (200, 32), generator=generator)


def students(ids, device="cpu", **recipe):
    """A model with uncorrected two-factor layers in place, those layers, and the recipe."""
    uncorrected = calr.Recipe(**(RECIPE | {"layout": "two_factor", "correction_tokens": 0}))
    model = calr.compress(tiny_llama().to(device), uncorrected, calibration=ids[:16])
    names = model.config.quantization_config.layers
    layers = {name: model.get_submodule(name) for name in names}
    return model.eval(), layers, calr.Recipe(**(RECIPE | recipe))


def corrected(model, layers, text, recipe, store=None, **options):
    """Train on the text as compress does."""
    dense = tiny_llama().to(model.device)
    targets, held_out = recorded_outputs(dense, text, recipe, Store())
    return correct(model, layers, targets, held_out, recipe, store or Store(), **options)


def kl(model, ids):
    """KL from the dense model, nats per token, computed independently."""
    with torch.no_grad():
        ids = ids.to(model.device)
        target = tiny_llama().to(model.device)(ids).logits.double().log_softmax(-1)
        found = model(ids).logits.double().log_softmax(-1)
    return float((target.exp() * (target - found)).sum(-1).mean())


def test_training_lowers_the_loss_on_unseen_text(text, device):
    model, layers, recipe = students(text, device, correction_tokens=32 * 160)
    unseen = torch.randint(2, 258, (8, 32), generator=torch.Generator().manual_seed(9))
    before = kl(model, unseen)
    done = corrected(model, layers, text, recipe)
    assert done.tokens == 32 * 160
    assert done.loss_after < done.loss_before
    assert kl(model, unseen) < 0.95 * before


def test_the_reported_loss_is_the_divergence(text, monkeypatch):
    monkeypatch.setattr(targets_, "mixed", lambda model: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr(targets_, "TOP", 1000)  # all of them but one
    model, layers, recipe = students(text, correction_tokens=32 * 32)
    expected = kl(model, text[-correction.MEASURED :])
    done = corrected(model, layers, text, recipe)
    assert done.loss_before == pytest.approx(expected, rel=1e-4)
    assert done.loss_after == pytest.approx(kl(model, text[-correction.MEASURED :]), rel=1e-4)


def test_cross_entropy_lowers_that_of_unseen_text_further(text):
    """Text in which every token is the one before plus one, which the dense model does not know."""
    steps = torch.arange(32) + torch.randint(0, 256, (200, 1), generator=torch.manual_seed(5))
    counting, found = 2 + steps % 256, []
    for cross_entropy in (0.0, 0.5):
        model, layers, recipe = students(
            text, correction_tokens=32 * 160, cross_entropy=cross_entropy
        )
        corrected(model, layers, counting, recipe)
        with torch.no_grad():
            logits = model(counting[-4:]).logits[:, :-1].flatten(0, 1)
        found.append(float(cross_entropy_of(logits, counting[-4:, 1:].flatten())))
    assert found[1] < found[0] - 0.1


def test_a_ruinous_learning_rate_returns_the_start(text):
    model, layers, recipe = students(text, correction_tokens=32 * 64, learning_rate=3.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    done = corrected(model, layers, text, recipe)
    assert done.loss_after == done.loss_before
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_only_factors_and_norms_move(text):
    model, layers, recipe = students(text, correction_tokens=32 * 64)
    before = {name: p.clone() for name, p in model.named_parameters()}
    corrected(model, layers, text, recipe)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    allowed = tuple(layers) + tuple(name for name in before if "norm" in name)
    assert moved
    assert all(name.startswith(allowed) for name in moved)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_same_seed_gives_the_same_bits(text):
    results = []
    for seed in (0, 0, 1):
        model, layers, recipe = students(text, correction_tokens=32 * 64, seed=seed)
        corrected(model, layers, text, recipe)
        results.append([p.clone() for p in model.parameters()])
    assert all(map(torch.equal, results[0], results[1]))
    assert not all(map(torch.equal, results[0], results[2]))


def test_an_interrupted_run_continues_to_the_same_bits(text, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MEASURE_TOKENS", 1)
    model, layers, recipe = students(text, correction_tokens=32 * 160)
    corrected(model, layers, text, recipe)
    expected = [p.clone() for p in model.parameters()]

    model, layers, recipe = students(text, correction_tokens=32 * 160)
    start = [p.clone() for p in model.parameters()]
    save = Store.save

    def killed(self, name, tensors):
        save(self, name, tensors)
        if int(tensors.get("step", 0)) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            corrected(model, layers, text, recipe, Store(tmp_path))
    assert all(map(torch.equal, model.parameters(), start))
    corrected(model, layers, text, recipe, Store(tmp_path))
    assert all(map(torch.equal, model.parameters(), expected))


@pytest.mark.parametrize(("tokens", "steps"), [(1, 6), (64, 3), (100, 2), (10**6, 1)])
def test_a_step_accumulates_the_gradient_of_all_its_windows(tokens, steps, text, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # in float32 on every machine
    gradients = []
    for at_once in (10**6, 40):
        monkeypatch.setattr(targets_, "PART_TOKENS", at_once)
        model, layers, _ = students(text)
        parameters = [p for layer in layers.values() for p in layer.parameters()]
        targets = collect_targets(tiny_llama(), text[:6], Store())
        noted = []

        def note(step, count, parameters=parameters, noted=noted):
            assert count == steps
            noted += [p.grad.clone() for p in parameters] if not step else []

        loop.train(
            model,
            parameters,
            targets,
            targets,
            learning_rate=1e-3,
            step_tokens=tokens,
            on_gradients=note,
        )
        gradients.append(noted)
    for whole, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layout", ["pivoted", "two_factor"])
def test_compress_corrects_and_packs(layout, text, device, monkeypatch):
    """The packed layers compute what the trained ones did, and the budget still holds."""
    monkeypatch.setattr(targets_, "TOP", 1000)  # all of them but one
    options = RECIPE | {"correction_tokens": 32 * 96, "layout": layout}
    plain = calr.compress(
        tiny_llama().to(device),
        calr.Recipe(**(options | {"correction_tokens": 0})),
        calibration=text,
    )
    model = calr.compress(tiny_llama().to(device), calr.Recipe(**options), calibration=text)
    layers = model.config.quantization_config.layers
    assert layers == plain.config.quantization_config.layers
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    done = model.config.quantization_config.recipe["correction"]
    assert done["loss_after"] < done["loss_before"]
    found = kl(model.eval(), text[-correction.MEASURED :])
    assert found == pytest.approx(done["loss_after"], rel=0.05)  # trained in 16-bit products
    assert found < kl(plain.eval(), text[-correction.MEASURED :])


def test_16_bit_models_are_trained_in_float32_and_rounded_once(text):
    model = tiny_llama().bfloat16()
    recipe = calr.Recipe(**(RECIPE | {"correction_tokens": 32 * 96}))
    calr.compress(model, recipe, calibration=text)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    done = model.config.quantization_config.recipe["correction"]
    assert done["loss_after"] < done["loss_before"]


@pytest.mark.parametrize("culprit", ["pivot", "measure"])
def test_a_failure_leaves_the_model_as_it_was(culprit, text, monkeypatch):
    """After steps were made, in training or while packing: norms and layers are the dense one's."""
    calls = []

    def fail_at_the_second(*arguments):
        calls.append(arguments)
        if culprit == "pivot" or len(calls) == 2:
            raise KeyboardInterrupt
        return 1.0

    home = lowrank if culprit == "pivot" else loop._Training
    monkeypatch.setattr(home, culprit, fail_at_the_second)
    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        calr.compress(model, calr.Recipe(**(RECIPE | {"correction_tokens": 640})), calibration=text)
    assert torch.equal(model(text[:2]).logits, tiny_llama()(text[:2]).logits)
    assert not hasattr(model.config, "quantization_config")


def test_biases_are_kept_and_corrected(text):
    def dense():
        model = tiny_llama(attention_bias=True)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for block in model.model.layers:
                block.self_attn.q_proj.bias.copy_(torch.randn(32, generator=generator))
        return model

    plain = calr.compress(
        dense(), calr.Recipe(**(RECIPE | {"correction_tokens": 0})), calibration=text
    )
    recipe = calr.Recipe(**(RECIPE | {"correction_tokens": 32 * 160}))
    model = calr.compress(dense(), recipe, calibration=text)
    names = [n for n in model.config.quantization_config.layers if n.endswith("q_proj")]
    assert names
    for name in names:
        before = dense().get_submodule(name).bias
        assert torch.equal(plain.get_submodule(name).bias, before)
        assert not torch.equal(model.get_submodule(name).bias, before)
    done = model.config.quantization_config.recipe["correction"]
    assert done["loss_after"] < done["loss_before"]


def test_too_little_text_is_refused_and_leaves_the_model_dense(text):
    model = tiny_llama()
    with pytest.raises(CalrError, match="one window of text is not enough"):
        calr.compress(model, calr.Recipe(**RECIPE), calibration=text[:1])
    assert torch.equal(model(text[:2]).logits, tiny_llama()(text[:2]).logits)


@pytest.mark.parametrize(("asked", "used"), [(None, 1e-4), (3e-4, 3e-4)])
def test_the_learning_rate_that_was_used_is_recorded(asked, used, text):
    recipe = calr.Recipe(
        **(RECIPE | {"keep": 0.6, "correction_tokens": 32 * 8, "learning_rate": asked})
    )
    model = calr.compress(tiny_llama(), recipe, calibration=text)
    found = model.config.quantization_config.recipe["learning_rate"]
    assert found == pytest.approx(used)


def test_a_longer_training_has_a_lower_peak_by_default():
    def rate(at=None, **given):
        return calr.Recipe(**given).with_learning_rate(at).learning_rate

    longer = {"correction_tokens": 4 * 81_920}
    assert rate(keep=0.6) == pytest.approx(1e-4)
    assert rate(keep=0.6, **longer) == pytest.approx(5e-5)
    assert rate(keep=0.6, learning_rate=3e-4, **longer) == 3e-4
    assert rate(keep=1) is None
    budgets = [
        (1e4, {"size": "90MB"}),
        (6, {"bits": 6}),
        (5, {"bits": 5}),
        (4.5, {"bits": 4.5}),
        (4, {"size": "90MB"}),
    ]
    budgets += [(3.5, {"bits": 3.5}), (3, {"bits": 3})]
    wanted = [5e-5, 5e-5, 2e-4, 2e-4, 4e-4, 8e-4, 8e-4]
    assert [rate(at, **given) for at, given in budgets] == pytest.approx(wanted)


def test_a_loss_that_is_not_finite_is_an_error(text):
    model, layers, recipe = students(text, correction_tokens=32 * 32)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(torch.inf)
    before = [p.clone() for p in broken.parameters()]
    layers = {name: broken.get_submodule(name) for name in layers}
    with pytest.raises(CalrError, match="the loss is not finite"):
        corrected(broken, layers, text, recipe)
    assert all(map(torch.equal, broken.parameters(), before))


def test_gradient_checkpointing_saves_activations_and_changes_no_bit(text):
    """Counts what autograd keeps of one step, then compares whole runs."""
    kept, results = [], []
    for again in (False, True):
        model, layers, recipe = students(text, correction_tokens=32 * 64)
        forward, sizes = loop.add_gradients, []

        def counted(*arguments, forward=forward, sizes=sizes, **options):
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x: sizes.append(x.numel()) or x, _same
            ):
                return forward(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "add_gradients", counted)
            corrected(model, layers, text, recipe, checkpointed=again)
        kept.append(sum(sizes))
        results.append([p.clone() for p in model.parameters()])
        assert not any("forward" in block.__dict__ for block in model.model.layers)
    assert kept[1] < kept[0] / 2
    assert all(map(torch.equal, *results))


def _same(x):
    return x


def test_a_pruning_method_is_called_at_every_step_and_keeps_the_last_state(text):
    model, layers, recipe = students(text, correction_tokens=32 * 64)
    targets, held_out = recorded_outputs(tiny_llama(), text, recipe, Store())
    parameters = [layer.weight for layer in layers.values()]
    calls = []

    def prune(step, steps):
        assert all(p.grad is not None for p in parameters)
        calls.append((step, steps))
        with torch.no_grad():
            parameters[0].zero_()  # ruins the model: the best state would be the first

    done = loop.train(model, parameters, targets, held_out, learning_rate=1e-9, on_gradients=prune)
    assert calls == [(i, 4) for i in range(4)]
    assert parameters[0].detach().abs().max() < 1e-6
    assert done.loss_after > done.loss_before


def test_what_no_process_has_reached_keeps_no_gradient(monkeypatch):
    """As in one process: the optimiser goes on without it, and its momentum stays as it is."""
    reached, elsewhere, never = (nn.Parameter(torch.ones(2)) for _ in range(3))
    reached.grad = torch.ones(2)

    def add_up(tensors):
        for tensor in tensors:
            if len(tensor) == 3:  # which of the parameters some process has reached
                tensor += torch.tensor([0.0, 1.0, 0.0])
            else:
                tensor += 1

    monkeypatch.setattr(loop.parallel, "size", lambda: 2)
    monkeypatch.setattr(loop.parallel, "add_up", add_up)
    training = SimpleNamespace(parameters=[reached, elsewhere, never])
    loop._Training._add_up(training, torch.zeros(1))
    assert reached.grad.tolist() == [2.0, 2.0] and elsewhere.grad.tolist() == [1.0, 1.0]
    assert never.grad is None
