"""Save a model, one shard in memory at a time where its weights are in files."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from calr.model.absent import absent, present, resident
from calr.model.quantized import tensor_bytes
from calr.progress import begin_phase, progress

SHARD_BYTES = 1_000_000_000
PHASE = "writing"
INDEX = "model.safetensors.index.json"


def saver(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[Path], None]:
    """Return what saves a model and its tokenizer in a directory."""

    def save(directory: Path) -> None:
        begin_phase(PHASE)
        if not absent(model) or tensor_bytes(model) <= SHARD_BYTES:
            with resident(model):
                model.save_pretrained(directory)
        else:
            _save_in_shards(model, directory)
        tokenizer.save_pretrained(directory)

    return save


def _save_in_shards(model: PreTrainedModel, directory: Path) -> None:
    """Save configurations as `save_pretrained` does, and tensors shared ones once."""
    with _without_quantizer(model):
        model.save_pretrained(directory, state_dict={})
    (directory / "model.safetensors").unlink(missing_ok=True)  # of no tensors
    every: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(every.items())}
    once = {name: every[name] for name in every if first[id(every[name])] == name}
    tensors = revert_weight_conversion(model, once)
    sizes = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in tensors.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_BYTES)
    files = split.filename_to_tensors.items()
    for file, names in progress(files, desc="shards", unit="file", phase=PHASE):
        _save_shard({name: tensors[name] for name in names}, directory / file)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (directory / INDEX).write_text(json.dumps(index, indent=2))


@contextmanager
def _without_quantizer(model: PreTrainedModel) -> Iterator[None]:
    """Have transformers save what it is given: a quantizer makes it take the model's tensors."""
    owner: Any = model
    before, owner.hf_quantizer = getattr(owner, "hf_quantizer", None), None
    try:
        yield
    finally:
        owner.hf_quantizer = before


def _save_shard(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Save tensors, whose values are let go of before those of the next shard are read."""
    shard = {name: present(tensor).cpu().contiguous() for name, tensor in tensors.items()}
    save_file(shard, file, metadata={"format": "pt"})
