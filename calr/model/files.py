"""Tensors in files of safetensors and GGUF, each read when it is asked for.

Read, not mapped: pages of mapped files count as the process's memory.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calr.errors import CalrError

PART = 1 << 22  # numbers of a GGUF file that are made at once
SPLIT = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")  # of llama.cpp's splitting


@dataclass(frozen=True)
class InFile:
    """A tensor in a file: its shape, and what reads it; CalrError, then, for a damaged file.

    Of a tensor in a safetensors file read(i) reads the i-th along the first dimension alone.
    """

    shape: tuple[int, ...]
    read: Callable[..., Tensor]


class GGUFReader(gguf.GGUFReader):
    """The library's reader, of a plain array: indexing a mapped one is most of what it takes."""

    @property
    def data(self) -> Any:
        """The bytes of the file, mapped."""
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = np.asarray(mapped)


def in_safetensors(file: Path) -> dict[str, InFile]:
    """List the tensors of a safetensors file; CalrError for a damaged one."""
    with _one_sentence(file), safe_open(file, framework="pt", backend="pread") as opened:
        names = list(opened.keys())
        shapes = [tuple(opened.get_slice(name).get_shape()) for name in names]
    return {
        name: InFile(shape, partial(_stored, file, name))
        for name, shape in zip(names, shapes, strict=True)
    }


def in_gguf(files: list[Path]) -> tuple[str, dict[str, InFile]]:
    """Return the architecture that GGUF files state, and their tensors, read in float32."""
    readers, found = [GGUFReader(file) for file in files], {}
    for file, reader in zip(files, readers, strict=True):
        for tensor in reader.tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            place = int(tensor.data_offset), int(tensor.n_bytes)
            read = partial(_dequantised, file, *place, tensor.tensor_type, shape)
            found[str(tensor.name)] = InFile(shape, read)
    return str(readers[0].fields["general.architecture"].contents()), found


def all_parts(file: Path) -> list[Path]:
    """Return all files of a GGUF model of which one is named: llama.cpp splits large ones.

    Raises CalrError naming one that is missing.
    """
    found = SPLIT.fullmatch(file.name)
    if found is None:
        return [file]
    stem, count = found.groups()
    numbers = range(1, int(count) + 1)
    files = [file.with_name(f"{stem}-{number:05d}-of-{count}.gguf") for number in numbers]
    for part in files:
        if not part.exists():
            raise CalrError(f"{part}: is missing, one of the {int(count)} parts of a GGUF model")
    return files or [file]


def _stored(file: Path, name: str, index: int | None = None) -> Tensor:
    with _one_sentence(file), safe_open(file, framework="pt", backend="pread") as opened:
        if index is None:
            found: Tensor = opened.get_tensor(name)
        else:
            found = opened.get_slice(name)[index]
    return found


def _dequantised(
    file: Path,
    offset: int,
    length: int,
    kind: gguf.GGMLQuantizationType,
    shape: tuple[int, ...],
) -> Tensor:
    """Read a tensor of a GGUF file, some rows at a time: numbers are made in several copies."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row = shape[-1] // block * block_bytes
    found = torch.empty(length // row, shape[-1])
    rows = max(1, PART // shape[-1])
    for start in range(0, len(found), rows):
        count = min(rows, len(found) - start)
        with _one_sentence(file):
            place = offset + start * row
            raw = np.fromfile(file, dtype=np.uint8, count=count * row, offset=place)
            if len(raw) < count * row:
                raise ValueError(f"ends after {place + len(raw)} bytes")
        numbers = gguf.quants.dequantize(raw.reshape(count, row), kind)
        found[start : start + count] = torch.from_numpy(numbers)
    return found.view(shape)


@contextlib.contextmanager
def _one_sentence(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise CalrError(f"{file}: damaged or truncated ({error}); copy it again") from error
