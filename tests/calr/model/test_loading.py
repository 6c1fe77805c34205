"""Loading: every tensor has a value from the files, or the model is refused by name."""

import json
import shutil

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import calr
from calr.cli import main
from calr.errors import CalrError
from calr.model import absent, load
from calr.testing import byte_tokenizer, tiny_llama

RECIPE = {"keep": 0.7, "rank_step": 2, "correction_tokens": 0}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


@pytest.fixture
def dense(tmp_path):
    """A dense checkpoint whose lm_head is a tensor of its own."""
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


DAMAGE = {
    "head": (lambda t: t.pop("lm_head.weight"), "lm_head.weight: missing"),
    "layer": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight: missing"),
    "prefix": (
        lambda t: [t.update({f"module.{name}": t.pop(name)}) for name in list(t)],
        r"lm_head.weight \(and \d+ others\): missing",
    ),
    "shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(7)}),
        r"(?s)mismatch|model.norm.weight.*another shape",
    ),
    "more layers": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(80, 32)}),
        "model.layers.2.mlp.up_proj.weight: in the checkpoint's files, but",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_tensor_without_a_value_is_named(what, dense):
    damage, message = DAMAGE[what]
    tensors = load_file(dense / "model.safetensors")
    damage(tensors)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalrError, match=message):
        load(str(dense))


def test_what_may_be_missing_by_the_models_own_rules_is_fine(tmp_path):
    tiny_llama().save_pretrained(tmp_path)  # a tied head is not stored
    byte_tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load(str(tmp_path))


@pytest.mark.parametrize("command", ["generate", "inspect", "plan"])
def test_a_count_of_layers_that_no_model_has_is_refused(command, dense, ids, capsys):
    """It would be built until memory runs out."""
    made = dense / "made"
    calr.compress_to(str(dense), made, calr.Recipe(**RECIPE, samples=4, window=16), eval_windows=0)
    for directory in (dense,) if command == "plan" else (dense, made):
        if command == "inspect" and directory == dense:
            continue
        config = json.loads((directory / "config.json").read_text())
        for count in (10**20, 10_001):
            config["num_hidden_layers"] = count
            (directory / "config.json").write_text(json.dumps(config))
            assert main([command, str(directory)]) == 1
            assert f"num_hidden_layers={count}: no model has so many" in capsys.readouterr().err


def test_an_adapter_is_no_model(dense):
    (dense / "adapter_config.json").write_text("{}")
    with pytest.raises(CalrError, match=r"is a PEFT adapter .* merge it"):
        load(str(dense))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lazily", [True, False])
def test_a_gguf_model_in_parts_is_the_one_in_a_file(lazily, tied, write_gguf, tmp_path, ids):
    model = tiny_llama(vocab_size=260, tie_word_embeddings=tied)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    (tmp_path / "parts").mkdir()
    (tmp_path / "other").mkdir()
    write_gguf(tmp_path / "other" / "x.gguf", model, gguf.MODEL_ARCH.LLAMA)
    write_gguf(tmp_path / "parts" / "x.gguf", model, gguf.MODEL_ARCH.LLAMA, per_part=9)
    files = sorted((tmp_path / "parts").iterdir())
    assert [file.name for file in files] == [f"x-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole, tokenizer = load(str(tmp_path / "other"), dtype="float32")
    for source in (files[1], tmp_path / "parts"):
        found, its_tokenizer = load(str(source), dtype="float32", lazily=lazily)
        assert absent(found) == lazily
        with torch.no_grad():
            assert torch.equal(found(ids).logits, whole(ids).logits)
        assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
        assert calr.plan(str(source)).totals["source_bytes"] == sum(f.stat().st_size for f in files)
    assert all(p.requires_grad for p in found.parameters()) or lazily


@pytest.mark.parametrize("named", [True, False])
def test_a_missing_part_of_a_gguf_model_is_named(named, tmp_path):
    part = tmp_path / "model-00001-of-00002.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(CalrError, match=r"model-00002-of-00002\.gguf: is missing, one of the 2"):
        load(str(part if named else tmp_path))


def test_parts_that_only_transformers_could_read_are_refused(tmp_path, write_gguf):
    config = transformers.AutoConfig.for_model("qwen2", **SMALL, head_dim=8, rms_norm_eps=1e-6)
    model = AutoModelForCausalLM.from_config(config)
    write_gguf(tmp_path / "x.gguf", model, gguf.MODEL_ARCH.QWEN2, per_part=9)
    with pytest.raises(CalrError, match=r"in 3 parts, of an architecture .* merge them"):
        load(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + bytes(12)])
def test_a_damaged_gguf_file_is_one_sentence(content, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(content)
    with pytest.raises(CalrError, match=r"cut\.gguf: cannot be loaded"):
        load(str(tmp_path / "cut.gguf"))


def test_a_model_of_another_kind_is_refused_without_a_list_of_all_kinds(tmp_path):
    transformers.T5Config().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CalrError, match="T5Config") as caught:
        load(str(tmp_path))
    assert len(str(caught.value)) < 500


def test_families_whose_names_on_disk_are_others_come_back(tmp_path, ids):
    """GPT-NeoX: transformers renames its head when it saves."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(**SMALL)).eval()
    calr.compress(model, calr.Recipe(**RECIPE), calibration=ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits
    )


def test_the_text_model_of_a_multimodal_checkpoint_comes_back(tmp_path, ids):
    """Qwen 3.5 as released: what is saved has the checkpoint's prefixes."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = SMALL | {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "rope_parameters": rope | {"partial_rotary_factor": 1.0},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = transformers.Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        **{name: 290 + i for i, name in enumerate(tokens)},
    )
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    found = calr.compress_to(
        str(tmp_path / "dense"),
        tmp_path / "out",
        calr.Recipe(samples=4, gradient_samples=2, window=32, **RECIPE),
        calibration="builtin",
        eval_windows=0,
    )
    assert found["factored_layers"] > 0
    assert load(str(tmp_path / "out"))[0](ids).logits.isfinite().all()


def test_what_cannot_be_read_back_is_not_moved_into_place(source, tmp_path, monkeypatch):
    """A save that loses a tensor's last bit: named, and the directory stays empty."""
    from transformers import LlamaForCausalLM

    save = LlamaForCausalLM.save_pretrained

    def lossy(self, directory, **options):
        save(self, directory, **options)
        tensors = load_file(directory / "model.safetensors")
        tensors["model.norm.weight"][3] += 1e-6
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lossy)
    options = {"calibration": "builtin", "eval_windows": 0}
    recipe = calr.Recipe(samples=4, gradient_samples=2, window=32, **RECIPE)
    with pytest.raises(CalrError, match=r"model.norm.weight: is another one when .* loaded again"):
        calr.compress_to(str(source), tmp_path / "out", recipe, **options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".calr"]
    monkeypatch.undo()
    assert calr.compress_to(str(source), tmp_path / "out", recipe, **options)["bytes"] > 0
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("budget", [{"bits": 8.0}, {"keep": 0.7}], ids=str)
def test_what_a_gguf_file_holds_is_stored_in_bfloat16(budget, gguf_file, tmp_path):
    """And computed in float32: the result is that of a float32 model, rounded."""
    assert load(str(gguf_file))[0].dtype == torch.bfloat16
    options = {"samples": 4, "gradient_samples": 2, "window": 32, "correction_tokens": 0}
    recipe = calr.Recipe(**options, **budget)
    found = calr.compress_to(
        str(gguf_file), tmp_path / "out", recipe, calibration="builtin", eval_windows=2
    )
    assert found["source_bytes"] == gguf_file.stat().st_size
    assert found["kl_from_dense"] >= 0
    made, _ = load(str(tmp_path / "out"))
    assert made.dtype == torch.bfloat16
    wide, tokenizer = load(str(gguf_file), dtype="float32")
    calr.compress(wide, recipe, calibration="builtin", tokenizer=tokenizer)
    assert made.model.rotary_emb.inv_freq.dtype == torch.float32
    if "keep" in budget:  # under one of bytes other forms fit: what stays dense is smaller
        for name, tensor in made.state_dict().items():
            assert torch.equal(tensor, wide.state_dict()[name].to(tensor.dtype)), name
    planned = calr.plan(str(gguf_file), recipe)
    assert planned.totals["source_bytes"] == gguf_file.stat().st_size
    assert abs(planned.totals["tensor_bytes"] - found["tensor_bytes"]) < 4_000


def test_a_dtype_that_is_named_is_the_results(gguf_file, tmp_path):
    recipe = calr.Recipe(samples=4, gradient_samples=2, window=32, **(RECIPE | {"keep": 0.7}))
    options = {"calibration": "builtin", "eval_windows": 0, "dtype": "float32"}
    calr.compress_to(str(gguf_file), tmp_path / "out", recipe, **options)
    assert load(str(tmp_path / "out"))[0].dtype == torch.float32
