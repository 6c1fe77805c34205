"""Compressed models for programs that do not know calr: dense checkpoints, compressed-tensors'
and PEFT's, GGUF files."""

from calr.export.compressed_tensors import export_compressed_tensors
from calr.export.dense import export_dense
from calr.export.gguf import export_gguf

__all__ = ["export_compressed_tensors", "export_dense", "export_gguf"]
