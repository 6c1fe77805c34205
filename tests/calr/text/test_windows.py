"""Windows of token ids: sources, seeds, BOS, errors."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from calr.errors import CalrError
from calr.model import load
from calr.testing import byte_tokenizer, tiny_llama
from calr.text import (
    calibration_windows,
    draw,
    evaluation_windows,
    hard_wrapped,
    read_text,
    sample_from,
    sampling,
)
from calr.text.sources import held_out_topics
from calr_kernels import native

TEXT = " ".join(f"word{i}" for i in range(2000))


def windows(source, tokenizer=None, samples=6, window=32, seed=0, model=None):
    tokenizer = tokenizer or byte_tokenizer()
    return calibration_windows(source, tokenizer, model, samples=samples, window=window, seed=seed)


def test_windows_come_from_the_text_and_depend_only_on_the_seed(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    found = windows(path)
    assert found.shape == (6, 32)
    assert torch.equal(found, windows(str(path)))
    assert torch.equal(found, windows([TEXT]))
    assert not torch.equal(found, windows(path, seed=1))
    decoded = [byte_tokenizer().decode(row) for row in found]
    starts = [TEXT.find(text) for text in decoded]
    assert all(start >= 0 for start in starts)
    parts = [start * 6 // len(TEXT) for start in starts]
    assert sorted(parts) == list(range(6))
    assert parts != sorted(parts)  # any few windows are of the whole text


def test_a_part_of_few_tokens_moves_no_other_window():
    tokenizer = byte_tokenizer()
    text = "x " * 1000 + "y " * 1000 + "z" * 2000
    tokenizer.add_tokens(["z" * 50])
    found = tokenizer.batch_decode(windows([text], tokenizer, samples=8))
    assert len(found) == 8
    assert any("x" in row for row in found) and any("y" in row for row in found)


def test_bos_follows_the_tokenizers_rule():
    plain, with_bos = byte_tokenizer(), byte_tokenizer(add_bos=True)
    assert (windows([TEXT], plain)[:, 0] != 0).all()
    found = windows([TEXT], with_bos)
    assert found.shape == (6, 32)
    assert (found[:, 0] == 0).all()
    assert (found[:, 1:] != 0).all()
    assert (evaluation_windows([TEXT], with_bos, windows=2, window=16)[:, 0] == 0).all()


def test_jsonl_fields(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": "abc", "body": "xyz"}) for _ in range(3)))
    assert read_text(path) == "abc\n\nabc\n\nabc"
    assert read_text(f"{path}#body") == "xyz\n\nxyz\n\nxyz"
    with pytest.raises(CalrError, match=r"rows.jsonl line 1: .* field 'none'"):
        read_text(f"{path}#none")


def test_several_sources_share_equally(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 5000)
    (tmp_path / "b.txt").write_text("b" * 5000)
    found = windows(f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}", samples=5)
    decoded = [byte_tokenizer().decode(row)[-1] for row in found]
    assert sorted(decoded) == ["a", "a", "a", "b", "b"]
    assert decoded != sorted(decoded)


def test_text_sampled_from_the_model_is_reproducible():
    model = tiny_llama()
    before = torch.get_rng_state()
    first = windows("sampled", model=model, samples=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (3, 32)
    assert torch.equal(first, windows("sampled", model=model, samples=3))


def test_tokens_are_drawn_as_often_as_the_scores_say():
    """Each row by its own scores: two distributions that have no token in common."""
    scores = torch.full((2, 6), -torch.inf)
    scores[0, :3], scores[1, 3:] = torch.tensor([0.1, 0.2, 0.7]).log(), torch.tensor([3.0, 0, 1])
    found = sampling._Drawing(0, None)(torch.zeros(0), scores.repeat(5000, 1))
    assert ((found == 0).sum(-1) == 1).all() and ((found == 0) | found.isinf()).all()
    counts = (found == 0).view(5000, 2, 6).sum(0)
    expected = 5000 * scores.softmax(-1)
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()


def test_an_end_of_text_beyond_the_vocabulary_forbids_nothing():
    scores = torch.full((50, 4), -torch.inf).index_fill_(1, torch.tensor([2, 3]), 0.0)
    drawn = sampling._Drawing(0, [3, 9, -2])(torch.zeros(0), scores).argmax(-1)
    assert set(drawn.tolist()) == {2}


@pytest.mark.parametrize("ends", [5, [5, 7]])
def test_sampled_text_never_ends(ends):
    model = tiny_llama(eos_token_id=ends)
    model.generation_config.eos_token_id = ends
    every = ends if isinstance(ends, list) else [ends]
    with torch.no_grad():
        model.lm_head.weight[every] *= 50  # by far the most probable half of the time
    rows = sample_from(model, byte_tokenizer(), 50, 8, 0)
    assert not torch.isin(rows[:, 1:], torch.tensor(every)).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_logits_are_no_numbers_writes_no_text(value):
    model = tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[7, 0] = value
    with pytest.raises(CalrError, match=r"calibration=sampled: the model's logits hold NaN"):
        sample_from(model, byte_tokenizer(), 3, 8, 0)


def test_text_is_written_natively_where_the_weights_fit_twice(source, monkeypatch):
    calls, decode = [], native.Blocks.decode
    monkeypatch.setattr(native.Blocks, "decode", lambda *given: calls.append(0) or decode(*given))
    monkeypatch.setattr(sampling, "cpu_multiplies_bfloat16", lambda: False)  # in float32, closely
    model, tokenizer = load(str(source), lazily=True)
    assert sample_from(model, tokenizer, 20, 16, 0).shape == (20, 16)
    batches = 2  # of 10
    assert len(calls) >= 14 * batches  # every token but the first, and the tracing
    few = sample_from(model, tokenizer, 10, 16, 0)
    calls.clear()
    assert sample_from(model, tokenizer, 10, 16, 0, natively=False).equal(few)
    small = SimpleNamespace(available=10**9, total=0)
    monkeypatch.setattr(sampling.psutil, "virtual_memory", lambda: small)
    assert sample_from(model, tokenizer, 10, 16, 0).equal(few)
    assert not calls


def test_a_token_of_no_probability_is_not_drawn():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.9999])
    found = draw(p.expand(4, 5), uniform[:, None])
    assert found.tolist() == [1, 1, 3, 3]


def test_the_default_needs_no_network():
    assert windows(None, model=tiny_llama(), samples=4).shape == (4, 32)


def _fit(tokenizer, text, size):
    """The first tokens of a text, the last of which is no space."""
    ids = tokenizer(text).input_ids[: size - 1]
    return [*ids, *tokenizer("x", add_special_tokens=False).input_ids]


@pytest.mark.parametrize("add_bos", [False, True])
def test_hard_wrapping_breaks_lines_between_words_and_keeps_the_text(add_bos):
    tokenizer = byte_tokenizer(add_bos=add_bos)
    texts = ["The cat\tsat on the mat. " * 40, "One\n\ntwo. " * 9 + "ünïcode-words " * 60]
    encoded = [_fit(tokenizer, text, 600) for text in texts]
    rows = torch.tensor(encoded)
    wrapped = hard_wrapped(rows, tokenizer)
    assert wrapped.shape == rows.shape
    assert torch.equal(wrapped[:, :add_bos], rows[:, :add_bos])
    for i, (before, after) in enumerate(zip(rows, wrapped, strict=True)):
        found, lines = (tokenizer.decode(row[add_bos:]) for row in (before, after))
        assert max(map(len, found.split("\n"))) > 80
        assert max(map(len, lines.split("\n"))) <= 60 + i
        assert "".join(found.split()).startswith("".join(lines.split()))
    assert torch.equal(hard_wrapped(wrapped, tokenizer)[0], wrapped[0])


def test_a_window_without_spaces_is_not_wrapped():
    rows = windows(["x" * 5000], samples=2, window=300)
    assert torch.equal(hard_wrapped(rows, byte_tokenizer()), rows)


def test_a_quarter_of_sampled_text_is_hard_wrapped(monkeypatch):
    rows = torch.full((9, 200), ord("x") + 2)
    rows[:, ::10] = ord(" ") + 2
    monkeypatch.setattr("calr.text.windows.sample_from", lambda *arguments: rows)
    found = windows("sampled", samples=9, window=200)
    assert sum(not torch.equal(row, rows[0]) for row in found) == 2


def test_evaluation_text_is_never_calibration_text():
    calibration = set(read_text("builtin").split("\n\n"))
    held_out = held_out_topics().split("\n\n")
    assert len(held_out) > 300
    assert len(calibration) > 3 * len(held_out)
    assert not calibration & set(held_out)


def test_evaluation_windows_are_consecutive():
    found = evaluation_windows([TEXT], byte_tokenizer(), windows=3, window=16)
    assert byte_tokenizer().decode(found.flatten()) == TEXT[:48]


def test_little_text_warns_and_none_is_refused(caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    found = windows(["x" * 70])
    logging.disable_propagation()
    assert found.shape == (2, 32)
    assert "gives 2 windows of 32 tokens, not 6" in caplog.text
    with pytest.raises(CalrError, match="less than one window of 32"):
        windows([""])
    with pytest.raises(CalrError, match="window=1: too few tokens"):
        evaluation_windows([TEXT], byte_tokenizer(add_bos=True), windows=1, window=1)
    with pytest.raises(CalrError, match="what the model samples"):
        evaluation_windows("sampled", byte_tokenizer(), windows=1, window=32)
    with pytest.raises(CalrError, match="not one window of 32"):
        evaluation_windows(["short"], byte_tokenizer(), windows=1, window=32)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "missing.txt: no such file"),
        ("./nothing", "no such file"),
        (torch.ones(3), r"calibration ids \[3\]"),
        (torch.ones(3, 4), "must be integers"),
    ],
)
def test_bad_sources_are_named(source, message):
    with pytest.raises(CalrError, match=message):
        windows(source)


def test_directories_and_binary_files_are_refused(tmp_path):
    with pytest.raises(CalrError, match="is a directory"):
        windows(str(tmp_path))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalrError, match="cannot be read as text"):
        windows(str(tmp_path / "binary.txt"))


def test_text_without_a_tokenizer_says_what_to_pass():
    with pytest.raises(CalrError, match="tokenizer: none was given"):
        calibration_windows(["a"], None, tiny_llama(), samples=1, window=8, seed=0)


@pytest.mark.parametrize("family", ["Gemma4TextConfig", "MambaConfig"])
def test_families_that_state_less_sample_text_too(family):
    """No attribute of a configuration is assumed: Gemma 4's head_dim differs by layer."""
    options = {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "vocab_size": 258,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    options |= {
        "Gemma4TextConfig": {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "global_head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 258,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
        },
        "MambaConfig": {"state_size": 4},
    }[family]
    torch.manual_seed(0)
    config = getattr(transformers, family)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert sample_from(model, byte_tokenizer(), 3, 16, 0).shape == (3, 16)


def test_a_model_that_does_not_fit_is_not_asked_to_write(source, monkeypatch):
    monkeypatch.setattr(
        sampling.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=2000)
    )
    whole, tokenizer = load(str(source))
    lazy, _ = load(str(source), lazily=True)
    with pytest.raises(CalrError, match=r"calibration=sampled.*name a file of text, or builtin"):
        sample_from(lazy, tokenizer, 2, 16, 0)
    assert sample_from(whole, tokenizer, 2, 16, 0).shape == (2, 16)  # it is in memory already
    monkeypatch.undo()
    assert torch.equal(
        sample_from(lazy, tokenizer, 2, 16, 0), sample_from(whole, tokenizer, 2, 16, 0)
    )
