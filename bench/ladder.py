"""llama.cpp's own quantisations of a model, as files: what a user of it would take."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from calr.export.gguf import copy_fields, finish

RUNGS = (
    "Q2_K", "Q3_K_M", "IQ4_XS", "Q4_0", "IQ4_NL", "Q4_K_M", "Q5_0", "Q5_K_M", "Q6_K", "Q8_0"
)  # fmt: skip
EMBEDDINGS = {None: None, "Q8_0": 8, "Q4_0": 2}  # token_embedding_type, as ggml numbers it


def rungs(source: Path, folder: Path, threads: int = 2) -> Iterator[tuple[str, Path]]:
    """Make every rung from a GGUF file's weights, dequantised; yield its name and file.

    Left out are rungs that are another one under its name, and those in which a linear layer has
    the very type that it has in the source: on its own grid it would look better than it is. Raises
    ImportError without llama-cpp-python.
    """
    import llama_cpp

    whole = folder / "F16.gguf"
    if not whole.exists():
        dequantised(source, whole)
    before, seen = kinds(source), []
    for rung in RUNGS:
        for embedding, number in EMBEDDINGS.items():
            name = rung if embedding is None else f"{rung}, embeddings {embedding}"
            file = folder / f"{name.replace(', embeddings ', '-')}.gguf"
            if not file.exists():
                options = llama_cpp.llama_model_quantize_default_params()
                options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{rung}")
                options.nthread, options.allow_requantize = threads, True
                if number is not None:
                    options.token_embedding_type = options.output_tensor_type = number
                paths = (str(path).encode() for path in (whole, file))
                if llama_cpp.llama_model_quantize(*paths, ctypes.byref(options)):
                    raise RuntimeError(f"llama.cpp could not make {name}")
            found = kinds(file)
            linear = [name for name in found if ".attn_" in name or ".ffn_" in name]
            on_grid = any(found[n] == before[n] and "norm" not in n for n in linear)
            if on_grid or found in seen:
                continue
            seen.append(found)
            yield name, file


def kinds(file: Path) -> dict[str, gguf.GGMLQuantizationType]:
    """Return the type of every tensor of a GGUF file."""
    return {t.name: t.tensor_type for t in gguf.GGUFReader(file).tensors}


def tensor_bytes(file: Path) -> int:
    """Count the bytes of a GGUF file's tensors."""
    return sum(int(t.n_bytes) for t in gguf.GGUFReader(file).tensors)


def dequantised(source: Path, file: Path) -> None:
    """Write a GGUF file again with its matrices in F16 and all else in F32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(file, reader.fields["general.architecture"].contents())
    copy_fields(writer, reader)
    writer.add_file_type(1)
    for tensor in reader.tensors:
        data = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, data.astype(np.float16 if data.ndim == 2 else np.float32))
    finish(writer)
