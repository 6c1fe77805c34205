"""compressed-tensors exports: read by transformers and PEFT, without calr, with the same logits."""

import json
import subprocess
import sys

import pytest
import torch
from compressed_tensors.compressors import unpack_from_int32
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import calr
from calr import quantising
from calr.cli import main
from calr.errors import CalrError
from calr.export import compressed_tensors as exporting
from calr.export import export_compressed_tensors
from calr.testing import byte_tokenizer, tiny_llama
from calr_kernels import QuantizedLinear, records

SHAPE = {"hidden_size": 128, "intermediate_size": 192}
OPTIONS = {"samples": 8, "gradient_samples": 4, "window": 32, "step_tokens": 64}
TRAINED = calr.Recipe(bits=9.2, target="compressed-tensors", correction_tokens=512, **OPTIONS)
NAME = "model.layers.0.self_attn.q_proj"


def mixed(budget, prices, **options):
    """Choose 4 bits for q, k and v, 8 bits for the others, with a corrective path if one may be."""
    found = {}
    for members, choices in zip(budget.bundles, budget.choices(), strict=True):
        bits = 4 if "q_proj" in members[0].name else 8
        fit = [forms for forms in choices if forms[0] is not None and forms[0].bits == bits]
        forms = max(
            fit,
            key=lambda forms: sum(form.corrective_rank for form in forms),
            default=(None,) * len(members),
        )
        found |= {matrix.name: form for matrix, form in zip(members, forms, strict=True)}
    return found


def compressed(directory, recipe, ids, dtype=torch.float32, **overrides):
    model = tiny_llama(**(SHAPE | overrides)).to(dtype)
    model = calr.compress(model, recipe, calibration=ids.repeat(2, 1))
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return model


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def made(request, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(quantising, "least_loss", mixed)
    return compressed(tmp_path / "made", TRAINED, ids, request.param), tmp_path / "made"


def test_transformers_and_peft_give_the_same_logits(made, ids, tmp_path):
    """Without calr, in a process of its own."""
    model, directory = made
    found = export_compressed_tensors(str(directory), tmp_path / "out")
    code = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({found['directory']!r})\n"
        "model.hf_quantizer.compressor.decompress_model(model)\n"
        f"model = PeftModel.from_pretrained(model, {found['adapter']!r}).eval()\n"
        "assert 'calr' not in sys.modules\n"
        f"ids = torch.tensor({ids[:2].tolist()})\n"
        "with torch.no_grad():\n"
        f"    torch.save(model(ids).logits, {str(tmp_path / 'logits')!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "missing" not in result.stderr.lower(), result.stderr
    logits = torch.load(tmp_path / "logits")
    assert logits.dtype == model.dtype
    with torch.no_grad():
        ours = model(ids[:2]).logits.double()
        exact = model.double()(ids[:2]).logits
    largest = float((ours - exact).abs().max())
    assert largest < 0.1 * float(exact.abs().max())
    torch.testing.assert_close(logits.double(), exact, atol=2 * largest, rtol=0)


def test_the_command_line_runs_what_it_exported(made, tmp_path, capsys):
    export_compressed_tensors(str(made[1]), tmp_path / "out")
    assert main(["generate", str(tmp_path / "out"), "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_integers_and_scales_are_the_same_bit_for_bit(made, tmp_path):
    model, directory = made
    found = export_compressed_tensors(str(directory), tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert {layer.form.bits for layer in layers.values()} == {4, 8}
    for name, layer in layers.items():
        form = layer.form
        codes, scales = records.unpack(layer.weight, form, layer.in_features)
        shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
        q = unpack_from_int32(tensors[f"{name}.weight_packed"], form.bits, shape)
        assert torch.equal(q.int() + (1 << (form.bits - 1)), codes.int())
        stored = tensors[f"{name}.weight_scale"]
        assert torch.equal(stored, scales)
        assert torch.equal(stored.bfloat16().half(), stored)  # readers round them to bfloat16
        assert (layer.corrective is not None) == (min(codes.shape) >= 64)
    weights = sum(t.nbytes for t in tensors.values())
    assert found["tensor_bytes"] == weights
    parts = load_file(tmp_path / "out/adapter/adapter_model.safetensors").values()
    assert found["adapter_bytes"] == sum(t.nbytes for t in parts) > 0
    words = sum(8 for _ in layers) * 2  # weight_shape, two int64, is not in our own form
    assert weights + found["adapter_bytes"] == found["source_bytes"] + words
    dense = load_file(directory / "model.safetensors")
    assert all(torch.equal(tensors[n], t) for n, t in dense.items() if n in tensors)


def test_a_budget_counts_the_bytes_of_the_target(ids, tmp_path):
    recipe = calr.Recipe(bits=10.0, target="compressed-tensors", correction_tokens=0, **OPTIONS)
    model = compressed(tmp_path / "made", recipe, ids, torch.bfloat16, num_hidden_layers=4)
    found = export_compressed_tensors(str(tmp_path / "made"), tmp_path / "out")
    parameters = tiny_llama(**SHAPE, num_hidden_layers=4).num_parameters()
    assert found["source_bytes"] <= 10 * parameters / 8
    by_input = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            kind = name.rpartition(".")[2]
            block = name.rpartition(".")[0]
            fused = kind if kind in ("o_proj", "down_proj") else block
            by_input.setdefault((block, fused), set()).add((layer.form.bits, layer.form.levels))
    assert all(len(widths) == 1 for widths in by_input.values())
    assert type(model.get_input_embeddings()).__name__ == "Embedding"


@pytest.mark.parametrize("rank", [0, 4])
def test_a_lora_merged_into_it_is_exported_padded(rank, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(quantising, "least_loss", mixed)
    model = compressed(tmp_path / "made", TRAINED, ids)
    if rank:
        layer = model.get_submodule(NAME)
        layer.append(torch.randn(rank, 128), torch.randn(128, rank) / 100)
        model.config.quantization_config.layers[NAME] = layer.form.to_dict()
        model.save_pretrained(tmp_path / "made")
    found = export_compressed_tensors(str(tmp_path / "made"), tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(found["directory"])
    base.hf_quantizer.compressor.decompress_model(base)
    merged = PeftModel.from_pretrained(base, found["adapter"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_what_the_format_lacks_is_refused_by_name(source, ids, tmp_path, capsys):
    six = calr.Recipe(bits=7.0, correction_tokens=0, **OPTIONS)
    low = calr.Recipe(keep=0.6, rank_step=2, correction_tokens=0, **OPTIONS)
    compressed(tmp_path / "six", six, ids)
    compressed(tmp_path / "low", low, ids)
    for made, message in (
        (tmp_path / "six", "compress with --target compressed-tensors"),
        (tmp_path / "low", "is of low rank"),
        (source, "is no checkpoint written by calr"),
    ):
        out = tmp_path / "out"
        assert main(["export", str(made), str(out), "--to", "compressed-tensors"]) == 1
        said = capsys.readouterr().err
        assert message in said, said
        assert "Traceback" not in said
        assert not out.exists()


def test_a_scale_that_bfloat16_lacks_is_refused(ids, tmp_path, monkeypatch):
    monkeypatch.setattr(quantising, "least_loss", mixed)
    model = compressed(tmp_path / "made", TRAINED, ids)
    layer = model.get_submodule(NAME)
    with torch.no_grad():
        scale = torch.tensor([1 + 2**-10]).half().view(torch.uint8)
        layer.weight[0, 0, :2] = scale
    model.save_pretrained(tmp_path / "made")
    with pytest.raises(CalrError, match=rf"{NAME}.*no number of bfloat16"):
        export_compressed_tensors(str(tmp_path / "made"), tmp_path / "out")


@pytest.mark.parametrize("at", ["_save", "_check"])
def test_an_interrupted_export_leaves_nothing_that_loads(at, ids, tmp_path, monkeypatch, made):
    whole = getattr(exporting, at)

    def interrupted(*arguments):
        whole(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exporting, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_compressed_tensors(str(made[1]), tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()
    assert not (tmp_path / "out/adapter").exists()
    export_compressed_tensors(str(made[1]), tmp_path / "out")  # continues
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()


def test_its_card_says_how_to_load_both(made, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(made[1]), str(out), "--to", "compressed-tensors", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["adapter"] == str(out / "adapter")
    card = (out / "README.md").read_text()
    assert 'PeftModel.from_pretrained(model, "adapter")' in card
    assert "import calr" not in card
    with pytest.raises(CalrError, match="exists"):
        export_compressed_tensors(str(made[1]), out)
