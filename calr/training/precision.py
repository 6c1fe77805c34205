"""Where a model may run in 16-bit products."""

import contextlib

import torch
from transformers import PreTrainedModel

from calr_kernels.eligible import cpu_multiplies_bfloat16


def mixed(model: PreTrainedModel) -> contextlib.AbstractContextManager[object]:
    """Autocast to bfloat16 where `in_sixteen_bits` says so."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=in_sixteen_bits(model))


def in_sixteen_bits(model: PreTrainedModel) -> bool:
    """Tell whether the machine multiplies bfloat16 faster, or the model is 16-bit."""
    fast = model.device.type == "cuda" or cpu_multiplies_bfloat16()
    return fast or bool(model.get_input_embeddings().weight.dtype != torch.float32)
