"""Tensors in files of safetensors and GGUF, each read when it is asked for.

Read, not mapped: pages of mapped files count as the process's memory.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from calr.errors import CalrError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LONGEST_HEADER = 100_000_000  # bytes, of a safetensors file


class InFile:
    """A tensor in a file: its shape, and what reads it."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[], Tensor]) -> None:
        self.shape, self.read = shape, read


def in_safetensors(file: Path) -> dict[str, InFile]:
    """List the tensors of a safetensors file; CalrError for a damaged one.

    Format: eight bytes with the header's length, the header in JSON, the numbers.
    """
    size = file.stat().st_size
    try:
        length = int.from_bytes(_bytes(file, 0, 8).tobytes(), "little")
        if length > min(size - 8, LONGEST_HEADER):
            raise ValueError("its header is longer than the file")
        header = json.loads(_bytes(file, 8, length).tobytes())
        header.pop("__metadata__", None)
        found = {}
        for name, tensor in header.items():
            start, end = tensor["data_offsets"]
            shape, dtype = tuple(tensor["shape"]), DTYPES[tensor["dtype"]]
            if end - start != dtype.itemsize * int(np.prod(shape)) or 8 + length + end > size:
                raise ValueError(f"{name} does not fit in it")
            read = partial(_numbers, file, 8 + length + start, end - start, dtype, shape)
            found[name] = InFile(shape, read)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalrError(f"{file}: damaged or truncated ({error}); copy it again") from error
    return found


def in_gguf(file: Path) -> tuple[str, dict[str, InFile]]:
    """Return a GGUF file's architecture, and its tensors, in float32 when they are read."""
    reader, found = gguf.GGUFReader(file), {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        read = partial(
            _dequantised,
            file,
            int(tensor.data_offset),
            int(tensor.n_bytes),
            tensor.tensor_type,
            shape,
        )
        found[str(tensor.name)] = InFile(shape, read)
    return str(reader.fields["general.architecture"].contents()), found


def _numbers(
    file: Path, offset: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    raw = torch.from_numpy(_bytes(file, offset, length))
    return (raw.view(dtype) if length else raw.to(dtype)).view(shape)


def _dequantised(
    file: Path,
    offset: int,
    length: int,
    kind: gguf.GGMLQuantizationType,
    shape: tuple[int, ...],
) -> Tensor:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = _bytes(file, offset, length).reshape(-1, shape[-1] // block * block_bytes)
    numbers: np.ndarray = gguf.quants.dequantize(raw, kind)
    return torch.from_numpy(numbers.astype(np.float32, copy=False)).view(shape)


def _bytes(file: Path, offset: int, length: int) -> np.ndarray:
    """Read bytes; OSError where there are fewer."""
    found = np.empty(length, dtype=np.uint8)
    with file.open("rb", buffering=0) as opened:
        done, view = 0, found.data
        while done < length:
            count = os.preadv(opened.fileno(), [view[done:]], offset + done)
            if not count:
                raise OSError(f"ends after {offset + done} bytes")
            done += count
    return found
