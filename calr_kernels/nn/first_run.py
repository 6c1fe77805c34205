"""What the first run of a layer does once: compiling, packing."""

from collections.abc import Iterable

import torch
from torch import nn

from calr_kernels.nn.lowrank import LowRankLinear
from calr_kernels.nn.quantized import QuantizedLinear


@torch.no_grad()
def warmup(model: nn.Module, rows: Iterable[int] = (1,), dtype: torch.dtype | None = None) -> None:
    """Run every low-rank and quantised layer of a model once with each number of rows of input.

    What the first run compiles and packs is done then, as the capture of a CUDA graph needs it.
    dtype: of the inputs, by default that of the model's floating parameters.
    """
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = dtype or next(floating, torch.get_default_dtype())
    for layer in model.modules():
        if isinstance(layer, LowRankLinear | QuantizedLinear):
            for count in rows:
                layer(
                    torch.zeros(count, layer.in_features, dtype=dtype, device=layer.weight.device)
                )
