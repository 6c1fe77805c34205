"""Mixtures of experts: taken apart, compressed expert by expert, and put together again."""

import copy
import dataclasses

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import calr
from calr import quantising
from calr.errors import CalrError
from calr.export import export_compressed_tensors, export_gguf
from calr.integrations.experts import Experts, all_experts, put_together, take_apart
from calr.model import absent, analyse, load, present
from calr.rounding import round_matrices
from calr.statistics import Statistics
from calr.statistics.routed import PRIOR_TOKENS
from calr.storage import Store
from calr.testing import byte_tokenizer
from calr_kernels import QuantizedLinear

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 260, "max_position_embeddings": 256,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
KINDS = ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe"]
BITS = calr.Recipe(bits=5, correction_tokens=0, samples=64, gradient_samples=32)
KEEP = calr.Recipe(keep=0.7, rank_step=2, correction_tokens=0)
CORRECTED = calr.Recipe(bits=5, correction_tokens=1024, step_tokens=256)


def mixture(kind="mixtral", **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SMALL | more))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)
    return model


@pytest.fixture
def windows():
    return torch.randint(2, 258, (24, 48), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_apart_and_together_it_is_the_same_model(kind, ids):
    model = mixture(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted, there = logits(model, ids), copy.deepcopy(model)
    take_apart(model)
    assert len(list(all_experts(model))) == 2
    assert not any(p.dim() > 2 for p in model.parameters())
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-4, atol=1e-5)
    put_together(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in there.modules()]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model, ids), wanted)


@pytest.mark.parametrize("recipe", [BITS, KEEP, CORRECTED], ids=["bits", "keep", "corrected"])
@pytest.mark.parametrize("kind", KINDS)
def test_compress_save_load_and_undo(kind, recipe, windows, tmp_path):
    model = mixture(kind)
    dense, fused = logits(model, windows), type(model.model.layers[0]).__name__
    stacked = {name for name, p in model.named_parameters() if p.dim() == 3}
    calr.compress(model, recipe, calibration=windows)
    found = logits(model, windows)
    assert 1e-4 < (found - dense).norm() / dense.norm() < 0.6
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(loaded, windows), found)
    loaded.save_pretrained(tmp_path / "two")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    loaded.dequantize()
    assert {name for name, p in loaded.named_parameters() if p.dim() == 3} == stacked
    torch.testing.assert_close(logits(loaded, windows), found, rtol=1e-3, atol=1e-4)
    loaded.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(again.model.layers[0]).__name__ == fused
    assert torch.equal(logits(again, windows), logits(loaded, windows))


@torch.no_grad()
def test_the_moments_of_an_expert_are_of_its_tokens_and_a_few_of_the_average(windows):
    model = mixture()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts = model.model.layers[1].mlp.experts
    hook = experts.register_forward_pre_hook(lambda m, args: seen.append(args[:2]))
    model(windows)
    hook.remove()
    hidden, index = seen[0]
    take_apart(model)
    statistics = Statistics(model, analyse(model), windows, Store()).collect()
    layers = {layer.name: layer for layer in statistics.structure.layers}
    reached = [(index == expert).any(1) for expert in range(4)]
    wide = hidden.double()
    average = sum(wide[r].mT @ wide[r] for r in reached) / sum(int(r.sum()) for r in reached)
    for expert, r in enumerate(reached):
        layer = layers[f"model.layers.1.mlp.experts.gate_up.{expert}"]
        assert layer.share == 0.5 and layer.group == layer.name
        wanted = (wide[r].mT @ wide[r] + PRIOR_TOKENS * average) / (int(r.sum()) + PRIOR_TOKENS)
        found = statistics.moments(layer).input.double()
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_the_second_order_loss_of_experts_is_what_an_error_costs(windows):
    """Random errors in the last block: behind others it would count, too, who is chosen then."""
    model = mixture()
    take_apart(model)
    structure = analyse(model)
    statistics = Statistics(model, structure, windows, Store(), gradient_ids=windows).collect()
    dense = logits(model, windows).double().log_softmax(-1)
    expected, measured = 0.0, 0.0
    for layer in structure.in_block(1):
        if layer.routed:
            moments, module = statistics.moments(layer), model.get_submodule(layer.name)
            draw = torch.Generator().manual_seed(3)
            error = torch.randn(module.weight.shape, generator=draw) * 0.02 * module.weight.std()
            cost = (moments.rows[:, None] * (error @ moments.input) * error).sum() / 2
            expected += float(cost.detach())
            module.weight.data += error
            found = logits(model, windows).double().log_softmax(-1)
            measured += float((dense.exp() * (dense - found)).sum(-1).mean())
            module.weight.data -= error
    assert expected == pytest.approx(measured, rel=0.12)


@pytest.mark.parametrize("most", [3, 4])
def test_a_stack_that_is_rounded_at_once_becomes_what_its_experts_become(
    most, windows, monkeypatch
):
    """As on a GPU; three of four at once leave one for itself."""
    alone = calr.compress(mixture(), BITS, calibration=windows)
    sizes = []

    def counted(weights, *rest):
        sizes.append(len(weights))
        return round_matrices(weights, *rest)

    monkeypatch.setattr(quantising, "most_together", lambda *_: most)
    monkeypatch.setattr(quantising, "round_matrices", counted)
    at_once = calr.compress(mixture(), BITS, calibration=windows)
    assert max(sizes) == most
    forms = [m.config.quantization_config.layers for m in (alone, at_once)]
    assert forms[0] == forms[1]
    want, found = (logits(m, windows).log_softmax(-1) for m in (alone, at_once))
    dense = logits(mixture(), windows).log_softmax(-1)
    assert (want - found).abs().mean() < 0.02 * (want - dense).abs().mean()


def test_an_expert_that_no_token_reaches_is_rounded_by_its_blocks_average(windows, caplog):
    model = mixture("olmoe")
    router = model.model.layers[0].mlp.gate
    router.register_forward_hook(lambda m, args, out: (out[0], out[1], out[2] % 3))
    take_apart(model)
    statistics = Statistics(model, analyse(model), windows, Store(), gradient_ids=windows).collect()
    layer = next(x for x in statistics.structure.layers if x.name.endswith("0.mlp.experts.down.3"))
    assert layer.name in statistics.rarely_chosen
    moments = statistics.moments(layer)
    torch.testing.assert_close(moments.input, moments.input[0, 0] * torch.eye(64))
    assert moments.rows.min() > 0
    calr.compress(model, BITS, calibration=windows)
    assert "few calibration tokens were routed to it" in caplog.text
    assert logits(model, windows).isfinite().all()


def test_only_experts_that_were_chosen_are_computed_with(windows):
    model = calr.compress(mixture("qwen3_moe"), BITS, calibration=windows)
    index, used = [], []
    for name, experts in all_experts(model):
        experts.register_forward_pre_hook(lambda m, args: index.append(args[1]))
        for expert, layer in enumerate(experts.gate_up):
            assert isinstance(layer, QuantizedLinear)
            layer.register_forward_hook(lambda *_, of=(name, expert): used.append(of))
    logits(model, windows[:1, :1])
    assert len(used) == sum(len(i.unique()) for i in index) == 4


def test_it_generates_the_same_with_native_kernels(windows):
    model = calr.compress(mixture("qwen3_moe"), BITS, calibration=windows)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    wanted = model.generate(windows[:2, :8], **options)
    found = calr.optimize_for_inference(copy.deepcopy(model)).generate(windows[:2, :8], **options)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("failing", ["analysis", "computation"])
def test_a_model_that_could_not_be_compressed_is_as_it_was(failing, windows, monkeypatch):
    model = mixture()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if failing == "computation":
        monkeypatch.setattr("calr.job.quantised", lambda *_: 1 / 0)
    skip = ["*.nothing"] if failing == "analysis" else []
    recipe = dataclasses.replace(BITS, rotate=False, skip=skip)
    with pytest.raises((CalrError, ZeroDivisionError)):
        calr.compress(model, recipe, calibration=windows)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_skipped_experts_stay_dense_and_come_back(windows, tmp_path):
    recipe = dataclasses.replace(KEEP, keep=0.95, skip=["*.experts.*"])
    model = calr.compress(mixture(), recipe, calibration=windows)
    experts = model.model.layers[0].mlp.experts
    assert type(experts) is Experts and type(experts.down[0]) is nn.Linear
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, windows), logits(model, windows))


@pytest.mark.parametrize("target", ["gguf", "compressed-tensors"])
def test_exports_to_what_holds_no_experts_are_refused(target, windows, gguf_file, tmp_path):
    model = mixture()
    with pytest.raises(CalrError, match=f"target={target}: .* experts"):
        calr.compress(model, calr.Recipe(bits=5, target=target), calibration=windows)
    calr.compress(model, BITS, calibration=windows).save_pretrained(tmp_path / "made")
    byte_tokenizer().save_pretrained(tmp_path / "made")
    with pytest.raises(CalrError, match=f"mlp.experts: (?i:{target}) keeps all experts"):
        if target == "gguf":
            export_gguf(str(tmp_path / "made"), tmp_path / "out.gguf", like=gguf_file)
        else:
            export_compressed_tensors(str(tmp_path / "made"), tmp_path / "out")


def test_what_was_apart_before_a_refusal_stays_so(windows, tmp_path):
    mixture().save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    lazy, _ = load(str(tmp_path / "dense"), lazily=True)
    wanted = logits(lazy, windows)
    with pytest.raises(CalrError, match="matches none"):
        calr.compress(lazy, calr.Recipe(bits=5, skip=["*.nothing"]), calibration=windows)
    assert torch.equal(logits(lazy, windows), wanted)
    compressed = dataclasses.replace(KEEP, keep=0.95, skip=["*.experts.*"])
    model = calr.compress(mixture(), compressed, calibration=windows)
    with pytest.raises(CalrError, match="compressed already"):
        calr.compress(model, BITS, calibration=windows)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, windows), logits(model, windows))


def test_a_frozen_mixture_comes_back_frozen(windows):
    model = mixture().requires_grad_(False)
    with pytest.raises(CalrError, match="matches none"):
        calr.compress(model, calr.Recipe(bits=5, skip=["*.nothing"]), calibration=windows)
    assert not any(p.requires_grad for p in model.parameters())


def test_experts_that_somebody_watches_are_left_alone(windows):
    model = mixture()
    model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: None)
    with pytest.raises(CalrError, match=r"layers\.0\.mlp\.experts\.gate_up_proj.* stacked weights"):
        calr.compress(model, BITS, calibration=windows)
    assert not list(all_experts(model))


@pytest.mark.parametrize("kind", ["nemotron_h", "aria_text"])
def test_without_gate_and_transposed_experts_are_read_in_parts(kind, tmp_path, ids):
    more = {"layers_block_type": ["attention", "moe"], "moe_num_experts": 4, "moe_topk": 2}
    more |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_latent_size": None}
    mixture(kind, **more).to(torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    whole, lazy = (load(str(tmp_path), lazily=lazily)[0] for lazily in (False, True))
    assert absent(lazy)
    take_apart(whole)
    found = lazy.state_dict(keep_vars=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(present(found[name]), tensor), name
