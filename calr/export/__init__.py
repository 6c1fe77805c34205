"""Compressed models for programs that do not know calr: dense checkpoints, GGUF files."""

from calr.export.dense import export_dense
from calr.export.gguf import export_gguf

__all__ = ["export_dense", "export_gguf"]
