"""Several processes at one compression, as torchrun starts them."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import calr
from calr import parallel
from calr.errors import CalrError
from calr.model import load
from calr.testing import byte_tokenizer, tiny_llama, tiny_mixtral

BITS = ["--bits", "6", "--correction_tokens", "256", "--step_tokens", "96"]
KEEP = ["--keep", "0.6", "--rank_step", "2", "--correction_tokens", "0"]
SMALL = ["--samples", "7", "--gradient_samples", "5", "--window", "32", "--eval_windows", "2"]
TEXT = ["--calibration", "builtin"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("parallel") / "model"
    tiny_llama(num_hidden_layers=3, tie_word_embeddings=False).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


def started(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "calr", "compress", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def compressed(processes, model, place, *options):
    run = started(processes, model, place, *options, *SMALL, *TEXT, "--json")
    out, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    return json.loads(out), load_file(place / "model.safetensors")


@pytest.mark.parametrize("options", [BITS, KEEP], ids=["bits", "keep"])
def test_the_result_is_one_processs_within_rounding_and_the_same_every_time(
    options, model, tmp_path, ids
):
    one, _ = compressed(1, model, tmp_path / "one", *options)
    two, tensors = compressed(2, model, tmp_path / "two", *options)
    _, again = compressed(2, model, tmp_path / "again", *options)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert one["tensor_bytes"] == two["tensor_bytes"]
    assert two["kl_from_dense"] == pytest.approx(one["kl_from_dense"], rel=0.02)
    logits = []
    for place in ("one", "two"):
        with torch.no_grad():
            logits.append(load(str(tmp_path / place))[0](ids).logits)
    assert (logits[0] - logits[1]).norm() < 0.05 * logits[0].norm()
    assert {"second moments", "gradients", "writing"} <= two["phases"].keys()


def test_experts_that_are_chosen_in_one_process_alone(tmp_path, ids):
    tiny_mixtral(num_local_experts=8).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    one, _ = compressed(1, tmp_path / "model", tmp_path / "one", *BITS)
    two, _ = compressed(3, tmp_path / "model", tmp_path / "two", *BITS)
    assert one["tensor_bytes"] == two["tensor_bytes"]
    assert two["kl_from_dense"] == pytest.approx(one["kl_from_dense"], rel=0.1)
    assert two["rarely_chosen_layers"] == one["rarely_chosen_layers"] > 0


def test_sampled_text_and_more_processes_than_batches(model, tmp_path):
    options = [*BITS, *SMALL, "--calibration", "sampled", "--json"]
    run = started(3, model, tmp_path / "out", *options)
    out, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert json.loads(out)["kl_from_dense"] < 1


def test_fewer_windows_than_processes_are_refused(model, tmp_path):
    options = [*KEEP, *TEXT, "--window", "32", "--samples", "1", "--gradient_samples", "1"]
    run = started(2, model, tmp_path / "out", *options)
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "samples=1: fewer windows than the 2 processes" in errors


def test_a_killed_process_ends_the_job_and_the_same_command_finishes_it(model, tmp_path):
    whole = compressed(2, model, tmp_path / "whole", *BITS)[1]
    run = started(2, model, tmp_path / "out", *BITS, *SMALL, *TEXT, "--json")
    rounded = tmp_path / "out" / ".calr" / "rounded"
    deadline = time.monotonic() + 200
    while not (rounded.exists() and any(rounded.iterdir())):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    run.communicate(timeout=100)
    assert run.returncode != 0
    assert not (tmp_path / "out" / "config.json").exists()
    _, again = compressed(2, model, tmp_path / "out", *BITS)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_the_network_says_of_a_dead_process_is_one_sentence():
    said = r"process 0: another process .*: \[x\] gloo: closed$"
    with pytest.raises(CalrError, match=said), parallel._one_sentence():
        raise RuntimeError("[x] gloo: closed. This is typically caused by a crash.")
    with pytest.raises(RuntimeError, match="of our own"), parallel._one_sentence():
        raise RuntimeError("of our own")


def test_work_is_shared_by_cost(monkeypatch):
    items, costs = list("abcdef"), [8, 1, 3, 3, 1, 2]
    monkeypatch.setattr(parallel, "_size", 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "_rank", rank)
        shares.append(parallel.share(items, costs))
    assert sorted(itertools.chain(*shares)) == items
    loads = [sum(costs[items.index(x)] for x in share) for share in shares]
    assert sorted(loads) == [5, 5, 8]


def test_alone_everything_is_ones_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # of somebody else's launcher
    assert parallel.mine([1, 2, 3]) == [1, 2, 3]
    assert parallel.share(["a"], [1]) == ["a"]
    assert parallel.gather({1: "x"}) == {1: "x"}
    assert parallel.agree(5) == 5
    assert parallel.place_of("cuda") == "cuda"
    with parallel.joined():
        assert parallel.first()
        assert parallel.size() == 1
    assert calr.Recipe().bits == 5
