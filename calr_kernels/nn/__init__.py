"""The modules that stand in the place of a compressed model's own."""

from calr_kernels.nn.corrective import Corrective
from calr_kernels.nn.first_run import warmup
from calr_kernels.nn.lowrank import LowRankLinear
from calr_kernels.nn.quantized import QuantizedEmbedding, QuantizedLinear

__all__ = ["Corrective", "LowRankLinear", "QuantizedEmbedding", "QuantizedLinear", "warmup"]
