"""A quantised model as a compressed-tensors checkpoint for transformers and vLLM, its integers and
scales bit for bit, and its corrective paths as a PEFT adapter beside it."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calr.errors import CalrError
from calr.export.dense import load_compressed, require_no_experts
from calr.model import digest, fingerprint, load_skeleton, tensor_bytes
from calr.storage import destination, model_card, size, write_at_once
from calr_kernels import LowRankLinear, QuantizedEmbedding, QuantizedLinear, records

WIDTHS = (4, 8)
ADAPTER = "adapter"  # the folder of the corrective paths
WHAT = "integers and scales in compressed-tensors' pack-quantized form, for programs without calr"

Tensors = dict[str, Tensor]


def export_compressed_tensors(
    source: str,
    directory: str | Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a quantised checkpoint for programs that read compressed-tensors, whole or not at all.

    Corrective paths become DIRECTORY/adapter, a PEFT LoRA. Returns what it became. Raises CalrError
    for what the format lacks, naming the layer, for a source that is no checkpoint of calr's or is
    damaged, and for a directory that holds something else (without overwrite).
    """
    try:
        import compressed_tensors  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        raise CalrError(f"compressed-tensors: {error}; pip install 'calr[export]'") from error
    place = destination(directory, source, statistics=None, overwrite=overwrite)
    model, tokenizer = load_compressed(source, trust_remote_code=trust_remote_code)
    require_no_experts(model, "compressed-tensors")
    key = digest(fingerprint(model), "compressed-tensors")
    base, adapter, config = _base(model), _adapter(model), _config(model)
    results: dict[str, Any] = {
        "source_bytes": tensor_bytes(model),
        "tensor_bytes": sum(t.nbytes for t in base.values()),
        "adapter_bytes": sum(t.nbytes for t in adapter.values()),
    }
    made = yaml.safe_dump(model.config.quantization_config.recipe, sort_keys=False)
    skeleton = load_skeleton(source, trust_remote_code=trust_remote_code, dense=True)
    skeleton.config.quantization_config = config
    skeleton.generation_config = model.generation_config
    command = "calr export {model} OUTPUT --to compressed-tensors"
    folder = ADAPTER if adapter else None
    write_at_once(
        partial(_save, skeleton, tokenizer, base, adapter, str(place)),
        place,
        model_card(source, WHAT, command, made, results, needs_calr=False, adapter=folder),
        key=key,
        summary={"model": source, "to": "compressed-tensors"},
        results=results,
        overwrite=overwrite,
        check=partial(_check, base, adapter),
    )
    written = {"bytes": size(place), "directory": str(place)}
    return results | written | ({"adapter": str(place / ADAPTER)} if adapter else {})


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield the quantised layers by name; CalrError for one that the format lacks."""
    head: Any = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            raise CalrError(f"{name}: is of low rank, which compressed-tensors lacks; --to dense")
        if isinstance(module, QuantizedEmbedding) or (
            isinstance(module, QuantizedLinear) and module is head
        ):
            raise CalrError(
                f"{name}: is quantised, which readers of compressed-tensors take of the blocks' "
                "layers alone; compress with --target compressed-tensors"
            )
        if isinstance(module, QuantizedLinear):
            form = module.form
            held = form.levels == "uniform" and form.bits in WIDTHS
            if not held or form.scale_dtype != "bfloat16" or module.in_features % form.scale_group:
                raise CalrError(
                    f"{name}: has {form.bits} bits ({form.levels} levels, {form.scale_dtype} "
                    f"scales) in rows of {module.in_features}, which compressed-tensors lacks; "
                    "compress with --target compressed-tensors"
                )
            yield name, module


def _base(model: PreTrainedModel) -> Tensors:
    """Return every tensor of the checkpoint: of a quantised layer integers, scales, shape."""
    from compressed_tensors.compressors import pack_to_int32

    layers, found = dict(_layers(model)), {}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem in layers and kind == "weight":
            layer = layers[stem]
            codes, scales = records.unpack(tensor, layer.form, layer.in_features)
            found[f"{stem}.weight_packed"] = pack_to_int32(_integers(layer, codes), layer.form.bits)
            found[f"{stem}.weight_scale"] = scales.clone()
            found[f"{stem}.weight_shape"] = torch.tensor([len(codes), layer.in_features])
        elif ".corrective." not in name and name not in tied:
            found[name] = tensor
    return found


def _integers(layer: QuantizedLinear, codes: Tensor) -> Tensor:
    return (codes.to(torch.int16) - (1 << (layer.form.bits - 1))).to(torch.int8)


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """State the scheme of every quantised layer as config.json has it."""
    from compressed_tensors.quantization import QuantizationConfig

    schemes: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, layer in _layers(model):
        schemes[layer.form.bits, layer.form.scale_group].append(name)
    if not schemes:
        raise CalrError("compressed-tensors: no layer of this checkpoint is quantised")
    left = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, QuantizedLinear)
    ]
    groups = {
        f"group_{i}": {
            "targets": names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": scale_group,
            },
        }
        for i, ((bits, scale_group), names) in enumerate(sorted(schemes.items()))
    }
    config = QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        quantization_status="compressed",
        ignore=left,
    )
    stated: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return stated


def _adapter(model: PreTrainedModel) -> Tensors:
    """Return the corrective paths as PEFT names them, lora_A [c, K] and lora_B [N, c].

    All of one rank: shorter ones are padded with zeros.
    """
    paths = {n: layer.corrective for n, layer in _layers(model) if layer.corrective is not None}
    rank, found = max((path.rank for path in paths.values()), default=0), {}
    for name, path in paths.items():
        down, up = path.factors(model.dtype)
        padding = rank - path.rank
        found[f"base_model.model.{name}.lora_A.weight"] = pad(down, (0, 0, 0, padding))
        found[f"base_model.model.{name}.lora_B.weight"] = pad(up, (0, padding))
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def _save(
    skeleton: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: Tensors,
    adapter: Tensors,
    home: str,
    directory: Path,
) -> None:
    """Write the files of the checkpoint; home: where they will lie."""
    from peft import LoraConfig

    skeleton.save_pretrained(directory, state_dict=dict(base))  # it takes tensors out
    tokenizer.save_pretrained(directory)
    if adapter:
        names = {name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in adapter}
        rank = next(len(t) for name, t in adapter.items() if name.endswith("lora_A.weight"))
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=0.0,
            target_modules=sorted(names),
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(Path(home).resolve()),
            inference_mode=True,
        )
        config.save_pretrained(str(directory / ADAPTER))
        file = directory / ADAPTER / "adapter_model.safetensors"
        save_file(adapter, file, metadata={"format": "pt"})


def _check(base: Tensors, adapter: Tensors, directory: Path) -> None:
    """Read the checkpoint and its adapter back and compare: every tensor bit for bit."""
    wanted = base | adapter
    missing = set(wanted)
    for file in sorted(directory.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name not in wanted or not torch.equal(opened.get_tensor(name), wanted[name]):
                    raise CalrError(f"{name}: is another one when the checkpoint is read again")
                missing.discard(name)
    for name in sorted(missing):
        raise CalrError(f"{name}: is not there when the checkpoint is read again")
