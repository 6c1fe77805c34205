"""Block-by-block stages: the closed form against least squares, and that they help."""

import copy

import pytest
import torch
import transformers

import calr
from calr.testing import tiny_llama
from calr.training import blockwise, loop
from calr.training.blockwise import choose_shift

RECIPE = {"keep": 0.4, "rank_step": 2, "correction_tokens": 0}


@pytest.fixture(scope="module")
def text():
    return torch.randint(2, 258, (48, 32), generator=torch.Generator().manual_seed(3))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batches(x):
    return list(x.split(50))


def test_the_shift_undoes_an_invertible_change_of_the_inputs():
    """x' = C x exactly, so W C⁻¹ x' = W x: found up to the smallest damping."""
    x, change = draw(400, 6), torch.eye(6, dtype=torch.float64) + 0.3 * draw(6, 6, seed=1)
    shift, moment = choose_shift([draw(5, 6, seed=2)], batches(x), batches(x @ change.T))
    assert shift is not None
    torch.testing.assert_close(shift, torch.linalg.inv(change), rtol=0, atol=0.02)
    seen = x @ change.T
    torch.testing.assert_close(moment, seen.T @ seen / len(seen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [[40], [40, 40], [50, 50, 50, 50, 7]])
def test_the_moment_is_that_of_all_tokens(sizes):
    x = draw(sum(sizes), 6)
    moment = choose_shift([draw(5, 6, seed=2)], list(x.split(sizes)), list((2 * x).split(sizes)))[1]
    torch.testing.assert_close(moment, 4 * x.T @ x / len(x), rtol=1e-5, atol=1e-5)


def test_the_damped_optimum_is_the_closed_form(monkeypatch):
    monkeypatch.setattr(blockwise, "DAMPINGS", (0.1,))
    x = draw(400, 6)
    seen = x @ (torch.eye(6) + 0.5 * draw(6, 6, seed=1)).T + 0.3 * draw(400, 6, seed=4)
    shift, _ = choose_shift([draw(5, 6, seed=2)], batches(x), batches(seen))
    fitted = torch.cat([torch.arange(50 * i, 50 * (i + 1)) for i in (1, 2, 3, 5, 6, 7)])
    h, g = x[fitted].T @ seen[fitted] / len(fitted), seen[fitted].T @ seen[fitted] / len(fitted)
    ridge = 0.1 * g.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(
        shift, (h + ridge) @ torch.linalg.inv(g + ridge), rtol=1e-5, atol=1e-5
    )


def test_the_weight_stays_where_no_shift_helps_on_held_out_tokens():
    """Fewer tokens than inputs, of pure noise: any fitted map is worse than none."""
    x = draw(40, 30)
    noise = x + 1e-3 * draw(40, 30, seed=1)
    shift, _ = choose_shift([draw(5, 30, seed=2)], list(x.split(5)), list(noise.split(5)))
    assert shift is None


def block_error(dense, model, ids):
    """Relative squared error of the final hidden states."""
    with torch.no_grad():
        y, found = (m.eval().model(ids).last_hidden_state for m in (dense, model))
    return float((found - y).square().sum() / y.square().sum())


@pytest.mark.parametrize("method", ["calr", "svd_llm"])
@pytest.mark.parametrize(
    "stage",
    [{"shifted_inputs": True}, {"block_epochs": 4, "block_learning_rate": 3e-3}],
    ids=["shifted", "trained"],
)
def test_each_stage_brings_unseen_hidden_states_closer(method, stage, text, device):
    unseen = torch.randint(2, 258, (16, 32), generator=torch.Generator().manual_seed(9))
    options = RECIPE | {"method": method}
    dense = tiny_llama().to(device)
    plain = calr.compress(copy.deepcopy(dense), calr.Recipe(**options), calibration=text)
    recipe = calr.Recipe(**options, **stage)
    fitted = calr.compress(copy.deepcopy(dense), recipe, calibration=text)
    layers = plain.config.quantization_config.layers
    assert fitted.config.quantization_config.layers == layers  # the same ranks
    unseen = unseen.to(device)
    assert block_error(dense, fitted, unseen) < block_error(dense, plain, unseen)


@pytest.mark.parametrize("biases", [False, True])
def test_an_interrupted_run_continues_to_the_same_bits(biases, text, tmp_path, monkeypatch):
    def dense():
        return tiny_llama(attention_bias=biases, mlp_bias=biases)

    recipe = calr.Recipe(**RECIPE, shifted_inputs=True, block_epochs=1)
    expected = calr.compress(dense(), recipe, calibration=text)
    fit, model = blockwise.BlockFit.fit, dense()

    def killed(self, block, layers, known):
        if block == 1:
            raise KeyboardInterrupt
        return fit(self, block, layers, known)

    with monkeypatch.context() as patch:
        patch.setattr(blockwise.BlockFit, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            calr.compress(model, recipe, calibration=text, work=tmp_path)
    assert all(map(torch.equal, model.parameters(), dense().parameters()))
    found = calr.compress(model, recipe, calibration=text, work=tmp_path)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))
    assert all(p.requires_grad and p.grad is None for p in found.parameters())


def test_layers_keep_their_order_when_a_run_continues(text, tmp_path, monkeypatch):
    """Attention and feed-forward of Phi share one input, so groups come in another order."""

    def dense():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
        config = transformers.PhiConfig(vocab_size=258, num_attention_heads=4, **sizes)
        return transformers.PhiForCausalLM(config).eval()

    training_too = RECIPE | {"correction_tokens": 32 * 40, "step_tokens": 32}
    recipe = calr.Recipe(**training_too, block_epochs=1)
    monkeypatch.setattr(loop, "MEASURE_TOKENS", 32 * 16)
    expected = calr.compress(dense(), recipe, calibration=text)
    save = loop._Training._save

    def killed(self, *state):
        save(self, *state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            calr.compress(dense(), recipe, calibration=text, work=tmp_path)
    found = calr.compress(dense(), recipe, calibration=text, work=tmp_path)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))


@pytest.mark.parametrize("stage", [{"shifted_inputs": True}, {"block_epochs": 2}])
def test_16_bit_models_stay_16_bit(stage, text):
    recipe = calr.Recipe(**RECIPE, **stage)
    model = calr.compress(tiny_llama().bfloat16(), recipe, calibration=text)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(text[:1]).logits).all()
