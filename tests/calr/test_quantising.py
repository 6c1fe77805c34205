"""Compression to a budget of bytes: what is promised of every compressed model holds, too."""

import dataclasses
import json
import re
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

import calr
from calr import quantising
from calr.cli import main
from calr.errors import CalrError
from calr.export import export_dense
from calr.model import Swapped, analyse, parameter_count, quantize, tensor_bytes, weight_of
from calr.quantising import smoothed
from calr.ranks import byte_budget
from calr.rounding import round_matrix, together
from calr.statistics import Statistics
from calr.storage import Store
from calr.testing import byte_tokenizer, tiny_llama
from calr_kernels import Form, QuantizedEmbedding, QuantizedLinear, records
from calr_kernels.nn import Corrective

RECIPE = calr.Recipe(bits=5.5, scale_group=32, correction_tokens=0)


def divergence(model, dense, ids):
    with torch.no_grad():
        log_p, log_q = (m(ids).logits.double().log_softmax(-1) for m in (dense, model))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def with_paths(budget, prices, **options):
    """Choose 3 bits and a corrective path of rank 8 for every layer that may have one."""
    found = {}
    for matrix, forms in zip(budget.matrices, budget.choices(), strict=True):
        fit = [f for (f,) in forms if f is not None and f.bits == 3 and f.corrective_rank <= 8]
        found[matrix.name] = max(fit, key=lambda form: form.corrective_rank)
    return found


@pytest.fixture(scope="module", params=["tied", "untied", "corrective"])
def saved(request, ids, tmp_path_factory):
    model = tiny_llama(tie_word_embeddings=request.param == "tied", attention_bias=True)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "corrective":
            patch.setattr(quantising, "least_loss", with_paths)
        model = calr.compress(model, RECIPE, calibration=ids)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory


@pytest.mark.parametrize("bits", [4.6, 6.0, 8.6])
def test_the_budget_is_kept_and_more_bytes_are_nearer(bits, ids):
    dense = tiny_llama()
    model = calr.compress(
        tiny_llama(), dataclasses.replace(RECIPE, bits=bits, keep=None), calibration=ids
    )
    found = 8 * tensor_bytes(model) / sum(p.numel() for p in dense.parameters())
    assert bits - 0.4 < found <= bits
    assert divergence(model, dense, ids) < {4.6: 0.15, 6.0: 0.02, 8.6: 1e-3}[bits]


def test_the_knapsack_beats_one_width_for_all(ids):
    dense, model = tiny_llama(), calr.compress(tiny_llama(), RECIPE, calibration=ids)
    flat = tiny_llama()
    for name, module in list(flat.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            codes = round_matrix(module.weight, Form(5, "formula", 32))
            module.weight.data = codes.weight()
    assert divergence(model, dense, ids) < 3 * divergence(flat, dense, ids)


@pytest.mark.works(
    "`save_pretrained` → `from_pretrained` → `save_pretrained`", quantised="byte-identical"
)
def test_save_load_save_is_byte_identical_and_logits_are_equal(saved, tmp_path, ids):
    model, directory = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()
    block = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert block["format_version"] == 2


def test_another_dtype_leaves_the_records_as_they_are(saved, ids):
    model, directory = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert loaded(ids).logits.dtype == torch.bfloat16
    for name, module in loaded.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            assert torch.equal(module.weight, model.get_submodule(name).weight)
    assert loaded.float()(ids).logits.dtype == torch.float32


def test_parameters_are_those_of_the_dense_model_and_of_corrective_paths(saved):
    tied = saved[0].config.tie_word_embeddings
    dense = tiny_llama(tie_word_embeddings=tied, attention_bias=True)
    paths = [m for m in saved[0].modules() if isinstance(m, Corrective)]
    more = sum(path.rank * (path.in_features + path.out_features) for path in paths)
    assert parameter_count(saved[0]) == sum(p.numel() for p in dense.parameters()) + more


def test_a_tied_matrix_is_stored_once(saved):
    model, directory = saved
    tied = model.config.tie_word_embeddings
    assert ("lm_head.weight" in load_file(directory / "model.safetensors")) != tied
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_loading_without_calr_fails_loudly(saved):
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(saved[1])!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "mismatch" in result.stderr


@pytest.mark.works("`model.dequantize()` back to dense, and merging then", quantised="dense")
def test_dequantize_gives_the_same_function(saved, ids, tmp_path):
    model, directory = saved
    dense = AutoModelForCausalLM.from_pretrained(directory).dequantize()
    assert not any(isinstance(m, QuantizedLinear | QuantizedEmbedding) for m in dense.modules())
    torch.testing.assert_close(dense(ids).logits, model(ids).logits)
    dense.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, dense(ids).logits)


@pytest.mark.works("training of all factors, or of a PEFT LoRA on top", quantised="LoRA")
@pytest.mark.works("PEFT `merge_and_unload`", quantised="yes")
def test_lora_on_top_trains_and_merges_into_the_corrective_path(saved, ids, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved[1])
    settings = {"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    lora = peft.get_peft_model(model, peft.LoraConfig(**settings))
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = lora(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with pytest.raises(CalrError, match="pissa"):
        peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(saved[1]),
            peft.LoraConfig(**settings, init_lora_weights="pissa"),
        )
    wanted = lora(input_ids=ids).logits
    merged = lora.merge_and_unload()
    layer, before = merged.get_submodule(NAME), saved[0].get_submodule(NAME).form
    assert layer.form.corrective_rank == before.corrective_rank + 2
    torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, merged(ids).logits)


def test_a_merge_cannot_be_undone_and_other_adapters_have_none(saved):
    settings = {"target_modules": ["up_proj"], "task_type": "CAUSAL_LM"}
    lora = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(saved[1]), peft.LoraConfig(r=2, **settings)
    )
    lora.merge_adapter()
    with pytest.raises(CalrError, match="cannot be taken out again"):
        lora.unmerge_adapter()
    other = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(saved[1]), peft.LoHaConfig(r=2, **settings)
    )
    with pytest.raises(CalrError, match="only a plain LoRA of linear layers can be merged"):
        other.merge_and_unload()


@pytest.mark.works("`device_map` with CPU and disk offload", quantised="yes")
@pytest.mark.works("`generate`, `torch.compile`", quantised="yes")
def test_generation_and_offload(saved, ids, tmp_path):
    model, directory = saved
    tokens = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    prompt = torch.tensor([[5, 6, 7]])
    wanted = model.generate(prompt, **tokens)
    fast = calr.optimize_for_inference(AutoModelForCausalLM.from_pretrained(directory))
    assert torch.equal(fast.generate(prompt, **tokens), wanted)
    compiled = AutoModelForCausalLM.from_pretrained(directory)
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    assert torch.equal(compiled.generate(prompt, **tokens), wanted)
    parts = {"model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb", "model.layers.0"}
    loaded = AutoModelForCausalLM.from_pretrained(
        directory,
        device_map=dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"},
        offload_folder=tmp_path,
    )
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_gemma_scales_its_embeddings(ids, tmp_path):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32, vocab_size=258, sliding_window=16,
    )  # fmt: skip
    dense = Gemma3ForCausalLM(config).eval()
    before = dense(ids).logits.detach()
    model = calr.compress(dense, dataclasses.replace(RECIPE, bits=8.7, keep=None), calibration=ids)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert (model(ids).logits - before).norm() < 0.03 * before.norm()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    torch.testing.assert_close(loaded.dequantize()(ids).logits, model(ids).logits)
    byte_tokenizer().save_pretrained(tmp_path)
    export_dense(str(tmp_path), tmp_path.with_suffix(".dense"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path.with_suffix(".dense"))
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)
    again = calr.compress(loaded, dataclasses.replace(RECIPE, bits=8.7), calibration=ids)
    assert isinstance(again.model.embed_tokens, QuantizedEmbedding)


@pytest.mark.parametrize("paths", [False, True], ids=["primary", "corrective"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("fast", [False, True], ids=["float32", "bfloat16"])
def test_training_moves_norms_scales_and_factors_but_no_integer(tied, paths, fast, monkeypatch):
    able = {"amx_bf16": fast}  # both kinds of CPU, on every machine
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    text = torch.randint(2, 258, (40, 32), generator=torch.Generator().manual_seed(9))
    recipe = dataclasses.replace(RECIPE, bits=4.2, keep=None, window=32, learning_rate=5e-3)
    if paths:
        monkeypatch.setattr(quantising, "least_loss", with_paths)
    dense = tiny_llama(tie_word_embeddings=tied)
    plain = calr.compress(tiny_llama(tie_word_embeddings=tied), recipe, calibration=text)
    recipe = dataclasses.replace(recipe, correction_tokens=1024)
    trained = calr.compress(tiny_llama(tie_word_embeddings=tied), recipe, calibration=text)
    done = trained.config.quantization_config.recipe["correction"]
    assert done["loss_after"] < done["loss_before"]
    held_out = text[-8:]
    assert divergence(trained, dense, held_out) < divergence(plain, dense, held_out)
    assert not torch.equal(plain.model.norm.weight, trained.model.norm.weight)
    for name, module in trained.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            before = plain.get_submodule(name)
            columns = getattr(module, "in_features", None) or module.embedding_dim
            found, wanted = (records.unpack(m.weight, m.form, columns) for m in (module, before))
            assert torch.equal(found[0], wanted[0]), name
            assert not torch.equal(found[1], wanted[1]), name
            assert (found[1] * wanted[1] >= 0).all(), name
    path = trained.get_submodule(NAME).corrective
    assert (path is not None) == paths
    if paths:
        assert not torch.equal(path.up, plain.get_submodule(NAME).corrective.up)


def test_the_student_is_the_model_that_is_stored(ids):
    """Before it is trained, but for the rounding of the factors."""
    model = tiny_llama()
    budget = byte_budget(model, analyse(model), RECIPE)
    forms = {matrix: with_paths(budget, {})[matrix.name] for matrix in budget.matrices}
    made = {}
    for matrix, form in forms.items():
        weight = weight_of(model, matrix.name)
        made[matrix] = {"weight": round_matrix(weight, form).records}
        if form.corrective_rank:
            draw = torch.Generator().manual_seed(1)
            down = torch.randn(8, matrix.in_features, generator=draw) / 30
            up = torch.randn(8, matrix.out_features, generator=draw) / 30
            made[matrix] |= quantising.corrective_factors(down, up, form)
    placed = quantising.students(model, forms, made)
    with Swapped(model, placed), torch.no_grad():
        found = model(ids).logits
    for matrix, form in forms.items():
        for name in matrix.names:
            assert torch.equal(quantising.trained(placed[name])["weight"], made[matrix]["weight"])
        quantize(model, matrix.names, form, made[matrix])
    torch.testing.assert_close(model(ids).logits, found, rtol=1e-4, atol=1e-4)


def test_what_was_not_seen_is_not_free():
    found = smoothed(torch.tensor([5.0, 1.0, 0.0, 0.0]))
    assert float(found.sum()) == pytest.approx(1)
    assert (found > 0).all()
    assert (smoothed(torch.zeros(4)) == 0.25).all()


def test_some_rows_tell_the_price_of_all(ids, monkeypatch):
    model = tiny_llama()
    structure = analyse(model)
    budget = byte_budget(model, structure, RECIPE)
    statistics = Statistics(model, structure, ids, Store(), gradient_ids=ids[:2])

    def prices():
        quantiser = quantising.Quantiser(model, budget, statistics, Store())
        form = {m.name: budget.form(4, m.in_features) for m in budget.matrices}
        return {m.name: quantiser._prices([m], form[m.name])[0]["losses"] for m in budget.matrices}

    whole = prices()
    monkeypatch.setattr(quantising, "ROWS", 48)
    some = prices()
    changed = [name for name in whole if not torch.equal(whole[name], some[name])]
    assert len(changed) == 5  # gate_proj and up_proj of two blocks, of 80 rows, and the embedding
    for name in changed:
        assert torch.allclose(whole[name], some[name], rtol=0.35), name


def test_the_price_of_a_scale_group_is_measured(ids):
    model = tiny_llama(hidden_size=128, intermediate_size=128)
    structure = analyse(model)
    recipe = calr.Recipe(bits=5.5, correction_tokens=0)
    budget = byte_budget(model, structure, recipe)
    uneven = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(uneven).weight[:, ::32] *= 30
    statistics = Statistics(model, structure, ids, Store(), gradient_ids=ids[:2])
    quantiser = quantising.Quantiser(model, budget, statistics, Store())
    growth = {}
    for matrix in budget.matrices:
        assert budget.groups(matrix.in_features) == [64, 32, 128]
        priced = quantiser._prices([matrix], budget.form(4, matrix.in_features))
        found = priced[0]["growth"].tolist()
        growth[matrix.name] = found
        assert found[0] == 1 and found[1] < found[2], matrix.name
    exact = quantiser._curvature(next(m for m in budget.matrices if m.name == uneven))
    weight, losses = model.get_submodule(uneven).weight.detach(), []
    for group in (64, 32, 128):
        form = dataclasses.replace(budget.form(4, 128), scale_group=group)
        rounded = round_matrix(weight, form, exact.inputs)
        losses.append(exact.loss(weight - rounded.weight()))
    assert growth[uneven] == pytest.approx([loss / losses[0] for loss in losses], rel=1e-4)


@pytest.mark.parametrize("call", [3, 17, 22])  # among the prices, and among what follows them
def test_interrupted_and_started_again_gives_the_same_bits(call, ids, tmp_path, monkeypatch):
    whole = calr.compress(tiny_llama(), RECIPE, calibration=ids)
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return round_matrix(*arguments)

    monkeypatch.setattr(together, "round_matrix", counted)
    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        calr.compress(model, RECIPE, calibration=ids, work=tmp_path)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    again = calr.compress(model, RECIPE, calibration=ids, work=tmp_path)
    for (name, a), (_, b) in zip(
        whole.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    every = len({(m.data_ptr(), form) for m, form, *_ in calls})
    assert len(calls) == every + 1  # only the interrupted one was done twice


NAME = "model.layers.0.mlp.up_proj"


def edited(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def infinite(tensors):
    tensors[f"{NAME}.weight"][0, 0, :2] = torch.tensor([0, 0x7C], dtype=torch.uint8)


TAMPERED = {
    "bits": (lambda c: c["layers"][NAME].update(bits=7), None, "bits=7: must be one of"),
    "levels": (lambda c: c["layers"][NAME].update(levels="x"), None, "levels='x'"),
    "group": (lambda c: c["layers"][NAME].update(scale_group=33), None, "scale_group=33"),
    "field": (lambda c: c["layers"][NAME].update(rank=3), None, "rank"),
    "version": (lambda c: c.update(format_version=1), None, "need format_version 2"),
    "module": (
        lambda c: c["layers"].update({"model.norm": c["layers"][NAME]}),
        None,
        "model.norm: is a LlamaRMSNorm",
    ),
    "scale": (None, infinite, "a scale is NaN or infinity"),
    "rank": (lambda c: c["layers"][NAME].update(corrective_rank="8"), None, "corrective_rank='8'"),
    "path": (
        lambda c: c["layers"][NAME].update(corrective_rank=9),
        None,
        f"{NAME}.corrective.down: (missing|has shape)",
    ),
    "dtype": (
        None,
        lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].to(torch.int8)}),
        "has type I8 in",
    ),
    "shape": (
        None,
        lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"][:, :, 1:].contiguous()}),
        "has shape",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_checkpoint_is_refused_by_name(what, saved, tmp_path):
    in_config, in_tensors, message = TAMPERED[what]
    saved[0].save_pretrained(tmp_path)
    if in_config is not None:
        config = json.loads((tmp_path / "config.json").read_text())
        in_config(config["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        edited(tmp_path, in_tensors)
    with pytest.raises(CalrError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("change", ["unlisted", "other levels"])
def test_a_tied_matrix_is_of_one_form(change, name, ids, tmp_path):
    model = calr.compress(tiny_llama(), RECIPE, calibration=ids)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    if change == "unlisted":
        del layers[name]
    else:
        other = {"uniform": "formula", "formula": "uniform", "table": "uniform"}
        layers[name]["levels"] = other[layers[name]["levels"]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CalrError, match=r"lm_head|embed_tokens"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", 5, "--keep", 0.5], "keep and bits: are several budgets"),
        (["--bits", 5, "--size", "9MB"], "bits and size: are several budgets"),
        (["--bits", 1], "is below the .* that the smallest forms take"),
        (["--bits", 17], "at most 16"),
        (["--size", "lots"], "size='lots': must be like 90MB"),
        (["--bits", 5, "--scale_group", 48], "scale_group=48: must be one of"),
        (["--bits", 5, "--elastic"], "elastic: is a low-rank checkpoint"),
    ],
)
def test_budgets_that_cannot_be(options, message, source, tmp_path, capsys):
    arguments = ["compress", source, tmp_path / "out", *options]
    assert main([str(a) for a in arguments]) == 1
    said = capsys.readouterr().err.replace("\n", " ")
    assert "Traceback" not in said
    assert re.search(message, said), said
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_command_line_from_plan_to_inspect(source, tmp_path, capsys):
    out = tmp_path / "out"
    few = ["--samples", 4, "--gradient_samples", 2, "--window", 32, "--calibration", "builtin"]
    few += ["--correction_tokens", 64, "--eval_windows", 2]

    def run(*arguments):
        assert main([str(a) for a in arguments]) == 0
        return capsys.readouterr().out

    planned = json.loads(run("plan", source, "--size", "30KB", *few, "--json"))
    assert planned["totals"]["tensor_bytes"] <= 30_000
    assert "smallest that the forms reach" in run("plan", source, "--size", "30KB", *few)
    kept = ["--statistics", tmp_path / "kept"]
    with pytest.raises(CalrError, match="holds no statistics; compress with it first"):
        calr.plan(str(source), calr.Recipe(size="30KB"), statistics=tmp_path / "kept")
    command = ["compress", source, out, "--size", "30KB", *few, *kept, "--json"]
    made = json.loads(run(*command))
    exact = json.loads(run("plan", source, "--size", "30KB", *few, *kept, "--json"))
    assert exact["totals"]["tensor_bytes"] == made["tensor_bytes"]
    assert not exact["ranks_follow_calibration"]
    assert planned["exports"] == ["dense"]
    target = ["--target", "compressed-tensors", "--bits", "14.5", "--dtype", "bfloat16"]
    assert "can be exported to" in run("plan", source, *target)
    assert json.loads(run("plan", source, *target, "--json"))["exports"] == ["dense", target[1]]
    assert made["tensor_bytes"] <= 30_000 < made["source_bytes"]
    found = json.loads(run("inspect", out, "--json"))
    assert [row["bits"] for row in found["layers"]] == [row["bits"] for row in exact["layers"]]
    assert found["totals"]["tensor_bytes"] == made["tensor_bytes"]
    assert sum(row["bytes"] for row in found["layers"]) < made["tensor_bytes"]
    assert "scale group" in run("inspect", out)
    assert "quantised" in (out / "README.md").read_text()
    run("generate", out, "--max_new_tokens", 2)
    windows = ["--windows", 2, "--window", 32]
    found = json.loads(run("eval", out, "--against", source, *windows, "--json"))
    first, second = (row["token_perplexity"]["perplexity"] for row in found["models"])
    assert found["comparison"]["ratio"] == pytest.approx(first / second, rel=1e-4)
    assert 0 < found["comparison"]["kl"] < 1
    assert "the same most probable token at" in run("eval", out, "--against", source, *windows)
    itself = json.loads(run("eval", source, "--against", source, *windows, "--json"))
    wanted = itself["models"][0]["token_perplexity"]["perplexity"]
    assert itself["comparison"].pop("perplexity") == pytest.approx(wanted)
    assert itself["comparison"] == {"kl": 0.0, "agreement": 1.0, "ratio": 1.0}
    with pytest.raises(CalrError, match="compressed already"):
        calr.compress(calr.load(str(out))[0], RECIPE, calibration=torch.ones(2, 8).long())


def test_records_in_a_checkpoint_are_those_of_the_form(saved):
    tensors = load_file(saved[1] / "model.safetensors")
    layers = saved[0].config.quantization_config.layers
    assert NAME in layers
    for name, how in layers.items():
        if f"{name}.weight" in tensors:
            module = saved[0].get_submodule(name)
            rows = getattr(module, "out_features", None) or module.num_embeddings
            columns = getattr(module, "in_features", None) or module.embedding_dim
            records.check(tensors[f"{name}.weight"], Form(**how), rows, columns)
