"""A quantised model as a GGUF file for llama.cpp, its integers and scales bit for bit.

What a GGUF file holds beside its tensors (hyperparameters, tokenizer) is copied from one of the
dense model. Corrective paths go into a second file, a LoRA adapter.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from calr.errors import CalrError
from calr.export.dense import load_compressed, require_no_experts
from calr.integrations.config import CalrConfig
from calr.model import GGUFReader, gguf_files
from calr.storage import flush, one_sentence
from calr_kernels import Form, QuantizedEmbedding, QuantizedLinear, records

GROUP = 32  # of GGUF's legacy types
KINDS = {  # the types of GGUF that are forms of ours, in groups of 32
    (4, "uniform"): gguf.GGMLQuantizationType.Q4_0,
    (4, "table"): gguf.GGMLQuantizationType.IQ4_NL,
    (5, "uniform"): gguf.GGMLQuantizationType.Q5_0,
    (8, "uniform"): gguf.GGMLQuantizationType.Q8_0,
}
NUMBERS = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    torch.float16: gguf.GGMLQuantizationType.F16,
}
ROTATED = ("llama",)  # architectures of which GGUF has the rows of q and k in another order
SHIFTED = ("gemma2", "gemma3")  # and those of which it stores norm weights plus one
ARCHITECTURES = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"}  # of transformers
NOT_COPIED = (  # of a file's tensors: their types, their places
    "GGUF.",
    "general.architecture",
    "general.file_type",
    "general.alignment",
    "split.",
)
COPIED = ("rope_freqs.weight",)  # tensors that no checkpoint has


def export_gguf(
    source: str,
    file: str | Path,
    *,
    like: str | Path,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a quantised checkpoint as a GGUF file, whole or not at all; return what it became.

    like: a GGUF file of the dense model, or a directory with one, of which all but the tensors is
    copied. With corrective paths FILE-adapter.gguf is written, too, for `llama-cli --lora`. Raises
    CalrError for a form that GGUF lacks, naming the layer, for a source that is no checkpoint of
    calr's or is damaged, for a like that is another model's, and for a file that exists (without
    overwrite).
    """
    place, template = Path(file), _template(like)
    adapter = place.with_name(f"{place.stem}-adapter.gguf")
    for path in (place, adapter):
        _refuse(path, [*gguf_files(str(like)), Path(like)], overwrite)
    model, _ = load_compressed(source, trust_remote_code=trust_remote_code)
    require_no_experts(model, "GGUF")
    tensors, terms = _tensors(model, template), _terms(model, template)
    with one_sentence(place.parent), _whole(place) as unfinished:
        _write_model(unfinished, template, tensors)
        _check(unfinished, tensors)
        if terms:
            with _whole(adapter) as other:  # both are complete before either is in place
                _write_adapter(other, template, terms)
        else:
            adapter.unlink(missing_ok=True)  # of the file that goes now
    results = {
        "tensor_bytes": sum(data.nbytes for data, _ in tensors.values()),
        "adapter_bytes": sum(a.nbytes + b.nbytes for a, b in terms.values()),
        "bytes": place.stat().st_size,
        "file": str(place),
    }
    return results | ({"adapter": str(adapter)} if terms else {})


def _refuse(place: Path, dense: list[Path], overwrite: bool) -> None:
    """Raise CalrError for a place where something is that must not be replaced."""
    if not place.exists():
        return
    if any(place.samefile(file) for file in dense):
        raise CalrError(f"{place}: is the dense model itself; name another file")
    if not overwrite:
        raise CalrError(f"{place}: exists; name another file or pass --overwrite")
    if place.is_dir() or _begin(place) != b"GGUF":
        raise CalrError(f"{place}: is no GGUF file, so --overwrite refuses to replace it")


def _begin(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4)


def _template(like: str | Path) -> gguf.GGUFReader:
    try:
        files = gguf_files(str(like))
        found = GGUFReader(files[0] if files else like)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CalrError(f"like={like}: cannot be read as a GGUF file: {error}") from error
    if len(files) > 1:
        raise CalrError(f"like={like}: is in {len(files)} parts; merge them first")
    if "general.architecture" not in found.fields:
        raise CalrError(f"like={like}: does not say of what architecture it is")
    return found


def _architecture(template: gguf.GGUFReader) -> str:
    return str(template.fields["general.architecture"].contents())


def _names(model: PreTrainedModel, template: gguf.GGUFReader) -> dict[str, str]:
    """Map names of parameters to those of the tensors of a GGUF file."""
    architecture, config = _architecture(template), model.config
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if config.model_type not in ARCHITECTURES or architecture not in kinds:
        raise CalrError(
            f"gguf: models of type {config.model_type} cannot be exported; those of type "
            f"{', '.join(sorted(ARCHITECTURES))} can"
        )
    mapped = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".corrective." in name or (name == "lm_head.weight" and _tied(model, tensor)):
            continue
        stem, _, kind = name.rpartition(".")
        there = mapped.get_name(stem)
        if there is None:
            raise CalrError(f"{name}: has no place in a GGUF file of {architecture}")
        found[name] = f"{there}.{kind}"
    return found


def _tied(model: PreTrainedModel, head: Tensor) -> bool:
    embeddings: Any = model.get_input_embeddings()
    return head is embeddings.weight


def _tensors(
    model: PreTrainedModel, template: gguf.GGUFReader
) -> dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]:
    """Return every tensor of the file by its name there, in the order of the template's."""
    architecture, made = _architecture(template), {}
    for name, there in _names(model, template).items():
        module: Any = model.get_submodule(name.rpartition(".")[0])
        tensor = model.state_dict()[name].detach()
        order = _order(model, architecture, name)
        if isinstance(module, QuantizedLinear | QuantizedEmbedding) and name.endswith(".weight"):
            data, kind = _blocks(name, tensor, module.form, _columns(module))
        elif tensor.dim() == 1:
            shift = architecture in SHIFTED and "norm" in name
            data, kind = (tensor.float() + shift).numpy(), gguf.GGMLQuantizationType.F32
        else:
            data, kind = tensor.contiguous().view(torch.uint8).numpy(), NUMBERS[tensor.dtype]
        made[there] = (data if order is None else data[order], kind)
    shapes = {t.name: tuple(reversed(t.shape.tolist())) for t in template.tensors}
    for tensor in template.tensors:
        if tensor.name in COPIED:
            made[tensor.name] = (np.array(tensor.data), tensor.tensor_type)
    for there in made.keys() ^ shapes.keys():
        where = "it" if there in made else "the checkpoint"
        raise CalrError(f"like: is a GGUF file of another model: {there} is not in {where}")
    for there, (data, kind) in made.items():
        bytes_alone = data.dtype == np.uint8
        shape = gguf.quant_shape_from_byte_shape(data.shape, kind) if bytes_alone else data.shape
        if shape != shapes[there]:
            raise CalrError(
                f"like: is a GGUF file of another model: {there} is {list(shapes[there])} there, "
                f"{list(shape)} in the checkpoint"
            )
    return {there: made[there] for there in shapes}


def _columns(module: Any) -> int:
    return int(getattr(module, "in_features", None) or module.embedding_dim)


def _blocks(
    name: str, stored: Tensor, form: Form, columns: int
) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Turn records into blocks of 32 weights: the same integers under the same scales."""
    kind = KINDS.get((form.bits, form.levels))
    if kind is None or columns % GROUP:
        raise CalrError(
            f"{name}: has {form.bits} bits ({form.levels} levels) in rows of {columns}, which no "
            "type of GGUF holds; compress with --target gguf"
        )
    codes, scales = records.unpack(stored, form, columns)
    scales = scales.repeat_interleave(form.scale_group // GROUP, 1)[:, : columns // GROUP]
    codes = codes.view(len(codes), -1, GROUP)
    parts = [scales[..., None].view(torch.uint8)]
    if form.bits == 8:
        parts.append(codes ^ 0x80)  # signed there
    else:
        if form.bits == 5:
            parts.append(torch.from_numpy(np.packbits(codes.numpy() >> 4, -1, bitorder="little")))
        low = codes & 15
        parts.append(low[..., : GROUP // 2] | (low[..., GROUP // 2 :] << 4))
    return torch.cat(parts, -1).flatten(1).numpy(), kind


def _order(model: PreTrainedModel, architecture: str, name: str) -> np.ndarray | None:
    """Return the order of a tensor's rows in the file; None where it is the checkpoint's.

    llama.cpp rotates neighbouring rows of a head of q and k, transformers those half a head apart.
    """
    config: Any = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    layer = name.split(".")[-2]
    if architecture not in ROTATED or layer not in heads:
        return None
    module: Any = model.get_submodule(name.rpartition(".")[0])
    return np.arange(module.out_features).reshape(heads[layer], 2, -1).swapaxes(1, 2).reshape(-1)


def _terms(
    model: PreTrainedModel, template: gguf.GGUFReader
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the corrective paths, lora_a [c, K] and lora_b [N, c], of any ranks."""
    architecture, names = _architecture(template), _names(model, template)
    config: CalrConfig = model.config.quantization_config
    found = {}
    for name, how in config.layers.items():
        if how.get("corrective_rank"):
            path: Any = model.get_submodule(f"{name}.corrective")
            down, up = (f.detach().half().numpy() for f in path.factors(torch.float32))
            order = _order(model, architecture, f"{name}.weight")
            up = np.ascontiguousarray(up if order is None else up[order])
            found[names[f"{name}.weight"]] = down, up
    return found


@contextlib.contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """Write a file under another name and move it into place when it is complete and on disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, file)
        flush(file.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_model(
    file: Path,
    template: gguf.GGUFReader,
    tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]],
) -> None:
    writer = gguf.GGUFWriter(file, _architecture(template))
    copy_fields(writer, template)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    finish(writer)


def copy_fields(writer: gguf.GGUFWriter, template: gguf.GGUFReader) -> None:
    """Copy what a GGUF file says of its model, all but what depends on the types of its tensors."""
    for key, field in template.fields.items():
        kinds = field.types
        if not key.startswith(NOT_COPIED) and len(kinds):
            inner = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kinds[0], inner)


def _write_adapter(
    file: Path, template: gguf.GGUFReader, terms: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    writer = gguf.GGUFWriter(file, _architecture(template))
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)  # llama.cpp then scales by 1, whatever the rank
    for name, (down, up) in terms.items():
        writer.add_tensor(f"{name}.lora_a", down)
        writer.add_tensor(f"{name}.lora_b", up)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write a GGUF file of what was added, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(file: Path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]) -> None:
    """Read a file back and compare: every tensor bit for bit."""
    for found in GGUFReader(file).tensors:
        data, kind = tensors[found.name]
        if found.tensor_type != kind or found.data.tobytes() != data.tobytes():
            raise CalrError(f"{found.name}: is another one when the file is read again")
