"""The large models of the benchmarks are models that load, and the largest is one that fits."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import calr
from calr.model import absent, load

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import shapes

SMALL = {"width": 64, "inner": 64, "blocks": 2, "heads": 4, "key_value_heads": 2, "head": 16}
TINY = {
    "llama": shapes.Shape("llama", vocabulary=300, tied=True, **SMALL),
    "qwen3": shapes.Shape("qwen3", vocabulary=300, **SMALL),
    "qwen3_moe": shapes.Shape("qwen3_moe", vocabulary=300, experts=4, **SMALL),
}
RECIPE = calr.Recipe(bits=6, correction_tokens=0, samples=4, gradient_samples=2, window=16)


@pytest.mark.parametrize("kind", TINY)
def test_a_model_of_random_weights_is_read_in_parts(kind, tmp_path):
    shapes.write_safetensors(tmp_path / "model", TINY[kind])
    model, _ = load(str(tmp_path / "model"), lazily=True)
    assert absent(model) and model.dtype == torch.bfloat16
    for name, tensor in TINY[kind].tensors(1).items():
        if "experts" not in name:
            assert tuple(model.get_parameter(name).shape) == tuple(tensor.shape)
    found = calr.compress_to(
        str(tmp_path / "model"), tmp_path / "out", RECIPE, calibration="builtin", eval_windows=1
    )
    assert found["kl_from_dense"] < 0.5


@pytest.mark.parametrize("parts", [1, 2])
def test_a_gguf_model_of_random_weights_is_read_in_parts(parts, tmp_path):
    shapes.write_gguf(tmp_path / "model", TINY["llama"], "Q8_0", parts)
    assert len(list((tmp_path / "model").glob("*.gguf"))) == parts
    model, _ = load(str(tmp_path / "model"), lazily=True)
    assert absent(model)
    weight = TINY["llama"].tensors(1)["model.layers.0.mlp.down_proj.weight"].float()
    layer = model.model.layers[0].mlp.down_proj
    error = layer.weight.read().float() - weight
    assert error.norm() < 0.01 * weight.norm()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_largest_that_fits(device, tmp_path, monkeypatch):
    """In memory, and of a GPU in four fifths of what is free there."""
    monkeypatch.setattr(shapes, "SHAPES", TINY | {"3B": shapes.SHAPES["3B"]})
    recipe = calr.Recipe(bits=5, correction_tokens=0)

    def largest(room):
        memory = room if device == "cpu" else 64 << 30
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(device == "cuda"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (room, room))
        return shapes.largest(device, tmp_path, recipe)[0]

    assert largest(8 << 30) == "3B"
    assert largest(1 << 30 if device == "cpu" else 3 << 30) == "qwen3_moe"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1 << 30))
    assert largest(8 << 30) == "qwen3_moe"
    with pytest.raises(SystemExit, match=f"{device}: not even llama fits"):
        largest(1 << 20)
