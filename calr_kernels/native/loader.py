"""Load the native library and declare its functions, those of csrc/calr.h."""

import ctypes
import importlib.util
import os
import warnings
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

ISAS = ("scalar", "avx2", "avx512", "avx512bf16")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # codes of csrc/types.h

_POINTER: Any = ctypes.c_void_p
_SIZE: Any = ctypes.c_int64
_CODE: Any = ctypes.c_int32
_FLOAT: Any = ctypes.c_float
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # what they return and take
    "calr_isa": (_CODE, []),
    "calr_select_isa": (_CODE, [_CODE]),
    "calr_complement": (_CODE, [_POINTER] * 2 + [_SIZE] * 2),
    "calr_lowrank_linear": (_CODE, [_POINTER] * 8 + [_SIZE] * 5 + [_CODE] * 3),
    "calr_linears": (None, [_POINTER, _POINTER, _SIZE, _POINTER] + [_SIZE] * 2 + [_CODE] * 2),
    "calr_gated": (None, [_POINTER] * 3 + [_SIZE] * 2 + [_CODE] * 3),
    "calr_decode": (
        None,
        [
            *[_POINTER] * 3,
            _SIZE,
            *[_POINTER] * 5,
            _CODE,
            _POINTER,
            *[_SIZE] * 2,
            *[_CODE] * 2,
        ],
    ),
    "calr_interleave": (_CODE, [_POINTER] * 4 + [_SIZE] * 3 + [_CODE] * 2),
    "calr_rms_norm": (None, [_POINTER] * 3 + [_SIZE] * 2 + [_FLOAT] + [_CODE] * 2),
    "calr_rotate": (None, [_POINTER] * 3 + [_SIZE] * 4 + [_CODE]),
    "calr_quantized_linear": (None, [_POINTER] * 5 + [_SIZE] * 4 + [_CODE] * 3),
    "calr_pack": (None, [_POINTER] * 2 + [_SIZE] * 3 + [_CODE] * 2),
    "calr_dequantize": (None, [_POINTER] * 4 + [_SIZE] * 3 + [_CODE] * 3),
    "calr_scale_gradients": (None, [_POINTER] * 4 + [_SIZE] * 3 + [_CODE] * 3),
    "calr_search": (
        None,
        [*[_POINTER] * 3, _FLOAT, _POINTER, _SIZE, _POINTER, *[_SIZE] * 3, *[_CODE] * 3],
    ),
    "calr_choose": (None, [_POINTER] * 3 + [_SIZE] + [_POINTER] * 4 + [_SIZE] * 2 + [_CODE]),
    "calr_attend": (None, [_POINTER] * 4 + [_SIZE] * 5 + [_FLOAT] + [_CODE] * 2),
}


class Layer(ctypes.Structure):
    """struct calr_layer of csrc/calr.h."""

    _fields_: ClassVar[list[Any]] = [
        *((name, ctypes.c_void_p) for name in ("down", "up", "corrective_down", "corrective_up")),
        *((name, ctypes.c_void_p) for name in ("bias", "pivots", "others", "panels", "table")),
        *((name, ctypes.c_int64) for name in ("n", "r", "c", "group")),
        *((name, ctypes.c_int32) for name in ("bits", "type", "packed", "packed_corrective")),
    ]


class Block(ctypes.Structure):
    """struct calr_block of csrc/calr.h."""

    _fields_: ClassVar[list[Any]] = [
        ("norms", ctypes.c_void_p * 4),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm")),
        ("attention", Layer * 4),
        ("gated", Layer * 3),
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "d", "window")),
        *((name, ctypes.c_int32) for name in ("rotation", "activation", "from_one")),
        *((name, ctypes.c_float) for name in ("epsilon", "scale")),
    ]


class Past(ctypes.Structure):
    """struct calr_past of csrc/calr.h."""

    _fields_: ClassVar[list[Any]] = [
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("capacity", "count", "dropped")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """Load the library, or warn once that it is not there and return None.

    Raises ValueError when CALR_CPU_ISA names an instruction set that this machine lacks.
    """
    spec = importlib.util.find_spec("calr_kernels._cpu")
    try:
        loaded = _load(spec.origin if spec else None)
    except (OSError, AttributeError) as error:  # damaged, of another system, of another version
        warnings.warn(
            "calr_kernels: no native CPU kernel (it needs a C++ compiler at installation; "
            f"{error}); small batches run in plain PyTorch, slower",
            stacklevel=2,
        )
        return None
    best, wanted = loaded.calr_isa(), os.environ.get("CALR_CPU_ISA")
    if wanted is not None and (
        wanted not in ISAS or loaded.calr_select_isa(ISAS.index(wanted)) != 0
    ):
        raise ValueError(
            f"CALR_CPU_ISA={wanted!r}: no instruction set of this machine, which has "
            f"{', '.join(ISAS[: best + 1])}; leave the variable out for the best"
        )
    return loaded


def required() -> ctypes.CDLL:
    """Return the library where `eligible` has said that it is there."""
    loaded = library()
    assert loaded is not None
    return loaded


def pointer(tensor: Tensor | None) -> int | None:
    """Return a tensor's address; None, a null pointer, for none."""
    return None if tensor is None else tensor.data_ptr()


def _load(path: str | None) -> ctypes.CDLL:
    """Open the library and declare its functions; OSError or AttributeError where it has none."""
    if path is None:
        raise OSError("it was not built")
    loaded = ctypes.CDLL(path)
    for name, (returned, taken) in FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = returned, taken
    return loaded
