"""Quantised matrices on the native kernel.

Callers ask `calr_kernels.eligible` first: shapes, types and places are trusted here.
"""

from functools import cache

import torch
from torch import Tensor

from calr_kernels.forms import Form
from calr_kernels.native.loader import TYPES, pointer, required

CODES = 64  # levels of the widest code that is looked up


def quantized_linear(x: Tensor, weight: Tensor, form: Form, bias: Tensor | None) -> Tensor:
    """Compute `calr_kernels.quantized_linear` of eligible tensors."""
    x, k, n = x.contiguous(), x.shape[-1], weight.shape[0]
    y = x.new_empty(*x.shape[:-1], n)
    required().calr_quantized_linear(
        x.data_ptr(),
        weight.data_ptr(),
        table(form).data_ptr(),
        pointer(bias),
        y.data_ptr(),
        x.numel() // k,
        k,
        n,
        form.scale_group,
        form.bits,
        TYPES[x.dtype],
        torch.get_num_threads(),
    )
    return y


def dequantize(
    records: Tensor, form: Form, columns: int, dtype: torch.dtype, scales: Tensor | None
) -> Tensor:
    """Compute `calr_kernels.records.dequantize` of eligible records: the same bits."""
    y = torch.empty(records.shape[0], columns, dtype=dtype, device="cpu")
    scales = None if scales is None else scales.float().contiguous()
    required().calr_dequantize(
        records.data_ptr(),
        pointer(scales),
        table(form).data_ptr(),
        y.data_ptr(),
        records.shape[0],
        columns,
        form.scale_group,
        form.bits,
        TYPES[dtype],
        torch.get_num_threads(),
    )
    return y


def scale_gradients(records: Tensor, gradients: Tensor, form: Form) -> Tensor:
    """Compute `calr_kernels.records.scale_gradients` of eligible records."""
    gradients = gradients.contiguous()
    sums = torch.empty(records.shape[:2], dtype=torch.float32, device="cpu")
    required().calr_scale_gradients(
        records.data_ptr(),
        table(form).data_ptr(),
        gradients.data_ptr(),
        sums.data_ptr(),
        *gradients.shape,
        form.scale_group,
        form.bits,
        TYPES[gradients.dtype],
        torch.get_num_threads(),
    )
    return sums


@cache
def table(form: Form) -> Tensor:
    """Return the levels by code, int8 [64], for codes that are looked up."""
    values = form.values[:CODES] if form.bits < 8 else ()
    padded = [*values, *[0] * (CODES - len(values))]
    return torch.tensor(padded, dtype=torch.int8, device="cpu")
