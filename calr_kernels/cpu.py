"""The native CPU kernel: binding, and the choice of when it is used.

Built by setup.py as a shared library with a C interface, so that one binary serves every torch. It
runs the fastest instruction set that the machine has; CALR_CPU_ISA (scalar, avx2, avx512) forces
another. Without the library everything works in plain PyTorch, slower for small batches.
"""

import ctypes
import importlib.util
import os
import warnings
from functools import cache

import torch
from torch import Tensor

ISAS = ("scalar", "avx2", "avx512")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PLAIN = (Tensor, torch.nn.Parameter)
MAX_ROWS = 16  # rows of x above which torch's matrix products are faster


@cache
def library() -> ctypes.CDLL | None:
    """Load the kernel, or warn once that it is not there and return None.

    Raises ValueError when CALR_CPU_ISA names an instruction set that this machine lacks.
    """
    spec = importlib.util.find_spec("calr_kernels._cpu")
    if spec is None or spec.origin is None:
        warnings.warn(
            "calr_kernels: no native CPU kernel (it needs a C++ compiler at installation); "
            "small batches run in plain PyTorch, slower",
            stacklevel=2,
        )
        return None
    loaded = ctypes.CDLL(spec.origin)
    pointer, size, code = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.calr_lowrank_linear.argtypes = [pointer] * 6 + [size] * 4 + [code] * 3
    loaded.calr_lowrank_linear.restype = code
    loaded.calr_interleave.argtypes = [pointer] * 4 + [size] * 3 + [code] * 2
    loaded.calr_interleave.restype = code
    wanted = os.environ.get("CALR_CPU_ISA")
    if wanted is not None and (
        wanted not in ISAS or loaded.calr_select_isa(ISAS.index(wanted)) != 0
    ):
        raise ValueError(f"CALR_CPU_ISA={wanted!r}: this machine has {ISAS[: isa() + 1]}")
    return loaded


def isa() -> int:
    """Return the index in ISAS of the instruction set in use."""
    spec = importlib.util.find_spec("calr_kernels._cpu")
    assert spec is not None and spec.origin is not None
    return int(ctypes.CDLL(spec.origin).calr_isa())


def usable(x: Tensor, down: Tensor, up: Tensor) -> bool:
    """Tell whether the kernel computes this: few rows, plain CPU tensors, types that it knows.

    Factors share one type; x has it too, or is float32. Written out, since it runs at every call.
    """
    return (
        down.dtype in TYPES
        and up.dtype is down.dtype
        and (x.dtype is down.dtype or x.dtype is torch.float32)
        and x.is_cpu
        and down.is_cpu
        and up.is_cpu
        and 0 < x.numel() <= MAX_ROWS * x.shape[-1]
        and type(down) in PLAIN
        and type(up) in PLAIN
        and down.is_contiguous()
        and up.is_contiguous()
        and library() is not None
    )


def lowrank_linear(
    x: Tensor, down: Tensor, up: Tensor, pivots: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Compute what `calr_kernels.lowrank_linear` and `pivoted_linear` do, for `usable` tensors.

    Shapes are trusted: the public functions check them. Raises ValueError for pivots that are not
    distinct rows.
    """
    loaded = library()
    assert loaded is not None
    x = x.contiguous()
    k, r = x.shape[-1], down.shape[0]
    n = up.shape[0] + (0 if pivots is None else r)
    y = x.new_empty(*x.shape[:-1], n)
    status = loaded.calr_lowrank_linear(
        x.data_ptr(),
        down.data_ptr(),
        up.data_ptr(),
        None if pivots is None else pivots.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // k,
        k,
        n,
        r,
        TYPES[x.dtype],
        TYPES[down.dtype],
        torch.get_num_threads(),
    )
    if status:
        raise ValueError(f"pivots: must be {r} distinct rows below {n}")
    return y


def interleave(t: Tensor, rest: Tensor, pivots: Tensor) -> Tensor:
    """Put outputs in their places: t [..., r] at pivots [r] int32, rest [..., N - r] at the others.

    Contiguous CPU tensors of a type in TYPES -> [..., N]. Raises ValueError for pivots that are not
    distinct rows. Several times faster than concatenation and index_select.
    """
    loaded = library()
    assert loaded is not None
    r, n = t.shape[-1], t.shape[-1] + rest.shape[-1]
    y = t.new_empty(*t.shape[:-1], n)
    status = loaded.calr_interleave(
        t.data_ptr(),
        rest.data_ptr(),
        pivots.data_ptr(),
        y.data_ptr(),
        t.numel() // r,
        n,
        r,
        t.itemsize,
        torch.get_num_threads(),
    )
    if status:
        raise ValueError(f"pivots: must be {r} distinct rows below {n}")
    return y
