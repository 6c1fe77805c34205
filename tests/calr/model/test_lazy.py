"""A model that is read from its files: the same in every respect as one in memory."""

import copy
import json

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import calr
from calr.errors import CalrError
from calr.integrations.experts import take_apart
from calr.model import (
    Absent,
    absent,
    fingerprint,
    load,
    present,
    read_when_called,
    recast,
    resident,
    weight_of,
)
from calr.testing import byte_tokenizer, tiny_llama

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 260,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ffn_dim": 80,
    "word_embed_proj_dim": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LAZY = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mistral", "opt", "olmo2"]
MIXTURES = ["mixtral", "qwen3_moe", "granitemoe"]  # stored expert by expert, or as one tensor
WHOLE = ["gpt_oss"]  # some of its numbers are of float32


def saved(kind, directory, dtype=torch.float32, **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SMALL | more))
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(directory, max_shard_size="40KB")  # in several files
    byte_tokenizer().save_pretrained(directory)


@pytest.mark.parametrize("kept", ["both", "head"])
def test_a_head_that_is_another_than_the_embedding_is_not_tied_to_it(kept, tmp_path):
    """transformers ties what a config says is tied only where the files do not say otherwise."""
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    tensors["lm_head.weight"] = tensors[embedding].flip(0).contiguous()
    if kept == "head":
        del tensors[embedding]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(1, 17)[None]
    whole, lazy = (load(str(tmp_path), lazily=lazily)[0] for lazily in (False, True))
    assert torch.equal(whole(ids).logits, lazy(ids).logits)
    assert not torch.allclose(whole(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", LAZY + MIXTURES + WHOLE)
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_and_every_logit_is_the_same(kind, tied, tmp_path):
    saved(kind, tmp_path, torch.bfloat16, tie_word_embeddings=tied)
    whole, lazy = (load(str(tmp_path), lazily=lazily)[0] for lazily in (False, True))
    assert absent(lazy) == (kind not in WHOLE)
    if kind in MIXTURES:
        take_apart(whole)
    assert lazy.dtype == whole.dtype and not lazy.training
    found, wanted = lazy.state_dict(keep_vars=True), whole.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(present(found[name]), tensor), name
        assert isinstance(found[name], Absent) == (kind not in WHOLE and tensor.dim() > 1), name
    for (name, buffer), (other, value) in zip(
        lazy.named_buffers(), whole.named_buffers(), strict=True
    ):
        assert name == other and torch.equal(buffer, value)
    assert fingerprint(lazy) == fingerprint(whole)
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        assert torch.equal(lazy(ids).logits, whole(ids).logits)
    assert absent(lazy) == (kind not in WHOLE)
    assert lazy.generation_config.to_dict() == whole.generation_config.to_dict()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_gguf_file_is_dequantised_as_it_is_read(family, gguf_file, write_gguf, tmp_path):
    if family == "gemma3":  # its norms count from 1 in the file
        config = transformers.AutoConfig.for_model("gemma3_text", **SMALL)
        gguf_file = tmp_path / "gemma.gguf"
        model = AutoModelForCausalLM.from_config(config)
        write_gguf(gguf_file, model, gguf.MODEL_ARCH.GEMMA3, norms=1)
    whole, lazy = (load(str(gguf_file), lazily=lazily)[0] for lazily in (False, True))
    assert absent(lazy)
    found, wanted = lazy.state_dict(keep_vars=True), whole.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(present(found[name]), tensor), name


def test_a_compressed_checkpoint_can_be_read_in_parts(source, ids, tmp_path):
    for name, recipe in {"bits": {"bits": 6}, "keep": {"keep": 0.7, "rank_step": 2}}.items():
        made = calr.compress(
            tiny_llama(), calr.Recipe(**recipe, correction_tokens=0), calibration=ids
        )
        made.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        lazy, _ = load(str(tmp_path / name), lazily=True)
        assert absent(lazy)
        with torch.no_grad():
            assert torch.equal(lazy(ids).logits, made(ids).logits)


def test_matrices_are_there_while_they_are_used_and_no_longer(source, ids):
    model, _ = load(str(source), lazily=True)
    block, name = model.model.layers[0], "model.layers.0.mlp.up_proj"
    stand_in = block.mlp.up_proj.weight
    assert isinstance(stand_in, Absent)
    for compute in (torch.isnan, torch.Tensor.sum, lambda p: p @ p.mT, lambda p: p.to("meta")):
        with pytest.raises(RuntimeError, match="values are in a file"):
            compute(stand_in)
    assert stand_in.untyped_storage().nbytes() == stand_in.element_size()
    assert bool(torch.isfinite(weight_of(model, name)).all())
    with resident(model):
        assert not absent(model) and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(RuntimeError, match="on purpose"), resident(block):
        assert not absent(block)
        raise RuntimeError("on purpose")
    assert block.mlp.up_proj.weight is stand_in
    embedded = model.model.embed_tokens(ids).requires_grad_()  # backward after a block has let go
    model.model(inputs_embeds=embedded).last_hidden_state.sum().backward()
    assert bool(torch.isfinite(embedded.grad).all())


def test_what_is_resident_does_not_read_again_and_keeps_a_forward_of_its_own(source):
    model, _ = load(str(source), lazily=True)
    first, second = model.model.layers
    own = vars(second).pop("forward").__wrapped__
    vars(second)["forward"] = custom = lambda *given, **others: own(*given, **others)
    read_when_called(second)
    reading = [vars(block)["forward"] for block in (first, second)]
    with pytest.raises(RuntimeError, match="on purpose"), resident(model):
        assert "forward" not in vars(first) and vars(second)["forward"] is custom
        vars(first)["forward"] = put = object()  # by somebody else: stays
        raise RuntimeError("on purpose")
    assert vars(first)["forward"] is put and vars(second)["forward"] is reading[1]
    vars(first)["forward"] = reading[0]
    again = copy.deepcopy(first)
    assert vars(again)["forward"] is not reading[0]
    assert vars(again)["forward"]._module is again


def test_another_dtype_is_that_of_what_is_read(source):
    lazy, _ = load(str(source), lazily=True)
    whole, _ = load(str(source), dtype="bfloat16")
    recast(lazy, torch.bfloat16)
    assert torch.equal(
        weight_of(lazy, "model.layers.1.self_attn.q_proj"),
        whole.model.layers[1].self_attn.q_proj.weight,
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight: missing"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(7)}),
            r"model.norm.weight: has an",
        ),
        (
            lambda t: t.update({"model.x.weight": torch.ones(7)}),
            "model.x.weight: in the ch",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(damage, message, tmp_path):
    saved("llama", tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {k: t for file in set(index.values()) for k, t in load_file(tmp_path / file).items()}
    (tmp_path / "model.safetensors.index.json").unlink()
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalrError, match=message):
        load(str(tmp_path), lazily=True)


@pytest.mark.parametrize("keep", [4, 60, 5_000])
def test_a_truncated_file_is_named(keep, source, tmp_path):
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CalrError, match=r"model\.safetensors: damaged or truncated"):
        load(str(tmp_path), lazily=True)


def test_a_file_that_is_damaged_later_is_named_when_it_is_read(source, gguf_file, tmp_path):
    for file in [*source.iterdir(), gguf_file]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for path in (tmp_path / "model.safetensors", tmp_path / "tiny.gguf"):
        where = tmp_path if path.suffix == ".safetensors" else path
        model, _ = load(str(where), lazily=True)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(CalrError, match=f"{path.name}: damaged or truncated"):
            fingerprint(model)
