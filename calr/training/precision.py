"""Where a model may run in 16-bit products."""

import contextlib

import torch
from transformers import PreTrainedModel


def mixed(model: PreTrainedModel) -> contextlib.AbstractContextManager[object]:
    """Autocast to bfloat16 where `in_sixteen_bits` says so."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=in_sixteen_bits(model))


def in_sixteen_bits(model: PreTrainedModel) -> bool:
    """Tell whether the machine multiplies bfloat16 faster, or the model is 16-bit.

    Of the CPUs, those with AMX do, and AMD's with AVX-512's bfloat16; an Intel CPU without AMX
    multiplies it at half the rate of float32 or less.
    """
    able = torch.cpu.get_capabilities()
    amd = able.get("avx512_bf16") and "Intel" not in str(able.get("cpu_name"))
    fast = model.device.type == "cuda" or able.get("amx_bf16") or amd
    sixteen = model.get_input_embeddings().weight.dtype != torch.float32
    return bool(fast or sixteen)
