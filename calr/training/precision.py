"""Where a model may run in 16-bit products."""

import contextlib
from typing import Any

import torch
from transformers import PreTrainedModel

from calr_kernels.eligible import cpu_multiplies_bfloat16


def mixed(model: PreTrainedModel) -> contextlib.AbstractContextManager[object]:
    """Autocast to bfloat16 where `in_sixteen_bits` says so."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=in_sixteen_bits(model))


def in_sixteen_bits(model: PreTrainedModel) -> bool:
    """Tell whether the machine multiplies bfloat16 faster, or the model is 16-bit."""
    fast = model.device.type == "cuda" or cpu_multiplies_bfloat16()
    embedding: Any = model.get_input_embeddings()  # while it is trained it has no weight
    dtype = embedding.dtype if hasattr(embedding, "dtype") else embedding.weight.dtype
    return fast or dtype != torch.float32
