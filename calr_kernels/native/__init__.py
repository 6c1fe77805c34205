"""The native CPU kernel: a shared library with a C interface (csrc/calr.h), bound with ctypes.

Built by setup.py, so that one binary serves every torch. It runs the fastest instruction set that
the machine has; CALR_CPU_ISA (scalar, avx2, avx512, avx512bf16) forces another. Without the library
everything works in plain PyTorch, slower for small batches. When it is used is decided in
`calr_kernels.eligible`.
"""

from calr_kernels.native.decoder import BlockParts, Blocks, attend, rms_norm, rotate
from calr_kernels.native.linears import Binding, Bound, interleave, lowrank_linear
from calr_kernels.native.loader import ISAS, TYPES, library
from calr_kernels.native.panels import pack, packed_bytes, packed_numbers, packs, unpack
from calr_kernels.native.quantized import dequantize, quantized_linear, scale_gradients

__all__ = [
    "ISAS",
    "TYPES",
    "Binding",
    "BlockParts",
    "Blocks",
    "Bound",
    "attend",
    "dequantize",
    "interleave",
    "library",
    "lowrank_linear",
    "pack",
    "packed_bytes",
    "packed_numbers",
    "packs",
    "quantized_linear",
    "rms_norm",
    "rotate",
    "scale_gradients",
    "unpack",
]
