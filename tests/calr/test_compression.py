"""Compression from Python."""

import copy
import json
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import calr
from calr import job
from calr.errors import CalrError
from calr.model import analyse, load, lowrank, saving
from calr.statistics import collection, gradients, inputs
from calr.storage import store
from calr.testing import byte_tokenizer, tiny_llama, tiny_mixtral

METHODS = ["svd", "svd_llm", "erc_svd", "calr"]


def compressed(ids, device="cpu", statistics=None, **recipe):
    recipe = calr.Recipe(**({"keep": 0.6, "rank_step": 2, "correction_tokens": 0} | recipe))
    return calr.compress(tiny_llama().to(device), recipe, calibration=ids, statistics=statistics)


def kept(model):
    """Fraction of the linear parameters that a compressed model stores."""
    blocks = model.model.layers
    stored = sum(
        p.numel() for n, p in blocks.named_parameters() if "norm" not in n and "bias" not in n
    )
    return stored / analyse(tiny_llama()).linear_parameters


def error(model, ids):
    dense = tiny_llama()(ids).logits
    return float(((model.cpu()(ids).logits - dense).norm() / dense.norm()).detach())


@pytest.mark.parametrize("layout", ["pivoted", "two_factor"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "last_k"])
@pytest.mark.parametrize("method", METHODS)
def test_every_combination_meets_its_budget(method, allocation, layout, ids, device):
    options = {"keep": 0.8 if allocation == "last_k" else 0.6, "rank_step": 1}
    model = compressed(ids, device, method=method, allocation=allocation, layout=layout, **options)
    assert options["keep"] - 0.02 < kept(model) <= options["keep"]
    assert 1e-4 < error(model, ids) < 1.4  # unrelated logits of one norm differ by √2
    layers = model.config.quantization_config.layers
    assert {layer["layout"] for layer in layers.values()} == {layout}


def test_keep_one_changes_nothing(ids):
    model = compressed(ids, keep=1.0)
    assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
    assert model.config.quantization_config.layers == {}


@pytest.mark.parametrize("method", METHODS)
def test_more_parameters_lose_less(method, ids):
    errors = [error(compressed(ids, method=method, keep=k), ids) for k in (0.4, 0.6, 0.9)]
    assert errors == sorted(errors, reverse=True)


def test_whitening_beats_plain_svd_and_global_beats_uniform(ids):
    def final(**options):
        return error(compressed(ids, keep=0.5, **options), ids)

    plain = final(method="svd", allocation="uniform")
    whitened = final(method="svd_llm", allocation="uniform")
    assert whitened < plain
    assert final(method="calr", allocation="global") < whitened


def test_the_same_recipe_gives_the_same_bits(ids):
    first, second = (compressed(ids).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_skipped_layers_stay_dense_and_count_in_keep(ids):
    model = compressed(ids, keep=0.7, skip=("*.0.*", "*.v_proj"))
    assert kept(model) <= 0.7
    layers = model.config.quantization_config.layers
    assert layers
    assert not [name for name in layers if ".0." in name or "v_proj" in name]
    with pytest.raises(CalrError, match=r"unreachable: the skipped layers alone hold 0\.5"):
        compressed(ids, keep=0.3, skip=("*.0.*",))


@pytest.mark.parametrize("allocation", ["global", "uniform", "last_k"])
def test_an_unreachable_keep_is_refused_before_text_is_sampled(monkeypatch, allocation):
    monkeypatch.setattr(job, "calibration_windows", None)
    with pytest.raises(CalrError, match=r"unreachable: the smallest ranks .* keep 0\.\d+"):
        calr.compress(tiny_llama(), calr.Recipe(keep=0.01, allocation=allocation))


def test_uniform_ranks_that_cannot_be_are_refused_before_text_is_sampled(monkeypatch):
    monkeypatch.setattr(job, "calibration_windows", None)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 1}
    model = tiny_llama(hidden_size=64, intermediate_size=160, **heads)
    recipe = calr.Recipe(keep=0.47, allocation="uniform")
    with pytest.raises(CalrError, match=r"keep=0\.47 with rank_step=8: uniform ranks"):
        calr.compress(model, recipe)


@pytest.mark.parametrize("change", [{"keep": 0.5}, {"method": "svd"}, {"ids": 1}, {"seed": 1}])
def test_finished_parts_of_another_run_are_refused(change, ids, tmp_path):
    def run(keep=0.6, method="svd_llm", ids=ids, seed=0):
        recipe = calr.Recipe(keep=keep, method=method, rank_step=2, correction_tokens=0)
        return calr.compress(tiny_llama(seed), recipe, calibration=ids, work=str(tmp_path))

    first = run()
    assert torch.equal(run()(ids).logits, first(ids).logits)
    changed = {"ids": ids + 1} if "ids" in change else change
    with pytest.raises(CalrError, match="holds parts of another run"):
        run(**changed)


def test_other_text_in_the_same_file_is_another_run(tmp_path):
    recipe = calr.Recipe(keep=0.5, samples=2, window=16, gradient_samples=1, correction_tokens=0)
    options = {"tokenizer": byte_tokenizer(), "work": tmp_path / "work"}
    for words, known in (("one two ", True), ("three four ", False)):
        (tmp_path / "t.txt").write_text(words * 40)
        options["calibration"] = str(tmp_path / "t.txt")
        if known:
            calr.compress(tiny_llama(), recipe, **options)
    with pytest.raises(CalrError, match="holds parts of another run"):
        calr.compress(tiny_llama(), recipe, **options)


def test_a_failed_compression_leaves_the_model_alone(ids, monkeypatch):
    def fail(*_: object) -> None:
        raise CalrError("lost")

    monkeypatch.setattr(lowrank, "low_rank", fail)
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalrError, match="lost"):
        calr.compress(model, calr.Recipe(keep=0.5), calibration=ids)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(before) == len(after)


def test_statistics_are_reused_and_those_of_another_run_refused(ids, tmp_path):
    first = compressed(ids, statistics=tmp_path, method="svd_llm")
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("inputs-*")}
    assert len(stamps) == 2
    again = compressed(ids, statistics=tmp_path, method="svd_llm")
    compressed(ids, statistics=tmp_path, method="calr", keep=0.5)
    assert stamps == {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("inputs-*")}
    assert torch.equal(first(ids).logits, again(ids).logits)
    for others in (ids.flip(0), ids.view(2 * len(ids), -1)):
        with pytest.raises(CalrError, match="statistics of another model"):
            compressed(others, statistics=tmp_path)


def test_erc_svd_never_gets_a_rank_that_it_cannot_make(ids):
    model = compressed(ids, keep=0.4, method="erc_svd", method_options={"beta": 0.3})
    ranks = [layer["rank"] for layer in model.config.quantization_config.layers.values()]
    assert min(ranks) >= 4  # 0.3 * 32 * 16 / 48 = 3.2, and one more


def test_last_k_with_skipped_layers_meets_its_budget(ids):
    options = {"allocation": "last_k", "skip": ("*.1.mlp.*",), "rank_step": 1}
    assert 0.75 < kept(compressed(ids, keep=0.8, **options)) <= 0.8


def test_dropout_is_off_while_compressing_and_training_mode_comes_back(ids):
    first, second = (tiny_llama(attention_dropout=0.5).train() for _ in range(2))
    for model in (first, second):
        calr.compress(model, calr.Recipe(keep=0.6), calibration=ids)
        assert all(module.training for module in model.modules())
    states = first.state_dict(), second.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_nothing_left_to_compress_and_foreign_ids_are_refused(ids):
    with pytest.raises(CalrError, match="nothing to compress"):
        compressed(ids, skip=("*",))
    with pytest.raises(CalrError, match="300 is outside the model's vocabulary of 258"):
        compressed(torch.full((2, 8), 300))


def test_weights_that_are_not_in_memory_are_refused(ids):
    with pytest.raises(CalrError, match="is not in memory"):
        calr.compress(tiny_llama().to("meta"), calibration=ids)


def test_exact_solver(ids):
    assert kept(compressed(ids, solver="exact")) <= 0.6


def test_text_and_tokenizer(ids):
    recipe = calr.Recipe(keep=0.7, samples=4, window=32, gradient_samples=2, correction_tokens=0)
    model = calr.compress(
        tiny_llama(), recipe, calibration=["some text " * 200], tokenizer=byte_tokenizer()
    )
    assert model.config.quantization_config.recipe["tokens"] == 128


def test_half_precision_keeps_its_dtype(ids):
    model = tiny_llama().to(torch.bfloat16)
    calr.compress(model, calr.Recipe(keep=0.7), calibration=ids)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep", 0.0),
        ("keep", 1.5),
        ("keep", float("nan")),
        ("rank_step", 0),
        ("samples", 0),
        ("window", 0),
        ("layout", "round"),
        ("allocation", "random"),
        ("solver", "x"),
        ("sensitivity", "x"),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(CalrError, match=f"{field}="):
        calr.Recipe(**{field: value})


def test_a_recipe_without_a_budget_is_of_five_bits_or_of_its_methods_own():
    assert (calr.Recipe().bits, calr.Recipe().keep) == (5.0, None)
    assert calr.Recipe().budget == "bits=5.0"
    for method in ("svd", "svd_llm", "erc_svd"):
        assert (calr.Recipe(method=method).bits, calr.Recipe(method=method).keep) == (None, 0.8)
    assert calr.Recipe.read(calr.Recipe().to_dict()).to_dict() == calr.Recipe().to_dict()


@pytest.mark.parametrize(
    ("name", "value"),
    [("method", "svd"), ("layout", "two_factor"), ("allocation", "uniform"), ("rank_step", 4),
     ("sensitivity", "none"), ("shifted_inputs", True), ("block_epochs", 1),
     ("block_learning_rate", 1e-3), ("method_options", {"beta": 0.1})],
)  # fmt: skip
def test_options_of_low_rank_are_refused_under_a_budget_of_bytes(name, value):
    with pytest.raises(CalrError, match=f"{name}=.*: is of low-rank layers"):
        calr.Recipe(bits=5, **{name: value})
    calr.Recipe(keep=0.8, **({"method": "erc_svd"} | {name: value}))


def test_targets_have_their_scale_group():
    assert calr.Recipe(bits=5, target="gguf").scale_groups == (32,)
    with pytest.raises(CalrError, match="scale_group=64: target=gguf has 32"):
        calr.Recipe(bits=5, target="gguf", scale_group=64)
    with pytest.raises(CalrError, match="target=gguf: holds no low-rank layers"):
        calr.Recipe(keep=0.5, target="gguf")
    with pytest.raises(CalrError, match="target='onnx': must be"):
        calr.Recipe(target="onnx")


def test_without_a_backward_pass_idle_blocks_get_the_smallest_ranks(ids, monkeypatch):
    monkeypatch.setattr(collection, "gradient_moments", None)
    model = tiny_llama(num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    recipe = calr.Recipe(
        keep=0.6, method="svd_llm", sensitivity="influence", rank_step=2, correction_tokens=0
    )
    compressed = calr.compress(model, recipe, calibration=ids)
    layers = compressed.config.quantization_config.layers
    idle = {layer["rank"] for name, layer in layers.items() if ".layers.2." in name}
    assert idle == {2}
    assert len([name for name in layers if ".layers.2." in name]) == 7


@pytest.mark.parametrize("elastic", [False, True], ids=["compress", "resize"])
def test_keep_one_is_the_identity_however_little_was_seen(elastic, ids):
    """16 tokens where layers have up to 80 inputs: most directions were never seen."""
    model, few = tiny_llama(), ids[:1, :16]
    whole = calr.Recipe(keep=1.0, rank_step=2, correction_tokens=0)
    with torch.no_grad():
        expected = model(ids).logits
        if elastic:
            found = calr.resize(calr.compress(model, whole, calibration=few, elastic=True), 1.0)
        else:
            found = calr.compress(model, whole, calibration=few)
        rounding = 1e-4 * float(expected.abs().max())  # of float32 factors, a layer after another
        torch.testing.assert_close(found(ids).logits, expected, rtol=0, atol=rounding)
    assert found.config.quantization_config.layers == {}


def test_an_elastic_model_is_the_dense_one_however_little_was_seen(ids):
    recipe = calr.Recipe(keep=1.0, rank_step=2)
    with torch.no_grad():
        expected = tiny_llama()(ids).logits
        found = calr.compress(tiny_llama(), recipe, calibration=ids[:1, :16], elastic=True)
        assert float((found(ids).logits - expected).norm() / expected.norm()) < 2e-5


def test_a_budget_is_used_however_little_was_seen(ids):
    model = compressed(ids[:1, :16], keep=0.95)
    assert 0.94 < kept(model) <= 0.95
    assert error(model, ids) < 0.7  # 1.34 when unseen directions cost nothing


def test_a_layer_whose_input_is_zero(ids):
    """LLaMA-Pro starts blocks whose output is zero."""
    model = tiny_llama(num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    recipe = calr.Recipe(keep=0.7, rank_step=2, correction_tokens=0, shifted_inputs=True)
    assert calr.compress(model, recipe, calibration=ids)(ids).logits.isfinite().all()


def test_a_work_directory_serves_one_run_at_a_time(ids, tmp_path):
    from calr.storage import locked

    recipe = calr.Recipe(keep=0.6, rank_step=2, correction_tokens=0)
    held = locked(tmp_path / "lock", "another")
    with held, pytest.raises(CalrError, match="is in use by process"):
        calr.compress(tiny_llama(), recipe, calibration=ids, work=tmp_path)
    calr.compress(tiny_llama(), recipe, calibration=ids, work=tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 5, "correction_tokens": 0},
        {"bits": 5, "correction_tokens": 64},
        {"keep": 0.6, "rank_step": 2, "correction_tokens": 64},
        {"keep": 0.6, "rank_step": 2, "correction_tokens": 0, "shifted_inputs": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["tied", "untied", "mixture"])
def test_read_from_its_files_or_in_memory_the_bits_are_the_same(
    options, kind, tmp_path, monkeypatch
):
    if kind == "mixture":
        monkeypatch.setattr(saving, "SHARD_BYTES", 40_000)  # whose names are those of one file
        dense = tiny_mixtral()
    else:
        dense = tiny_llama(tie_word_embeddings=kind == "tied")
    dense.save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    recipe = calr.Recipe(samples=4, gradient_samples=2, window=16, **options)
    model, tokenizer = load(str(tmp_path / "dense"))
    whole = calr.compress(model, recipe, calibration="builtin", tokenizer=tokenizer)
    calr.compress_to(
        str(tmp_path / "dense"), tmp_path / "made", recipe, calibration="builtin", eval_windows=0
    )
    read, _ = load(str(tmp_path / "made"))
    assert read.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    whole.save_pretrained(tmp_path / "whole")
    found, wanted = (
        set().union(*(load_file(f) for f in (tmp_path / place).glob("*.safetensors")))
        for place in ("made", "whole")
    )
    assert found == wanted


def test_paths_are_taken_and_what_has_no_name_is_refused_at_once(source, ids, tmp_path):
    recipe = calr.Recipe(bits=8, correction_tokens=0, samples=4, gradient_samples=2, window=16)
    with pytest.raises(CalrError, match="calibration: name a file or a source"):
        calr.compress_to(source, tmp_path / "out", recipe, calibration=ids)
    text = tmp_path / "text.txt"
    text.write_text("An old lighthouse. " * 100)
    found = calr.compress_to(Path(source), tmp_path / "out", recipe, calibration=text)
    assert found["tensor_bytes"] > 0


@pytest.mark.parametrize("budget", [{"bits": 6}, {"keep": 0.7}])
def test_a_model_in_float64_is_compressed_but_not_trained(budget, ids):
    with pytest.raises(CalrError, match="dtype=float64: is not trained in"):
        calr.compress(tiny_llama().double(), calr.Recipe(**budget), calibration=ids)
    recipe = calr.Recipe(**budget, correction_tokens=0)
    model = calr.compress(tiny_llama().double(), recipe, calibration=ids)
    assert model.dtype == torch.float64
    assert model(ids).logits.isfinite().all()


def test_a_large_result_is_written_in_shards_that_load_alike(source, tmp_path, monkeypatch):
    recipe = calr.Recipe(bits=6, correction_tokens=0, samples=4, gradient_samples=2, window=16)
    found, before, write, read = [], [], saving.save_file, saving.present

    def save(shard, *arguments, **options):
        matrices = [tensor for tensor in shard.values() if tensor.dtype == torch.uint8]
        before[:] = map(weakref.ref, matrices)
        write(shard, *arguments, **options)

    def present(tensor):
        assert all(reference() is None for reference in before), "what was written is still there"
        return read(tensor)

    def nothing(tensors, file, **options):
        assert not tensors, "transformers writes the whole model first"
        write(tensors, file, **options)

    monkeypatch.setattr(saving, "present", present)
    monkeypatch.setattr(saving, "save_file", save)
    for name, shard in {"one": saving.SHARD_BYTES, "many": 8_000}.items():
        monkeypatch.setattr(saving, "SHARD_BYTES", shard)
        if name == "many":
            monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", nothing)
        calr.compress_to(
            str(source), tmp_path / name, recipe, calibration="builtin", eval_windows=0
        )
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        found.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
        described = json.loads((tmp_path / name / "config.json").read_text())
        found[-1]["config"] = torch.tensor(list(json.dumps(described).encode()))
        assert len(list((tmp_path / name).glob("*.safetensors"))) == {"one": 1, "many": 3}[name]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


SPREAD = [0.0, 0.15, 0.3, 0.5, 0.65, 0.8, 0.9, 1.0]  # where, among all that is written


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A tiny model that can be rotated."""
    place = tmp_path_factory.mktemp("untied") / "model"
    tiny_llama(tie_word_embeddings=False).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def every_write(untied, tmp_path_factory):
    """Run with all kinds of writes; return what it made, and how many tensor files it wrote."""
    place, calls = tmp_path_factory.mktemp("whole") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        _limit(patch, lambda file: calls.append(file))
        _run(untied, place)
    kinds = {
        file.parent.name.split(".")[0] if ".calr" in str(file.parent) else file.name
        for file in calls
    }
    assert kinds >= {"statistics", "hidden", "backward", "rotated", "rounded", "trained"}
    assert "checkpoint" in kinds
    return {file.name: file.read_bytes() for file in place.glob("*.safetensors")}, len(calls)


@pytest.mark.parametrize("share", SPREAD)
def test_a_disk_that_fills_at_any_write_loses_nothing(share, every_write, untied, tmp_path):
    wanted, count = every_write
    left = [round(share * (count - 1))]

    def fill(file):
        left[0] -= 1
        if left[0] < 0:
            file.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        _limit(patch, fill)
        with pytest.raises(CalrError, match="the disk is full; make room"):
            _run(untied, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    _run(untied, tmp_path / "out")
    found = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")}
    assert found == wanted


def test_what_is_kept_in_files_may_lie_elsewhere(every_write, untied, tmp_path):
    wanted, count = every_write
    scratch, left = tmp_path / "scratch", [count // 2]

    def fill(file):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        _limit(patch, fill)
        with pytest.raises(CalrError, match="the disk is full; make room"):
            _run(untied, tmp_path / "out", offload=scratch)
    (folder,) = scratch.iterdir()
    assert {"statistics", "rotated"} <= {path.name for path in folder.iterdir()}
    beside = {p.name for p in (tmp_path / "out" / ".calr").iterdir()}
    assert beside == {"ledger.json", "offloaded"}
    with pytest.raises(CalrError, match=r"has its parts in .*scratch"):
        _run(untied, tmp_path / "out")
    with pytest.raises(CalrError, match="holds an unfinished run of something else"):
        _run(untied, tmp_path / "out", offload=scratch, bits=7)
    with pytest.MonkeyPatch.context() as patch:
        done = []
        _limit(patch, lambda file: done.append(file))
        _run(untied, tmp_path / "out", offload=scratch)
    assert len(done) <= count - count // 2 + 1, "what was finished is not done again"
    found = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")}
    assert found == wanted
    assert not list(scratch.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        left[0] = count // 2
        _limit(patch, fill)
        with pytest.raises(CalrError, match="the disk is full; make room"):
            _run(untied, tmp_path / "again", offload=scratch)
    with pytest.raises(CalrError, match=r"has its parts in .*scratch"):
        _run(untied, tmp_path / "again", overwrite=True)
    _run(untied, tmp_path / "again", bits=7, overwrite=True)
    assert not list(scratch.iterdir()), "parts of a run that was given up"
    with pytest.raises(CalrError, match=r"offload=.*: lies in .*, which holds only the checkpoint"):
        _run(untied, tmp_path / "other", offload=tmp_path / "other" / "scratch")
    with pytest.raises(CalrError, match=r"offload=.*config\.json: is a file"):
        _run(untied, tmp_path / "other", offload=untied / "config.json")


def _limit(patch, before):
    """Have something happen before every file of tensors that a run writes; shards are small."""
    patch.setattr(saving, "SHARD_BYTES", 8_000)
    for module in (saving, store):

        def save(tensors, file, write=module.save_file, **options):
            before(file)
            write(tensors, file, **options)

        patch.setattr(module, "save_file", save)


def _run(source, place, bits=6, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "SHARD_BYTES", 8_000)
        for module in (inputs, gradients):
            patch.setattr(module, "HELD_BYTES", 0)
        text = {"samples": 4, "gradient_samples": 2, "window": 16, "correction_tokens": 64}
        recipe = calr.Recipe(bits=bits, **text)
        options |= {"calibration": "builtin", "eval_windows": 2}
        calr.compress_to(str(source), place, recipe, **options)
