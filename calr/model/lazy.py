"""A model whose weights stay in the checkpoint's files and are read block by block."""

import contextlib
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from calr.integrations.config import QUANT_METHOD
from calr.integrations.experts import take_apart
from calr.integrations.transformers import naming, prepare
from calr.model.absent import Absent, absent, read_when_called
from calr.model.files import InFile, in_gguf, in_safetensors
from calr.model.stacked import Pieces, experts_in_files, stacked_names
from calr.model.structure import find_blocks

SAFETENSORS = "model.safetensors"
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # several devices' own
GGUF_ARCHITECTURES = ("llama", "gemma3")  # compared with what transformers loads
MOVED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # once stored, now computed


def lazy_model(
    config: Any, source: str, gguf: list[Path], dtype: Any, device: str, trust: bool
) -> tuple[PreTrainedModel, dict[str, list[str]]] | None:
    """Build a model whose matrices are absent: in the files.

    gguf: the files of a GGUF model, empty for another. dtype: of its numbers; "auto" for the
    checkpoint's. What is no matrix (norms, biases, buffers) is in memory. Returns it with what the
    files lack or have beside it, as transformers reports that ("missing_keys", "unexpected_keys",
    "mismatched_keys"). None where files and model name their tensors, or keep them, too
    differently: then the whole must be loaded.
    """
    if dtype == "auto":
        dtype = getattr(config, "dtype", None)
    if not isinstance(dtype, torch.dtype) or device in DEVICE_MAPS:
        return None
    model = _empty(config, dtype, trust)
    if getattr(model, "_keep_in_fp32_modules", None) or not _quantisation_is_ours(config):
        return None
    files = _gguf(model, gguf) if gguf else _safetensors(model, source)
    if files is None or not _tied_as_stated(model, files):
        return None
    report = _fill(model, files, torch.device(device))
    if not gguf:
        with contextlib.suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(source)
    return model.eval(), report


def read_in_parts(model: nn.Module) -> None:
    """Have each decoder block, and each module outside of them, read what it lacks when called."""
    blocks = list(find_blocks(model)[1])
    inside = {id(module) for block in blocks for module in block.modules()}
    outside = [
        module
        for module in model.modules()
        if id(module) not in inside
        and any(isinstance(p, Absent) for p in module._parameters.values())
    ]
    for module in [*blocks, *outside]:
        if absent(module):
            read_when_called(module)


def _empty(config: Any, dtype: torch.dtype, trust: bool) -> PreTrainedModel:
    """Build a model without numbers but for its buffers."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust
        )
        take_apart(model)
        prepare(model)
    model.tie_weights()
    return model


def _tied_as_stated(model: PreTrainedModel, files: dict[str, InFile]) -> bool:
    """Tell whether tensors that a model ties are one in the files: transformers unties others."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in ties.items():
        if target in files and (
            source not in files or not torch.equal(files[target].read(), files[source].read())
        ):
            return False
    return True


def _quantisation_is_ours(config: Any) -> bool:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return True
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return bool(method == QUANT_METHOD)


def _safetensors(model: PreTrainedModel, source: str) -> dict[str, InFile] | None:
    """List the tensors of a checkpoint by the model's names; None for other files or names."""
    find = partial(cached_file, source, _raise_exceptions_for_missing_entries=False)
    one, index = find(SAFETENSORS), find(f"{SAFETENSORS}.index.json")
    if one is None and index is None:
        return None
    shards = [one] if one is not None else get_checkpoint_shard_files(source, index)[0]
    named, found = naming(model, model.state_dict()), dict[str, InFile]()
    pieces: dict[str, Pieces] = {name: {} for name in stacked_names(model)}
    for shard in shards:
        for key, tensor in in_safetensors(Path(str(shard))).items():
            name, converted = named(key)
            if name in pieces:
                pieces[name].setdefault(converted, {})[key] = tensor
            elif converted:
                return None  # saving, too, would have to convert
            else:
                found[name] = tensor
    experts = experts_in_files(model, pieces)
    return None if experts is None else found | experts


def _gguf(model: PreTrainedModel, parts: list[Path]) -> dict[str, InFile] | None:
    """List the tensors of a GGUF model by the model's names; None for one that was not compared."""
    try:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )
    except ImportError:
        return None
    architecture, tensors = in_gguf(parts)
    if architecture not in GGUF_ARCHITECTURES:
        return None
    kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(_Childless(model), processor)

    def read(name: str, tensor: InFile) -> Tensor:
        return torch.from_numpy(processor.process(weights=tensor.read().numpy(), name=name).weights)

    return {
        names[name]: InFile(tensor.shape, partial(read, name, tensor))
        for name, tensor in tensors.items()
        if name in names
    }


class _Childless:
    """A model as the library's mapping of names looks at one, less its parts: it would look at each
    of these again, which only Bloom's names need, and list all names of a model every time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> list[tuple[str, nn.Module]]:
        """List none."""
        return []


def _fill(
    model: PreTrainedModel, files: dict[str, InFile], device: torch.device
) -> dict[str, list[str]]:
    """Give a model its tensors, matrices absent; return what does not fit."""
    expected = model.state_dict(keep_vars=True)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    report: dict[str, list[str]] = {"missing_keys": [], "mismatched_keys": []}
    made: dict[int, Tensor] = {}
    for name in sorted(expected, key=lambda name: name in tied):
        tensor, place = expected[name], files.get(name)
        if id(tensor) not in made:
            if place is None or tuple(place.shape) != tuple(tensor.shape):
                report["missing_keys" if place is None else "mismatched_keys"].append(name)
                continue
            made[id(tensor)] = _made(tensor, place, device)
        _set(model, name, made[id(tensor)])
    for name, buffer in model.named_buffers():
        if name not in expected:
            there = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            _set(model, name, there)  # on the meta device those of no numbers, of our own modules
    ours: Any = model
    report["missing_keys"] = _but(report["missing_keys"], ours._keys_to_ignore_on_load_missing)
    beside = files.keys() - expected.keys()
    report["unexpected_keys"] = _but(beside, {*ours._keys_to_ignore_on_load_unexpected, *MOVED})
    return report


def _made(tensor: Tensor, place: InFile, device: torch.device) -> Tensor:
    """Return what stands in a tensor's place: values, or the word that they are in a file."""
    if isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
        return Absent.of(tensor, place.read, device)
    values = place.read().to(device, tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


def _but(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    """List names that match none of some patterns, as transformers' classes state them."""
    return [name for name in sorted(names) if not any(re.search(p, name) for p in patterns or ())]


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, own = name.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(value, nn.Parameter):
        module._parameters[own] = value
    else:
        module._buffers[own] = value
