"""What a compression is estimated to take, and how it is made to take less."""

import dataclasses
import re

import pytest
import torch
from accelerate import init_empty_weights
from transformers import LlamaConfig, LlamaForCausalLM

import calr
from calr import estimates
from calr.errors import CalrError
from calr.estimates import Ways, Work
from calr.integrations.experts import take_apart
from calr.limits import ways_within
from calr.model import analyse
from calr.rounding import TOGETHER
from calr.testing import tiny_llama, tiny_mixtral
from calr.text import sampling


def work(model=None, sampled=True, device="cpu", **recipe):
    model = model or tiny_llama()
    made = calr.Recipe(**({"bits": 5} | recipe))
    where = torch.device(device)
    return Work.of(model, analyse(model), made, model.dtype, sampled, device=where)


def large(blocks):
    """Llama-3.2-3B's shapes, without numbers."""
    config = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=blocks,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=True,
    )
    with init_empty_weights():
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def test_phases_come_in_order():
    names = ["sampling text", "second moments", "gradients", "prices", "rounding"]
    assert list(work().phases(Ways())) == [*names, "dense outputs", "correction"]
    assert list(work(sampled=False, correction_tokens=0).phases(Ways())) == names[1:]
    plain = work(bits=None, keep=0.5, method="svd_llm", sensitivity="none", correction_tokens=0)
    assert list(plain.phases(Ways())) == [names[0], names[1], "factors"]


def test_what_is_read_block_by_block_does_not_grow_with_the_blocks():
    few, many = (work(large(blocks), False).phases(Ways(checkpointed=True)) for blocks in (4, 28))
    for name in ("second moments", "gradients", "prices", "rounding", "dense outputs"):
        assert many[name].peak_bytes == few[name].peak_bytes
        assert many[name].seconds > 2.5 * few[name].seconds
    assert many["correction"].peak_bytes > few["correction"].peak_bytes


def test_without_a_limit_only_large_activations_are_computed_twice():
    assert ways_within(work(), None) == Ways()
    assert ways_within(work(large(28), False), None).checkpointed
    assert not ways_within(work(large(28), False, correction_tokens=0), None).checkpointed


def test_a_gpu_holds_what_computes_and_the_process_the_rest():
    for made in ({}, {"bits": None, "keep": 0.5}):
        here = work(large(4), False, **made).phases(Ways())
        there = work(large(4), False, "cuda", **made).phases(Ways())
        for name, phase in here.items():
            more = TOGETHER if name in ("prices", "rounding") else 0
            assert phase.gpu_bytes == 0 < there[name].gpu_bytes < phase.peak_bytes + more
            assert there[name].peak_bytes < phase.peak_bytes
    read = 2 * 128_256 * 3072  # the embedding, which is its largest tensor
    passing = there["dense outputs"].peak_bytes - estimates.LIBRARY_BYTES
    assert passing == pytest.approx(read, rel=1e-4)
    assert read < there["dense outputs"].gpu_bytes
    many, few = (work(large(n), False, "cuda").phases(Ways())["rounding"] for n in (28, 4))
    assert many.peak_bytes == few.peak_bytes and many.gpu_bytes == few.gpu_bytes


def test_a_gpus_free_memory_says_whether_activations_are_computed_twice(monkeypatch):
    job = work(large(28), False, "cuda")
    needed = job.phases(Ways())["correction"].gpu_bytes
    assert ways_within(job, None).checkpointed  # as nothing is known of a GPU
    for free, twice in ((needed, True), (needed / 0.8, False)):
        assert ways_within(dataclasses.replace(job, free=free), None).checkpointed == twice
    assert ways_within(job, None, str(needed - 1)).checkpointed
    assert not ways_within(job, None, str(needed)).checkpointed
    with pytest.raises(CalrError, match=r"device_memory=1MB: correction takes about .* at least"):
        ways_within(job, None, "1MB")
    with pytest.raises(CalrError, match=r"max_memory=1MB: prices takes about .* at least"):
        ways_within(job, "1MB", "80GB")
    with pytest.raises(CalrError, match="device_memory=8GB: limits a GPU, but the CPU computes"):
        ways_within(work(), None, "8GB")
    monkeypatch.setattr(estimates, "TOGETHER", 0)
    sampling = work(window=4096, samples=2, correction_tokens=4096 * 40, device="cuda")
    least = sampling.phases(Ways(sampling.row, checkpointed=True))
    most = max(phase.gpu_bytes for phase in least.values())
    ways = ways_within(sampling, None, most)
    assert sampling.row < ways.cache_bytes < Ways().cache_bytes
    assert sampling.phases(ways)["sampling text"].gpu_bytes <= most


def test_weights_are_held_twice_where_a_limit_has_room_for_a_whole_batch_beside_them(monkeypatch):
    monkeypatch.setattr(sampling, "cpu_multiplies_bfloat16", lambda: False)  # no AMX: it takes 8
    job = dataclasses.replace(work(samples=40, correction_tokens=0), panels=10**10)
    assert job.phases(Ways())["sampling text"].peak_bytes > 10**10
    once = job.phases(Ways(job.row, natively=False))["sampling text"].peak_bytes
    least = once + 10**10 + 15 * job.row
    assert ways_within(job, least).natively and not ways_within(job, least - 1).natively
    assert 10**10 < job.phases(ways_within(job, least))["sampling text"].peak_bytes <= least
    assert job.phases(ways_within(job, least - 1))["sampling text"].peak_bytes < 10**10
    assert work(sampled=False).panels == 0
    mixture = tiny_mixtral()
    take_apart(mixture)
    assert work(mixture).panels == 0 < work().panels  # a form that is not written natively


def test_a_limit_makes_batches_smaller_and_activations_be_computed_twice(monkeypatch):
    monkeypatch.setattr(estimates, "LIBRARY_BYTES", 0)
    monkeypatch.setattr(estimates, "panel_bytes", lambda *_: 0)
    job = work(window=4096, samples=2, correction_tokens=4096 * 40)
    plain, row = job.phases(Ways()), job.row
    assert plain["sampling text"].peak_bytes > 32 * row
    most = plain["correction"].peak_bytes
    assert not ways_within(job, str(most)).checkpointed
    assert ways_within(job, most) == ways_within(job, str(most))  # a number, from Python
    limit = most - 1
    ways = ways_within(job, str(limit))
    assert ways.checkpointed
    assert row < ways.cache_bytes < Ways().cache_bytes
    taken = job.phases(ways)
    assert taken["sampling text"].peak_bytes <= limit
    assert taken["correction"].peak_bytes <= limit
    with pytest.raises(CalrError, match=r"max_memory=1KB: .* takes about .* GB at least"):
        ways_within(job, "1KB")
    with pytest.raises(CalrError, match=r"max_memory='much': must be like"):
        ways_within(job, "much")


def test_disk_counts_statistics_rotation_and_results():
    tied, untied = tiny_llama(), tiny_llama(tie_word_embeddings=False)
    rotated = 4 * analyse(untied).model_parameters
    assert work(untied).disk(0) - work(untied, rotate=False).disk(0) == rotated
    assert work(tied).disk(0) == work(tied, rotate=False).disk(0)
    assert work(tied).disk(1000) - work(tied).disk(0) == 3000


def test_disk_counts_what_a_training_keeps():
    """Values, two moments and the best state, the first three twice while they are written."""
    model = tiny_llama()
    trained = int(0.5 * analyse(model).linear_parameters)
    several = {"bits": None, "keep": 0.5, "correction_tokens": 1000}
    more = work(model, **several).disk(0) - work(model, **several | {"correction_tokens": 0}).disk(
        0
    )
    assert more == pytest.approx(28 * trained + 768 * 1000, abs=28)


def test_a_run_says_what_its_phases_took_beside_what_was_expected(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    from calr.testing import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path / "model")
    recipe = calr.Recipe(
        bits=6, samples=8, gradient_samples=2, window=32, correction_tokens=128, step_tokens=64
    )
    place = tmp_path / "out"
    found = calr.compress_to(str(tmp_path / "model"), place, recipe, max_memory="4GB")
    expected = calr.plan(str(tmp_path / "model"), recipe).phases
    assert found["phases"].keys() >= {"loading", "rotation", "comparison", "writing", *expected}
    for name, phase in found["phases"].items():
        assert phase["seconds"] >= 0
        assert phase["peak_bytes"] > 50e6
        assert ("expected_seconds" in phase) == (name in expected)
    assert not re.search("phases|peak", (place / "README.md").read_text())
    with pytest.raises(CalrError, match=r"max_memory=1MB: .* takes about"):
        calr.compress_to(str(tmp_path / "model"), tmp_path / "no", recipe, max_memory="1MB")
    assert not (tmp_path / "no").exists()
