"""Files are safe: checksums, one run at a time, nothing of somebody else's is removed."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given

import calr
from calr.errors import CalrError
from calr.model import saver
from calr.storage import Spilled, Store, claim, finished, locked, prepare, verify, write, writing
from calr.storage.manifest import MANIFEST, listed
from calr.testing import byte_tokenizer, tiny_llama

CARD = ModelCard("---\n{}\n---\n")
RECIPE = calr.Recipe(
    keep=0.6, rank_step=2, samples=6, gradient_samples=2, window=32, correction_tokens=0
)
OPTIONS = {"calibration": "builtin", "eval_windows": 0}


def compress(source, directory, **options):
    return calr.compress_to(str(source), directory, RECIPE, **(OPTIONS | options))


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("damage", ["zeroed", "cut", "empty", "foreign"])
def test_a_damaged_part_is_named_and_made_again(damage, tmp_path, caplog):
    from transformers.utils import logging

    Store(tmp_path).save("a", {"x": torch.ones(100)})
    path = tmp_path / "a.safetensors"
    data = path.read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(
        {
            "zeroed": data[:head] + bytes(len(data) - head),
            "cut": data[:50],
            "empty": b"",
            "foreign": (8).to_bytes(8, "little") + b"{}      ",
        }[damage]
    )
    store = Store(tmp_path)
    logging.enable_propagation()
    assert "a" not in store
    logging.disable_propagation()
    assert "a.safetensors: is damaged" in caplog.text
    store.save("a", {"x": torch.zeros(2)})
    assert torch.equal(Store(tmp_path).load("a")["x"], torch.zeros(2))


@pytest.mark.parametrize("name", ["curvature-0001", "inputs-0000", "errors-calr-gradient"])
def test_damaged_statistics_are_collected_again_to_the_same_bits(name, source, tmp_path):
    compress(source, tmp_path / "a", statistics=tmp_path / "s")
    path = tmp_path / "s" / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-20:] = bytes(20)
    path.write_bytes(data)
    compress(source, tmp_path / "b", statistics=tmp_path / "s")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_the_second_run_says_who_holds_the_directory(tmp_path):
    held = f"out: is in use by process {os.getpid()} on"
    with locked(tmp_path / "lock", "out"):
        for _ in range(2):  # the first still holds it
            with pytest.raises(CalrError, match=held), locked(tmp_path / "lock", "out"):
                pass
    with locked(tmp_path / "lock", "out"):
        pass
    assert not (tmp_path / "lock").exists()


def test_a_lock_dies_with_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from calr.storage import locked\n"
        "with locked(Path(sys.argv[1]), 'out'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "lock"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    held = f"process {holder.pid} on"
    with pytest.raises(CalrError, match=held), locked(tmp_path / "lock", "out"):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path / "lock", "out"):
        pass


def test_two_runs_into_one_directory(source, tmp_path):
    with writing(tmp_path / "out"), pytest.raises(CalrError, match="out: is in use by process"):
        compress(source, tmp_path / "out")
    assert compress(source, tmp_path / "out")["bytes"] > 0
    assert not (tmp_path / "out" / ".calr").exists()


def test_overwriting_removes_nothing_that_calr_did_not_write(source, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(source, mine)
    ours = {"notes.txt", "README.md", "vocab_research/paper.tex", "pytorch_model_old/run.log"}
    for name in ours:
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text("mine")
    dense = weights(mine)
    compress(source, mine, overwrite=True)
    kept = {name: (mine / name).read_text() for name in ours - {"README.md"}}
    assert set(kept.values()) == {"mine"}
    assert (mine / "README.md.before-calr").read_text() == "mine"
    assert (mine / "model.safetensors.before-calr").read_bytes() == dense
    first = weights(mine)
    compress(source, mine, overwrite=True)  # now the files are calr's: replaced, not kept
    assert weights(mine) == first
    assert (mine / "model.safetensors.before-calr").read_bytes() == dense
    assert not list(mine.glob("*.before-calr.before-calr"))


def test_what_was_changed_since_is_somebody_elses(source, tmp_path):
    out = tmp_path / "out"
    for round_ in range(2):
        compress(source, out, overwrite=True)
        (out / "README.md").write_text(f"my notes {round_}")
    compress(source, out, overwrite=True)
    assert (out / "README.md.before-calr").read_text() == "my notes 0"
    assert (out / "README.md.before-calr.1").read_text() == "my notes 1"
    assert verify(out) > 4


def test_foreign_files_that_would_be_loaded_are_set_aside(source, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(source, out)
    for name in ("chat_template.jinja", "model-00001-of-00002.safetensors", "calr.json"):
        (out / name).write_text("mine")
    found = compress(source, out, overwrite=True)
    for name in ("chat_template.jinja", "model-00001-of-00002.safetensors", "calr.json"):
        assert (out / f"{name}.before-calr").read_text() == "mine"
    assert not (out / "chat_template.jinja").exists()
    assert found["bytes"] == len(weights(out))


@pytest.mark.parametrize("left", ["nothing", "another run"])
def test_a_finished_checkpoint_is_replaced_only_when_asked(left, source, tmp_path):
    """Whatever lies in its work directory: one that is being cleaned up, or of another run."""
    out = tmp_path / "out"
    compress(source, out)
    before = weights(out)
    (out / ".calr").mkdir()
    if left == "another run":
        (out / ".calr" / "ledger.json").write_text('{"key": "k", "summary": {}}')
    other = calr.Recipe(**(vars(RECIPE) | {"keep": 0.5}))
    with pytest.raises(CalrError, match="exists; name another directory or pass --overwrite"):
        calr.compress_to(str(source), out, other, **OPTIONS)
    assert weights(out) == before


def test_the_lock_of_runs_that_were_killed_one_after_another_is_taken_over(tmp_path):
    path, kept = tmp_path / "lock", []
    for _ in range(3):
        with locked(path, "out"):
            kept.append(path.read_bytes())
        path.write_bytes(b"process 1 of another time on a machine with a longer name" + kept[-1])
    with locked(path, "out"):
        assert path.read_bytes() == kept[0], "whatever was there before"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": 1, "summary": {}}', "\0\0"])
def test_a_damaged_ledger_is_named(content, tmp_path):
    (tmp_path / "ledger.json").write_text(content)
    with pytest.raises(CalrError, match=r"ledger\.json: is damaged, or no ledger"):
        claim(tmp_path, "key", "is of another run")


def test_a_lock_file_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "lock").write_text("mine")
    with pytest.raises(CalrError, match="is no lock of calr's"), locked(tmp_path / "lock", "out"):
        pass
    assert (tmp_path / "lock").read_text() == "mine"


def test_links_are_not_followed(source, tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside"
    shutil.copytree(source, out)
    outside.mkdir()
    (outside / "precious").write_text("mine")
    (out / "tokenizer_cache").symlink_to(outside)
    (out / "chat_template.jinja").symlink_to(outside / "precious")
    compress(source, out, overwrite=True)
    assert (outside / "precious").read_text() == "mine"
    assert (out / "tokenizer_cache").is_symlink()
    shutil.copytree(source, tmp_path / "other")
    (tmp_path / "other" / ".calr").symlink_to(outside)
    with pytest.raises(CalrError, match=r"\.calr: is not calr's"):
        compress(source, tmp_path / "other", overwrite=True)


def test_a_model_inside_of_the_output_is_refused(source, tmp_path):
    inner = tmp_path / "tokenizer_models" / "m"
    shutil.copytree(source, inner)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CalrError, match=r"holds the model .*tokenizer_models"):
        compress(inner, tmp_path, overwrite=True)
    assert (inner / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_work_directory_of_somebody_else_is_not_touched(kind, source, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(source, out)
    if kind == "file":
        (out / ".calr").write_text("mine")
    else:
        (out / ".calr").mkdir()
        (out / ".calr" / "diary.txt").write_text("mine")
    with pytest.raises(CalrError, match=r"\.calr: is not calr's"):
        compress(source, out, overwrite=True)
    assert (out / ".calr").is_file() or (out / ".calr" / "diary.txt").read_text() == "mine"


def test_a_leftover_adapter_would_be_loaded_with_the_new_model(source, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(source, out)
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(CalrError, match="holds an adapter"):
        compress(source, out, overwrite=True)


@pytest.mark.parametrize("removed", [0, 1, 99])
def test_a_run_killed_while_it_cleaned_up_has_ended_well(removed, source, tmp_path, monkeypatch):
    """After it removed some of the parts, or all of them and the ledger, which goes last."""
    from calr.storage import checkpoint

    clear = checkpoint._clear

    def killed(work, but=("lock",)):
        if not (work / "ledger.json").exists():
            return clear(work, but)
        parts = [path for path in work.iterdir() if path.name not in ("ledger.json", "lock")]
        for path in parts[:removed]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if removed > len(parts):
            (work / "ledger.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_clear", killed)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(source, out)
    monkeypatch.undo()
    before = weights(out)
    (out / ".calr").mkdir(exist_ok=True)  # the lock's owner would have left it
    found = compress(source, out)
    assert found["keep"] <= 0.6
    assert weights(out) == before
    assert not (out / ".calr").exists()


def test_every_file_is_verified(source, tmp_path):
    out = tmp_path / "out"
    compress(source, out)
    assert verify(out) == len(listed(out)) > 4
    (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text() + " ")
    with pytest.raises(CalrError, match=r"tokenizer\.json: differs from what calr wrote"):
        verify(out)
    (out / "tokenizer.json").unlink()
    with pytest.raises(CalrError, match=r"tokenizer\.json: is missing"):
        verify(out)
    (out / MANIFEST).unlink()
    with pytest.raises(CalrError, match="has no manifest"):
        verify(out)


def test_a_manifest_names_no_file_elsewhere(tmp_path):
    (tmp_path / "precious").write_text("mine")
    out = tmp_path / "out"
    prepare(out, "k", {}, overwrite=False)
    write(saver(tiny_llama(), byte_tokenizer()), out, CARD, key="k")
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"] |= {"../precious": "", str(tmp_path / "precious"): ""}
    (out / MANIFEST).write_text(json.dumps(manifest))
    prepare(out, "k2", {}, overwrite=True)
    write(saver(tiny_llama(), byte_tokenizer()), out, CARD, key="k2")
    assert (tmp_path / "precious").read_text() == "mine"
    assert finished(out, "other") is None


def test_a_name_that_is_too_long_is_one_sentence(source, tmp_path):
    with pytest.raises(CalrError, match=r"nnn: cannot be written: .*too long"):
        compress(source, tmp_path / ("n" * 300))


def test_terminated_is_interrupted(source, tmp_path):
    arguments = ["compress", source, tmp_path / "out", "--calibration", "builtin"]
    arguments += ["--samples", 400, "--window", 128, "--correction_tokens", 0]
    command = [sys.executable, "-m", "calr", *map(str, arguments)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / ".calr" / "ledger.json").exists():
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    said = run.communicate()[1]
    assert run.returncode == 130
    assert "interrupted; the same command continues" in said
    assert "Traceback" not in said


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 400))
def test_spilled_tensors_are_read_as_they_were_put_last(sizes, limit):
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        spilled = Spilled(store, limit)
        for size in sizes:
            spilled.append(torch.zeros(size))
        for number in reversed(range(len(sizes))):
            spilled[number] = torch.full((sizes[number],), float(number))
            held = sum(t.nbytes for t in spilled._held if t is not None)
            assert held <= limit
        assert len(spilled) == len(sizes)
        for number, size in enumerate(sizes):
            assert torch.equal(spilled[number], torch.full((size,), float(number)))


def test_scratch_is_a_processs_own_and_goes_with_it(tmp_path):
    store = Store(tmp_path)
    alive = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    others = [tmp_path / f"hidden.{platform.node()}.{process.pid}" for process in (alive, dead)]
    for other in others:
        other.mkdir()
    with pytest.raises(ZeroDivisionError), store.scratch("hidden") as scratch:
        scratch.save("0", {"values": torch.zeros(2)})
        assert len(list(tmp_path.iterdir())) == 2
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == others[:1]
    alive.kill()
    alive.wait()
    (tmp_path / f"hidden.{platform.node()}.of-another").mkdir()
    with store.scratch("hidden"):
        pass
    assert len(list(tmp_path.iterdir())) == 1
    with Store().scratch("hidden") as scratch:
        scratch.save("0", {"values": torch.ones(2)})
        assert torch.equal(scratch.read("0", "values"), torch.ones(2))
