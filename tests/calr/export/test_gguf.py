"""Exports: the same function, the same integers and scales, read by programs without calr."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import calr
from calr import quantising
from calr.cli import main
from calr.errors import CalrError
from calr.export import export_dense, export_gguf
from calr.export import gguf as exporting
from calr.rounding import round_matrix
from calr.testing import tiny_llama
from calr_kernels import Form, QuantizedLinear, records

OPTIONS = {"correction_tokens": 0, "samples": 8, "gradient_samples": 4, "window": 32}
TARGET = calr.Recipe(bits=10.5, target="gguf", **OPTIONS)
NAME = "model.layers.0.self_attn.q_proj"


def forced(bits, rank=0):
    """Choose the same width for every matrix, with a corrective path where one may be."""

    def choose(budget, prices, **options):
        found = {}
        for matrix, forms in zip(budget.matrices, budget.choices(), strict=True):
            fit = [f for (f,) in forms if f and f.bits == bits and f.corrective_rank <= rank]
            found[matrix.name] = max(fit, key=lambda form: form.corrective_rank, default=None)
        return found

    return choose


def compressed(gguf_file, directory, recipe, ids, monkeypatch, choose=None):
    """Compress the tiny GGUF model, save it and return it."""
    model, tokenizer = calr.load(str(gguf_file), dtype="float32")
    if choose is not None:
        monkeypatch.setattr(quantising, "least_loss", choose)
    model = calr.compress(model, recipe, calibration=ids)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


@pytest.mark.parametrize("bits", [4, 5, 8, None], ids=["IQ4_NL", "Q5_0", "Q8_0", "chosen"])
def test_llama_cpp_would_read_the_same_weights(bits, gguf_file, ids, tmp_path, monkeypatch):
    choose = None if bits is None else forced(bits)
    model = compressed(gguf_file, tmp_path / "made", TARGET, ids, monkeypatch, choose)
    found = export_gguf(str(tmp_path / "made"), tmp_path / "out.gguf", like=gguf_file)
    assert found["bytes"] == (tmp_path / "out.gguf").stat().st_size > found["tensor_bytes"]
    assert "adapter" not in found
    again, _ = calr.load(found["file"], dtype="float32")
    dense = model.dequantize().state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, dense[name]), name
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(found["file"]).tensors} - {"F32"}
    one = {4: {"IQ4_NL"}, 5: {"Q5_0"}, 8: {"Q8_0"}}
    assert kinds <= {"IQ4_NL", "Q5_0", "Q8_0"} if bits is None else kinds == one[bits]


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "IQ4_NL"])
def test_a_gguf_tensor_of_a_form_of_ours_comes_back_bit_for_bit(kind):
    """With statistics and without: a matrix on the grid costs nothing."""
    draw = torch.Generator().manual_seed(0)
    if kind == "IQ4_NL":  # the gguf package only reads it: blocks of any of the outer levels
        form = Form(4, "table", 32)
        codes = torch.randint(2, 14, (24, 96), generator=draw).to(torch.uint8)
        codes[:8, ::32], codes[8:16, ::32], codes[16:, ::32] = 0, 15, 1
        scales = torch.randn(24, 3, generator=draw) / 100
        weight = records.dequantize(records.pack(codes, scales, form), form, 96, torch.float32)
    else:
        form = Form({"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}[kind], "uniform", 32)
        number = gguf.GGMLQuantizationType[kind]
        blocks = gguf.quantize(torch.randn(24, 96, generator=draw).numpy(), number)
        weight = torch.from_numpy(gguf.dequantize(blocks, number))
    x = torch.randn(300, 96, generator=draw) @ torch.randn(96, 96, generator=draw)
    for moment in (None, x.mT @ x):
        rounded = round_matrix(weight, form, moment)
        assert torch.equal(rounded.weight(), weight)
        data, found = exporting._blocks("x", rounded.records, form, 96)
        assert found.name == kind
        assert kind == "IQ4_NL" or np.array_equal(data, blocks.reshape(data.shape))


def test_a_group_of_64_is_two_of_32_with_one_scale():
    draw = torch.Generator().manual_seed(0)
    form = Form(4, "table", 64)
    codes = torch.randint(16, (5, 128), generator=draw).to(torch.uint8)
    packed = records.pack(codes, torch.randn(5, 2, generator=draw) / 100, form)
    data, kind = exporting._blocks("x", packed, form, 128)
    assert kind.name == "IQ4_NL"
    wanted = records.dequantize(packed, form, 128, torch.float32).numpy()
    assert np.array_equal(gguf.dequantize(data, kind), wanted)
    with pytest.raises(CalrError, match=r"x: has 6 bits .* compress with --target gguf"):
        exporting._blocks("x", packed, Form(6, "formula", 32), 128)


def test_corrective_paths_are_an_adapter(gguf_file, ids, tmp_path, monkeypatch):
    choose = forced(4, rank=8)
    model = compressed(gguf_file, tmp_path / "made", TARGET, ids, monkeypatch, choose)
    found = export_gguf(str(tmp_path / "made"), tmp_path / "out.gguf", like=gguf_file)
    reader = gguf.GGUFReader(found["adapter"])
    said = {key: reader.fields[key].contents() for key in reader.fields if "." in key}
    assert said["general.type"] == "adapter"
    assert (said["adapter.type"], said["adapter.lora.alpha"]) == ("lora", 0)
    tensors = {t.name: np.array(t.data, dtype=np.float64) for t in reader.tensors}
    paths = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m.corrective]
    assert len(tensors) == 2 * len(paths) > 0
    pair = [tensors[f"blk.0.attn_q.weight.lora_{x}"] for x in "ab"]
    assert pair[0].shape[0] == pair[1].shape[1] == 8
    down, up = model.get_submodule(NAME).corrective.factors(torch.float64)
    rows = exporting._order(model, "llama", f"{NAME}.weight")
    wanted = (up @ down).detach().numpy()[rows]
    np.testing.assert_allclose(pair[1] @ pair[0], wanted, atol=2e-3 * np.abs(wanted).max())


def test_what_gguf_lacks_is_refused_by_name(gguf_file, source, ids, tmp_path, monkeypatch, capsys):
    made, out = tmp_path / "made", tmp_path / "out.gguf"
    recipe = calr.Recipe(bits=6.5, **OPTIONS)
    compressed(gguf_file, made, recipe, ids, monkeypatch, forced(6))
    other = tmp_path / "text.gguf"
    other.write_text("no GGUF")
    (tmp_path / "there.gguf").write_text("mine")
    for arguments, message in (
        ([made, out, "--to", "gguf", "--like", gguf_file], "has 6 bits (formula levels)"),
        ([made, out, "--to", "gguf"], "like: name a GGUF file of the dense model"),
        ([made, out, "--to", "gguf", "--like", other], "cannot be read as a GGUF file"),
        ([source, out, "--to", "gguf", "--like", gguf_file], "is no checkpoint written by calr"),
        ([made, tmp_path / "there.gguf", "--to", "gguf", "--like", gguf_file], "exists"),
        ([source, tmp_path / "d", "--to", "dense"], "is no checkpoint written by calr"),
    ):
        assert main(["export", *map(str, arguments)]) == 1
        said = capsys.readouterr().err
        assert message in said, said
        assert "Traceback" not in said
    assert not out.exists()
    assert (tmp_path / "there.gguf").read_text() == "mine"


def test_neither_the_dense_model_nor_another_kind_of_file_is_replaced(
    gguf_file, ids, tmp_path, monkeypatch
):
    made, out = tmp_path / "made", tmp_path / "out.gguf"
    compressed(gguf_file, made, TARGET, ids, monkeypatch, forced(4))
    before = gguf_file.read_bytes()
    with pytest.raises(CalrError, match="is the dense model itself"):
        export_gguf(str(made), gguf_file, like=gguf_file.parent, overwrite=True)
    assert gguf_file.read_bytes() == before
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CalrError, match=r"mine\.txt: is no GGUF file"):
        export_gguf(str(made), tmp_path / "mine.txt", like=gguf_file, overwrite=True)
    export_gguf(str(made), out, like=gguf_file)
    old = out.with_name("out-adapter.gguf")
    old.write_bytes(gguf_file.read_bytes())
    export_gguf(str(made), out, like=gguf_file, overwrite=True)
    assert not old.exists(), "an adapter of the file that was there before"


def test_its_size_is_that_of_the_file_whatever_the_dtype(gguf_file, tmp_path):
    recipe = calr.Recipe(bits=8, correction_tokens=0, samples=4, gradient_samples=2, window=16)
    options = {"dtype": "float32", "calibration": "builtin"}
    found = calr.compress_to(gguf_file, tmp_path / "out", recipe, eval_windows=0, **options)
    planned = calr.plan(str(gguf_file), recipe, **options)
    assert found["source_bytes"] == planned.totals["source_bytes"] == gguf_file.stat().st_size


def test_another_models_file_is_no_template(gguf_file, ids, tmp_path):
    model = calr.compress(tiny_llama(num_hidden_layers=3), TARGET, calibration=ids)
    model.save_pretrained(tmp_path / "made")
    calr.testing.byte_tokenizer().save_pretrained(tmp_path / "made")
    with pytest.raises(CalrError, match="like: is a GGUF file of another model"):
        export_gguf(str(tmp_path / "made"), tmp_path / "out.gguf", like=gguf_file)


@pytest.mark.parametrize("at", ["_write_model", "_check", "_write_adapter"])
def test_an_interrupted_export_leaves_nothing_half_written(
    at, gguf_file, ids, tmp_path, monkeypatch
):
    compressed(gguf_file, tmp_path / "made", TARGET, ids, monkeypatch, forced(4, rank=8))
    whole = getattr(exporting, at)

    def interrupted(*arguments):
        whole(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(str(tmp_path / "made"), tmp_path / "out" / "x.gguf", like=gguf_file)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == set()


def test_a_dense_export_needs_no_calr(gguf_file, ids, tmp_path, capsys, monkeypatch):
    model = compressed(gguf_file, tmp_path / "made", TARGET, ids, monkeypatch)
    out = tmp_path / "dense"
    assert main(["export", str(tmp_path / "made"), str(out), "--to", "dense", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensor_bytes"] > found["source_bytes"]
    code = (
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "Linear", result.stderr
    card = (out / "README.md").read_text()
    assert "import calr" not in card
    assert "bits: 10.5" in card
    again = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    with pytest.raises(CalrError, match="exists"):
        export_dense(str(tmp_path / "made"), out)


def test_a_gguf_file_without_an_architecture_is_no_template(tmp_path):
    bare = tmp_path / "bare.gguf"
    writer = gguf.GGUFWriter(bare, "llama")
    writer.kv_data[0].clear()
    writer.add_string("general.name", "x")
    exporting.finish(writer)
    with pytest.raises(CalrError, match="does not say of what architecture"):
        exporting._template(bare)
