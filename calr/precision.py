"""Where a model may run in 16-bit products."""

import contextlib

import torch
from transformers import PreTrainedModel


def mixed(model: PreTrainedModel) -> contextlib.AbstractContextManager[object]:
    """Autocast to bfloat16 where the machine multiplies it faster, or the model is 16-bit."""
    able = torch.cpu.get_capabilities()
    fast = model.device.type == "cuda" or able.get("amx_bf16") or able.get("avx512_bf16")
    narrow = model.get_input_embeddings().weight.dtype != torch.float32
    return torch.autocast(model.device.type, torch.bfloat16, enabled=bool(fast or narrow))
