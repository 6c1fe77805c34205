"""Compressed checkpoints in the hands of other packages, in both layouts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CompileConfig,
)

import calr
from calr.testing import tiny_llama


@pytest.fixture(scope="module", params=["two_factor", "pivoted"])
def saved(request, tmp_path_factory, ids):
    recipe = calr.Recipe(keep=0.6, layout=request.param, allocation="uniform", correction_tokens=0)
    model = calr.compress(tiny_llama(), recipe, calibration=ids)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory, request.param


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, ids):
    recipe = calr.Recipe(bits=6, scale_group=32, correction_tokens=0)
    model = calr.compress(tiny_llama(), recipe, calibration=ids)
    directory = tmp_path_factory.mktemp("quantised")
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_another_class_is_refused_with_the_reason(kind, saved):
    with pytest.raises(calr.CalrError, match="is of LlamaForCausalLM and cannot be loaded as"):
        kind.from_pretrained(saved[1])


@pytest.mark.works("training of all factors, or of a PEFT LoRA on top")
def test_peft_lora_trains_one_step_on_top(saved, ids):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(saved[1])
    targets = ["gate_proj", "q_proj", "down_proj"]
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    trainable = [p for p in lora.parameters() if p.requires_grad]
    frozen = {n: p.clone() for n, p in lora.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    losses = []
    for _ in range(2):
        loss = lora(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    after = dict(lora.named_parameters())
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)


@pytest.mark.works("training of all factors, or of a PEFT LoRA on top")
def test_every_factor_can_be_trained(saved, ids):
    model = AutoModelForCausalLM.from_pretrained(saved[1])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.works("`device_map` with CPU and disk offload")
def test_offload_to_disk_and_cpu(saved, ids, tmp_path):
    model, directory, _ = saved
    for place in ("disk", "cpu"):
        device_map = {
            "model.embed_tokens": "cpu",
            "lm_head": "cpu",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": place,
        }
        loaded = AutoModelForCausalLM.from_pretrained(
            directory, device_map=device_map, offload_folder=tmp_path / place
        )
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.works("torchao int8 weights")
def test_torchao_int8(saved, ids):
    quantization = pytest.importorskip("torchao.quantization")
    model = AutoModelForCausalLM.from_pretrained(saved[1])
    exact = model(ids).logits.detach()
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    error = (model(ids).logits - exact).norm() / exact.norm()
    assert 0 < error < 0.05


@pytest.mark.works("torchao int8 weights", quantised="refused")
def test_torchao_refuses_what_is_quantised_already(quantised, ids):
    quantization = pytest.importorskip("torchao.quantization")
    model = AutoModelForCausalLM.from_pretrained(quantised)
    exact = model(ids).logits.detach()
    with pytest.raises(AssertionError, match="uint8"):
        quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    assert torch.equal(model(ids).logits, exact)


def static():
    """Arguments of `generate` for a static cache and a compiled step, as on a GPU by itself."""
    whole = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    whole._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": whole}


@pytest.mark.works("`generate`, `torch.compile`", quantised="yes")
def test_a_quantised_model_generates_in_a_compiled_step(quantised):
    model = AutoModelForCausalLM.from_pretrained(quantised)
    tokens = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model.generate(ids, **tokens, **static()), model.generate(ids, **tokens))
    assert hasattr(model, "_compiled_call")


@pytest.mark.works("`generate`, `torch.compile`")
@pytest.mark.parametrize("mode", ["generate", "compile", "static cache"])
def test_generation(saved, mode):
    model = AutoModelForCausalLM.from_pretrained(saved[1])
    tokens = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    again = saved[0].generate(torch.tensor([[5, 6, 7]]), **tokens)
    if mode == "compile":
        model.forward = torch.compile(model.forward, backend="eager")
    elif mode == "static cache":
        tokens |= static()
    output = model.generate(torch.tensor([[5, 6, 7]]), **tokens)
    assert torch.equal(output, again)
    assert hasattr(model, "_compiled_call") == (mode == "static cache")


PARALLEL = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import calr
torch.set_num_threads(1)
ids = torch.arange(2, 34)[None]
try:
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))
except calr.CalrError as error:
    print("REFUSED", error, flush=True)
    sys.exit(0)
sharded = {n for n, p in model.named_parameters() if type(p).__name__ == "DTensor"}
assert any(n.endswith("o_proj.down.weight") for n in sharded), sharded
with torch.no_grad():
    logits = model(ids).logits
    expected = AutoModelForCausalLM.from_pretrained(sys.argv[1])(ids).logits
difference = float((logits - expected).abs().max() / expected.abs().max())
Path(sys.argv[2], f"{dist.get_rank()}.difference").write_text(str(difference))
dist.destroy_process_group()
"""


def in_parallel(directory, place):
    """Load a checkpoint in two processes that share it; what each finds is written to a place."""
    script = place / "parallel.py"
    script.write_text(PARALLEL)
    return subprocess.run(
        [Path(sys.executable).parent / "torchrun", "--nproc-per-node=2", "--master-port=0",
         "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", script, directory, place],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.works("tensor parallel (transformers, 2 gloo processes)", quantised="refused")
def test_tensor_parallel_refuses_quantised_layers(quantised, tmp_path):
    result = in_parallel(quantised, tmp_path)
    said = result.stdout + result.stderr  # transformers before 5.21 refuses it in words of its own
    assert "a quantised layer cannot be sharded" in said or "tensor parallel size" in said, said
    assert not list(tmp_path.glob("*.difference"))


@pytest.mark.works(
    "tensor parallel (transformers, 2 gloo processes)",
    pivoted="refused",
)
def test_tensor_parallel_on_two_processes(saved, tmp_path):
    _, directory, layout = saved
    result = in_parallel(directory, tmp_path)
    if layout == "pivoted":
        assert "REFUSED model.layers" in result.stdout, result.stdout + result.stderr
        assert "compress with layout=two_factor" in result.stdout
        return
    assert result.returncode == 0, result.stdout + result.stderr
    found = [float(path.read_text()) for path in tmp_path.glob("*.difference")]
    assert len(found) == 2
    assert max(found) < 1e-5
