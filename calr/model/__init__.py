"""The model to compress: loading it, what it is made of, running it block by block, changing it."""

from calr.model.absent import Absent, absent, present, read_when_called, resident
from calr.model.attention import fast_attention
from calr.model.blocks import BlockRunner, behind_blocks, checkpointing
from calr.model.files import GGUFReader
from calr.model.loading import (
    GGUF_DTYPE,
    gguf_files,
    is_compressed,
    load,
    load_skeleton,
    on_grid,
    resolve_dtype,
)
from calr.model.lowrank import balance, low_rank, pack, pivot, two_factor
from calr.model.matrices import Matrix, matrices
from calr.model.quantized import parameter_count, quantize, tensor_bytes, weight_of
from calr.model.readback import require_same
from calr.model.rotation import rotate
from calr.model.saving import saver
from calr.model.structure import (
    Layer,
    Structure,
    analyse,
    check_vocabulary,
    check_window,
    decoder,
    find_blocks,
)
from calr.model.support import require_supported
from calr.model.swapping import Swapped, evaluating, hooked, requiring, set_submodule
from calr.model.weights import check_finite, digest, fingerprint, recast, require_finite

__all__ = [
    "GGUF_DTYPE",
    "Absent",
    "BlockRunner",
    "GGUFReader",
    "Layer",
    "Matrix",
    "Structure",
    "Swapped",
    "absent",
    "analyse",
    "balance",
    "behind_blocks",
    "check_finite",
    "check_vocabulary",
    "check_window",
    "checkpointing",
    "decoder",
    "digest",
    "evaluating",
    "fast_attention",
    "find_blocks",
    "fingerprint",
    "gguf_files",
    "hooked",
    "is_compressed",
    "load",
    "load_skeleton",
    "low_rank",
    "matrices",
    "on_grid",
    "pack",
    "parameter_count",
    "pivot",
    "present",
    "quantize",
    "read_when_called",
    "recast",
    "require_finite",
    "require_same",
    "require_supported",
    "requiring",
    "resident",
    "resolve_dtype",
    "rotate",
    "saver",
    "set_submodule",
    "tensor_bytes",
    "two_factor",
    "weight_of",
]
