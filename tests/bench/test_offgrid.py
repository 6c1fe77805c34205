"""A model taken off its grid is the same function."""

from pathlib import Path

import gguf
import numpy as np
import torch

import calr
from calr.export.gguf import copy_fields, finish
from calr.model import on_grid

BENCH = Path(__file__).parents[2] / "bench"


def test_the_logits_are_the_same_and_no_matrix_is(gguf_file, ids, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from offgrid import off_grid

    reader, draw = gguf.GGUFReader(gguf_file), np.random.default_rng(1)
    writer = gguf.GGUFWriter(tmp_path / "source.gguf", "llama")
    copy_fields(writer, reader)
    for tensor in reader.tensors:
        data = gguf.dequantize(tensor.data, tensor.tensor_type)
        if "norm" in tensor.name:
            data = draw.uniform(0.5, 2, data.shape).astype(np.float32)
        writer.add_tensor(tensor.name, data)
    finish(writer)
    off_grid(tmp_path / "source.gguf", tmp_path / "out.gguf")
    before, _ = calr.load(str(tmp_path / "source.gguf"), dtype="float32")
    after, _ = calr.load(str(tmp_path / "out.gguf"), dtype="float32")
    torch.testing.assert_close(after(ids).logits, before(ids).logits, atol=1e-4, rtol=1e-4)
    assert after.lm_head.weight is not after.model.embed_tokens.weight
    for name, module in after.named_modules():
        if "norm" in name:
            assert torch.equal(module.weight, torch.ones_like(module.weight))
        elif isinstance(module, torch.nn.Linear):
            assert not torch.equal(module.weight, before.get_submodule(name).weight)
    assert on_grid(str(gguf_file))
    assert not on_grid(str(tmp_path / "out.gguf"))
    small = {"samples": 4, "gradient_samples": 2, "window": 32, "correction_tokens": 0}
    for file, rotated in ((gguf_file, "no"), (tmp_path / "out.gguf", "yes")):
        made = calr.compress_to(
            str(file),
            tmp_path / f"made-{rotated}",
            calr.Recipe(bits=9.0, scale_group=32, **small),
            calibration="builtin",
            eval_windows=0,
        )
        assert made["rotated"] == rotated
