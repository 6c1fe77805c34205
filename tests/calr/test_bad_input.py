"""What people type and what files hold: one sentence and exit code 1, never a traceback."""

import json
import shlex

import pytest
import torch
from transformers import LlamaForSequenceClassification

import calr
from calr.cli import main
from calr.errors import CalrError
from calr.storage import checkpoint
from calr.testing import byte_tokenizer, tiny_llama

SMALL = [
    *(
        "--keep",
        "0.8",
        "--rank_step",
        "2",
        "--samples",
        "4",
        "--gradient_samples",
        "2",
        "--window",
        "32",
    ),
    *("--correction_tokens", "0", "--calibration", "builtin", "--eval_windows", "0"),
]


@pytest.fixture
def model(tmp_path):
    """A function that writes a tiny model, its tokenizer and changed JSON files."""

    def make(tokenizer=None, **changes):
        directory = tmp_path / "model"
        tiny_llama().save_pretrained(directory)
        (tokenizer or byte_tokenizer()).save_pretrained(directory)
        for name, change in changes.items():
            path = directory / f"{name}.json"
            value = json.loads(path.read_text())
            change(value)
            path.write_text(json.dumps(value))
        return directory

    return make


def larger():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["the ", " and ", "hello"])
    return tokenizer


def chatting(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def refused(capsys, arguments, said):
    assert main([str(argument) for argument in arguments]) == 1
    found = capsys.readouterr().err
    assert said in found
    assert "Traceback" not in found


def test_a_tokenizer_of_another_kind(model, capsys):
    directory = model()
    path = directory / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["type"] = "NewBPE"
    path.write_text(json.dumps(value))
    refused(capsys, ["eval", directory], "cannot be loaded")


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "MODEL", "--window", 32],
        ["compress", "MODEL", "OUT", *SMALL],
        ["generate", "MODEL", "--prompt", "hello"],
    ],
    ids=["eval", "compress", "generate"],
)
def test_a_tokenizer_larger_than_the_embeddings(arguments, model, tmp_path, capsys):
    places = {"MODEL": model(larger()), "OUT": tmp_path / "out"}
    refused(capsys, [places.get(a, a) for a in arguments], "outside the model's vocabulary of 258")


def test_a_chat_template_that_raises(model, capsys):
    directory = model(chatting("{{ raise_exception('needs a system message') }}"))
    refused(capsys, ["generate", directory, "--chat"], "needs a system message")


def test_a_prompt_that_is_not_utf_8(model, capsys):
    refused(capsys, ["generate", model(), "--prompt", "\udcff"], "prompt: is not UTF-8 text")


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_config": lambda v: v.update(model_input_names=["input_ids", "token_type_ids"])},
        {"generation_config": lambda v: v.update(stop_strings=["the"])},
        {"generation_config": lambda v: v.update(return_dict_in_generate=True)},
    ],
    ids=["token_type_ids", "stop_strings", "return_dict"],
)
def test_what_a_model_asks_of_generation_is_given(change, model, capsys):
    arguments = ["generate", model(**change), "--max_new_tokens", 4, "--json"]
    assert main([str(a) for a in arguments]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] <= 4


def test_what_generation_cannot_give_is_said(model, capsys):
    directory = model(generation_config=lambda v: v.update(penalty_alpha=0.6, top_k=4))
    refused(capsys, ["generate", directory], "cannot generate as its generation_config.json asks")


def test_float64_and_lists_as_they_are_typed(model, tmp_path, capsys):
    arguments = ["compress", model(), tmp_path / "out", *SMALL, "--dtype", "float64", "--json"]
    assert main([*map(str, arguments), "--skip", "*.0.*,*.v_proj", "--keep", "0.8"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--json", "--verify"]) == 0
    found = json.loads(capsys.readouterr().out)
    factored = {row["name"] for row in found["layers"] if row["rank"]}
    assert factored
    assert not [name for name in factored if ".0." in name or "v_proj" in name]
    assert found["totals"]["verified_files"] > 4


@pytest.mark.parametrize("seed", [10**20, 2**63, -1])
def test_seeds_that_torch_cannot_take(seed, model, tmp_path, capsys):
    refused(capsys, ["compress", model(), tmp_path / "out", f"--seed={seed}"], "seed=")


def test_overflowing_float16_says_what_to_do(tmp_path, capsys):
    model = tiny_llama().half()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(6e4)
        model.model.layers[0].mlp.gate_proj.weight.mul_(6e4)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["compress", tmp_path / "model", tmp_path / "out", *SMALL]
    refused(capsys, arguments, "overflow float16: use --dtype bfloat16 or float32")


@pytest.mark.parametrize("name", ["out[/b]", "out\nnew line", "out\x1b[31mred"])
def test_names_are_data_and_no_markup(name, model, tmp_path, capsys):
    directory = tmp_path / name
    assert main(["compress", str(model()), str(directory), *SMALL]) == 0
    assert main(["inspect", str(directory)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert (directory / "config.json").exists()


def test_a_model_named_by_a_dot_gives_its_card_a_title(model, tmp_path, monkeypatch):
    monkeypatch.chdir(model())
    assert main(["compress", ".", str(tmp_path / "out"), *SMALL]) == 0
    assert "# model, compressed" in (tmp_path / "out" / "README.md").read_text()


def test_a_directory_that_was_there_stays_when_a_run_fails(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir(mode=0o750)

    def denied(*arguments):
        raise PermissionError(13, "Permission denied", str(out / ".calr"))

    source = model()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_ledger", denied)
        refused(capsys, ["compress", source, out, *SMALL], "Permission denied")
        refused(capsys, ["compress", source, tmp_path / "new", *SMALL], "Permission denied")
    assert out.stat().st_mode & 0o777 == 0o750
    assert not (tmp_path / "new").exists()


def test_what_to_type_next_can_be_typed(model, tmp_path, capsys):
    out = tmp_path / "a name"
    assert main(["compress", str(model()), str(out), *SMALL]) == 0
    following = capsys.readouterr().out.split("next: ")[1]
    assert shlex.split(following)[:3] == ["calr", "generate", str(out)]


def test_a_configuration_that_is_no_text(model, capsys):
    source = model()
    with pytest.raises(SystemExit) as found:
        main(["compress", str(source), "out", "--config", str(source / "model.safetensors")])
    assert found.value.code == 2
    assert "--config: is no text" in capsys.readouterr().err


def test_directories_without_a_model_or_a_tokenizer(model, tmp_path, capsys):
    refused(capsys, ["eval", tmp_path], "holds no model (no config.json, no GGUF file)")
    source = model()
    for file in source.glob("tokenizer*"):
        file.unlink()
    refused(capsys, ["eval", source], "its tokenizer cannot be loaded; save_pretrained writes one")


def test_a_model_that_is_no_language_model():
    config = tiny_llama().config
    with pytest.raises(CalrError, match="LlamaForSequenceClassification: cannot generate text"):
        calr.compress(LlamaForSequenceClassification(config), calr.Recipe(bits=5))
