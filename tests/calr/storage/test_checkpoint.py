"""Checkpoints: round trips, tampering, interruption, full disks."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import calr
from calr.errors import CalrError
from calr.model import saver
from calr.storage import model_card, prepare, write, writing
from calr.testing import byte_tokenizer, tiny_llama

LAYOUTS = ["pivoted", "two_factor"]
CARD = ModelCard("---\n{}\n---\n")


@pytest.fixture(scope="module", params=LAYOUTS)
def saved(request, tmp_path_factory, ids):
    """A compressed model, and the directory it was saved in."""
    model = calr.compress(
        tiny_llama(attention_bias=True),
        calr.Recipe(keep=0.6, layout=request.param, correction_tokens=0),
        calibration=ids,
    )
    directory = tmp_path_factory.mktemp("compressed")
    model.save_pretrained(directory)
    return model, directory


def command(*arguments):
    return [sys.executable, "-m", "calr", *map(str, arguments)]


def compress_arguments(source, target, *more):
    return [
        "compress", source, target, "--keep", 0.6, "--samples", 6, "--gradient_samples", 2,
        "--window", 32, "--correction_tokens", 2048, "--calibration", "builtin",
        "--eval_windows", 0, *more,
    ]  # fmt: skip


@pytest.mark.works(
    "`save_pretrained` → `from_pretrained` → `save_pretrained`",
    two_factor="byte-identical",
    pivoted="byte-identical",
)
def test_save_load_save_is_byte_identical_and_logits_are_equal(saved, tmp_path, ids):
    model, directory = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path)
    names = sorted(path.name for path in directory.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (directory / name).read_bytes() == (tmp_path / name).read_bytes()


def test_sharded_files_and_dtype(saved, tmp_path, ids):
    model, _ = saved
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits
    )
    assert loaded.half().dtype == torch.float16


def loaded_without_calr(directory):
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(directory)!r})"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_loading_without_calr_fails_loudly(saved):
    result = loaded_without_calr(saved[1])
    assert result.returncode != 0
    assert "mismatch" in result.stderr


def test_an_elastic_factor_is_never_taken_for_the_dense_weight(ids, tmp_path):
    """Where N >= K a second factor of full rank has the dense weight's shape."""
    recipe = calr.Recipe(keep=1, correction_tokens=0, skip=("*k_proj", "*v_proj", "*down_proj"))
    model = calr.compress(tiny_llama(), recipe, calibration=ids, elastic=True)
    assert all(
        layer.out_features >= layer.in_features
        for layer in map(model.get_submodule, model.config.quantization_config.layers)
    )
    model.save_pretrained(tmp_path)
    result = loaded_without_calr(tmp_path)
    assert result.returncode != 0
    assert "mismatch" in result.stderr
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits
    )


def edit_config(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NAME = "model.layers.0.mlp.up_proj"
TAMPERED = {
    "version": (edit_config, lambda c: c.update(format_version=9), "format_version 9.*upgrade"),
    "layers": (edit_config, lambda c: c.update(layers=[]), "layers must map"),
    "rank": (edit_config, lambda c: c["layers"][NAME].update(rank=3), f"{NAME}.*has shape"),
    "rank type": (edit_config, lambda c: c["layers"][NAME].update(rank="8"), "impossible rank"),
    "huge rank": (edit_config, lambda c: c["layers"][NAME].update(rank=999), "rank 999 of a"),
    "layout": (edit_config, lambda c: c["layers"][NAME].update(layout="x"), "unknown layout 'x'"),
    "fields": (edit_config, lambda c: c["layers"][NAME].pop("rank"), "exactly a layout and a rank"),
    "unlisted": (edit_config, lambda c: c["layers"].pop(NAME), "config.json needs"),
    "unknown layer": (
        edit_config,
        lambda c: c["layers"].update({"model.nothing": {"layout": "pivoted", "rank": 1}}),
        "model.nothing is no layer of this model",
    ),
    "missing": (
        edit_tensors,
        lambda t: t.pop(f"{NAME}.down.weight"),
        "missing from the checkpoint",
    ),
    "missing dense": (
        edit_tensors,
        lambda t: t.pop("model.layers.1.input_layernorm.weight"),
        "layers.1.input_layernorm.weight: missing from the checkpoint",
    ),
    "new field": (edit_config, lambda c: c.update(format_version=3, x=1), "format_version 3"),
    "recipe": (edit_config, lambda c: c.update(recipe=9), "the recipe is 9, must be an object"),
    "recipe field": (
        edit_config,
        lambda c: c["recipe"].update(samples="64"),
        "the recipe's samples='64': must be of type int",
    ),
    "integers": (
        edit_tensors,
        lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].int()}),
        f"{NAME}.weight: has type I32 in .*, must be one of F64",
    ),
    "nan": (
        edit_tensors,
        lambda t: t[f"{NAME}.weight"].view(-1)[3:4].fill_(float("nan")),
        f"{NAME}.weight: holds NaN or infinity",
    ),
    "unknown field": (edit_config, lambda c: c.update(x=1), "unknown field 'x'"),
    "extra": (
        edit_tensors,
        lambda t: t.update({f"{NAME}.more": torch.ones(1)}),
        "lists no layer that it belongs to",
    ),
    "shape": (
        edit_tensors,
        lambda t: t.update({f"{NAME}.weight": torch.ones(2, 2)}),
        r"has shape \[2, 2\] in .*model.safetensors",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_checkpoint_is_refused_by_name(what, saved, tmp_path):
    edit, change, message = TAMPERED[what]
    saved[0].save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(CalrError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [5000, -1, None])
def test_impossible_pivots_are_refused(value, saved, tmp_path):
    model, _ = saved
    name = next(iter(model.config.quantization_config.layers))
    if model.get_submodule(name).layout == "two_factor":
        pytest.skip("has no pivots")
    model.save_pretrained(tmp_path)

    def change(tensors):
        pivots = tensors[f"{name}.pivots"]
        pivots[0] = pivots[1] if value is None else value

    edit_tensors(tmp_path, change)
    with pytest.raises(CalrError, match=f"{name}.pivots: not ascending distinct rows"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 5000])
def test_a_truncated_file_is_refused_by_name(size, saved, tmp_path):
    saved[0].save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", size)
    with pytest.raises(CalrError, match=r"model.safetensors: damaged or truncated"):
        calr.load(str(tmp_path))


def test_a_directory_is_never_mixed(tmp_path):
    (tmp_path / "a").write_text("file")
    with pytest.raises(CalrError, match="is a file"):
        prepare(tmp_path / "a", "k", {}, overwrite=True)
    with pytest.raises(CalrError, match=r"exists; name another .* --overwrite"):
        prepare(tmp_path, "k", {}, overwrite=False)
    with pytest.raises(CalrError, match="holds no model"):
        prepare(tmp_path, "k", {}, overwrite=True)
    assert (tmp_path / "a").read_text() == "file"
    new = tmp_path / "new"
    parts = prepare(new, "k", {"keep": 0.6}, overwrite=False)
    parts.save("part", {"x": torch.ones(1)})
    assert "part" in prepare(new, "k", {}, overwrite=False)
    with pytest.raises(CalrError, match=r"unfinished run of something else \(\{'keep': 0.6\}"):
        prepare(new, "other", {}, overwrite=False)
    assert "part" not in prepare(new, "other", {}, overwrite=True)


def test_files_that_are_not_ours_survive(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.gguf").write_text("mine")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "old.jinja").write_text("old")
    prepare(tmp_path, "k", {}, overwrite=True)
    with pytest.raises(CalrError, match="--overwrite"):  # not a run of its own any more
        prepare(tmp_path, "k", {}, overwrite=False)
    write(saver(tiny_llama(), byte_tokenizer()), tmp_path, CARD)
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "model.gguf").read_text() == "mine"
    assert (tmp_path / "additional_chat_templates" / "old.jinja").read_text() == "old"


def test_a_torn_checkpoint_stays_ours_to_overwrite(tmp_path):
    prepare(tmp_path, "k", {}, overwrite=False)
    (tmp_path / ".calr" / "moving").touch()  # killed while files were moved up
    (tmp_path / "model.safetensors").write_text("half")
    for key in ("second", "third"):
        prepare(tmp_path, key, {}, overwrite=True)
    write(saver(tiny_llama(), byte_tokenizer()), tmp_path, CARD)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.hidden_size == 32


def test_overwriting_leaves_nothing_of_the_old_checkpoint(tmp_path):
    chatting = byte_tokenizer()
    chatting.chat_template = "{{ messages }}"
    prepare(tmp_path, "first", {}, overwrite=False)
    write(saver(tiny_llama(), chatting), tmp_path, CARD, key="first")
    assert (tmp_path / "chat_template.jinja").exists()
    prepare(tmp_path, "second", {}, overwrite=True)
    assert (tmp_path / "config.json").exists()  # the old one stays until the new one is whole
    write(saver(tiny_llama(), byte_tokenizer()), tmp_path, CARD, key="second")
    assert not (tmp_path / "chat_template.jinja").exists()
    assert not (tmp_path / ".calr").exists()
    assert not list(tmp_path.glob("*.before-calr"))
    assert AutoTokenizer.from_pretrained(tmp_path)("a").input_ids == [66]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.hidden_size == 32


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run(command(*compress_arguments(source, target)), check=True, capture_output=True)
    return target


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("stage", ["ledger.json", "calibration", "inputs-0000", "block-0000"])
def test_killed_and_started_again_gives_the_same_bits(
    stage, signal_number, source, uninterrupted, tmp_path
):
    target = tmp_path / "out"
    arguments = command(*compress_arguments(source, target))
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while process.poll() is None and not any(
        path.suffix != ".tmp"
        for path in target.rglob(f"{stage}*")  # still being written
    ):
        time.sleep(0.002)
    process.send_signal(signal_number)
    _, errors = process.communicate()
    if process.returncode != 0:
        assert not (target / "config.json").exists()
        assert (target / ".calr").exists()
        if signal_number == signal.SIGINT:
            assert b"the same command continues" in errors
        result = subprocess.run(arguments, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "continuing the unfinished run" in result.stderr
    assert not (target / ".calr").exists()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (target / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(source, uninterrupted, tmp_path):
    target = tmp_path / "out"
    limit = 30_000  # bytes per file: statistics fit, the checkpoint does not
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "from calr.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [str(a) for a in compress_arguments(source, target)]
    result = subprocess.run(
        [sys.executable, "-B", "-c", code, *arguments], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert f"calr: {target}: cannot be written" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (target / "config.json").exists()
    subprocess.run(command(*arguments), check=True, capture_output=True)
    assert (target / "model.safetensors").read_bytes() == (
        uninterrupted / "model.safetensors"
    ).read_bytes()


def test_no_space_is_called_a_full_disk(tmp_path):
    with (
        pytest.raises(CalrError, match=r"the disk is full; make room\. Nothing"),
        writing(tmp_path),
    ):
        raise OSError(28, "No space left on device")


def test_the_card_holds_recipe_and_numbers(tmp_path):
    results = {"source_bytes": 98_400_000, "tensor_bytes": 84e6, "perplexity_dense": 12.5}
    command = "calr compress {model} OUTPUT"
    card = model_card("org/model", "it is quantised", command, "keep: 0.6\n", results)
    card.save(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "org/model"
    assert "`calr compress org/model OUTPUT` with\n\n```yaml\nkeep: 0.6\n```" in text
    assert "| perplexity dense | 12.5 |" in text
    assert "`org/model`, 98.4 MB, to 84.0 MB: it is quantised." in text
    assert "import calr" in text.split("---")[2].strip().splitlines()[0]
