"""LoRA on top of low-rank layers: trains; what PEFT would get wrong is refused or put right."""

import copy
import warnings

import peft
import pytest
import torch

import calr
from calr.errors import CalrError
from calr.testing import tiny_llama, tiny_mixtral
from calr_kernels import LowRankLinear

KINDS = ["elastic", "pivoted", "two_factor"]


@pytest.fixture(scope="module", params=KINDS)
def model(request, ids):
    layout = "two_factor" if request.param == "two_factor" else "pivoted"
    recipe = calr.Recipe(keep=0.7, rank_step=2, correction_tokens=0, layout=layout)
    elastic = request.param == "elastic"
    return calr.compress(tiny_llama(), recipe, calibration=ids, elastic=elastic)


def adapted(model, **options):
    settings = {"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**(settings | options)))


@pytest.mark.works(
    "PEFT `merge_and_unload`",
    two_factor="refused",
    pivoted="refused",
)
def test_merging_is_refused_in_one_sentence_and_changes_nothing(model, ids):
    on_top = adapted(model)
    with torch.no_grad():
        for name, p in on_top.named_parameters():
            p.add_(0.05 if "lora_B" in name else 0)
        before = on_top(ids).logits
        with pytest.raises(CalrError, match=r"cannot be merged into .* layer.*dequantize"):
            on_top.merge_and_unload()
        assert torch.equal(on_top(ids).logits, before)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_from_the_dense_weight_are_refused(start, model):
    with pytest.raises(CalrError, match=f"{start} starts an adapter from the dense weight"):
        adapted(model, init_lora_weights=start)


def test_dora_reads_the_dense_weight_and_is_refused(model):
    with pytest.raises(CalrError, match="DoRA scales by the norms of the dense weight"):
        adapted(model, use_dora=True)


def test_all_linear_means_whole_layers(model, ids):
    on_top = adapted(model, target_modules="all-linear")
    with torch.no_grad():
        torch.testing.assert_close(on_top(ids).logits, model(ids).logits)
    wrapped = {n for n, m in on_top.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert not [name for name in wrapped if name.endswith(".down")]
    layers = [m for m in on_top.modules() if isinstance(m, LowRankLinear)]
    assert len(wrapped) >= len(layers) > 0


@pytest.mark.works("`model.dequantize()` back to dense, and merging then")
def test_after_dequantize_merging_is_right(model, ids):
    dense = copy.deepcopy(model).dequantize()
    on_top = adapted(dense)
    with torch.no_grad():
        for name, p in on_top.named_parameters():
            p.add_(0.05 if "lora_B" in name else 0)
        before = on_top(ids).logits
        torch.testing.assert_close(
            on_top.merge_and_unload()(ids).logits, before, rtol=1e-4, atol=1e-4
        )


def test_a_dense_model_is_not_touched(ids):
    on_top = adapted(tiny_llama(), init_lora_weights="pissa")
    assert on_top.merge_and_unload()(ids).logits.isfinite().all()


@pytest.mark.parametrize("recipe", [{"bits": 6}, {"keep": 0.7}])
def test_all_linear_reaches_every_expert(recipe, ids):
    mixture = tiny_mixtral()
    model = calr.compress(mixture, calr.Recipe(**recipe, correction_tokens=0), calibration=ids)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pattern keys did not match")
        on_top = adapted(model, target_modules="all-linear")
    wrapped = {n for n, m in on_top.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    experts = {name for name in wrapped if ".experts." in name}
    config = model.config
    assert len(experts) == 2 * config.num_hidden_layers * config.num_local_experts
    assert len(wrapped) == len(experts) + 4 * config.num_hidden_layers
    with torch.no_grad():
        torch.testing.assert_close(on_top(ids).logits, model(ids).logits)


def test_what_is_merged_has_the_models_dtype(ids):
    recipe = calr.Recipe(bits=7, correction_tokens=0)
    model = calr.compress(tiny_llama().bfloat16(), recipe, calibration=ids)
    merged = adapted(model).merge_and_unload()
    paths = [m.corrective for m in merged.modules() if getattr(m, "corrective", None) is not None]
    assert paths
    assert merged.dtype == torch.bfloat16 == paths[0].down.dtype


def test_a_variant_of_lora_is_not_merged_as_if_it_were_a_plain_one(ids):
    recipe = calr.Recipe(bits=7, correction_tokens=0)
    model = calr.compress(tiny_llama(), recipe, calibration=ids)
    on_top = adapted(model, alora_invocation_tokens=[5])
    with pytest.raises(CalrError, match="only a plain LoRA of linear layers can be merged"):
        on_top.merge_and_unload()


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("LoraConfig", "lm_head", "merged into lm_head, whose weight is that of model.embed"),
        ("LoraConfig", "embed_tokens", "only a plain LoRA of linear layers can be merged"),
        ("AdaLoraConfig", "q_proj", "only a plain LoRA of linear layers can be merged"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_cannot_be_merged_into_quantised_layers_is_refused(kind, targets, message, ids):
    recipe = calr.Recipe(bits=7, correction_tokens=0)
    model = calr.compress(tiny_llama(), recipe, calibration=ids)
    options = {"total_step": 10, "init_r": 2} if kind == "AdaLoraConfig" else {"r": 2}
    config = getattr(peft, kind)(target_modules=[targets], task_type="CAUSAL_LM", **options)
    on_top = peft.get_peft_model(model, config)
    with pytest.raises(CalrError, match=message):
        on_top.merge_and_unload()
