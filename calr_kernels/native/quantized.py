"""Quantised matrices on the native kernel.

Callers ask `calr_kernels.eligible` first: shapes, types and places are trusted here.
"""

from collections.abc import Iterable, MutableMapping
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from calr_kernels.forms import Form
from calr_kernels.native.loader import TYPES, pointer, required

PANEL = 16  # rows
CODES = 64  # levels of the widest code that is looked up
_PANELS: MutableMapping[Tensor, tuple[object, Tensor]] = WeakIdKeyDictionary()


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


def dequantize(records: Tensor, form: Form, columns: int, dtype: torch.dtype) -> Tensor:
    """Compute `calr_kernels.records.dequantize` of eligible records: the same bits."""
    y = torch.empty(records.shape[0], columns, dtype=dtype)
    required().calr_dequantize(
        records.data_ptr(),
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


def packed(records: Tensor, form: Form, columns: int) -> Tensor:
    """Return records [N, groups, record] in panels of 16 rows, as the kernel reads them fastest.

    The same bytes, but that rows are padded to whole panels (csrc/panels.inl has the order). Made
    once for as long as the records live unchanged: whoever needs them shares them.
    """
    if records.is_inference():  # nobody counts who writes to it
        return _pack(records, form, columns)
    state = records.data_ptr(), records._version, form
    held = _PANELS.get(records)
    if held is None or held[0] != state:
        held = _PANELS[records] = (state, _pack(records, form, columns))
    return held[1]


def packed_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the memory that the panels of some records take, beside the records."""
    held = (_PANELS.get(tensor) for tensor in tensors)
    return sum(found[1].nbytes for found in held if found is not None)


def _pack(records: Tensor, form: Form, columns: int) -> Tensor:
    rows, groups, record = form.shape(records.shape[0], columns)
    panels = torch.empty(-(-rows // PANEL), groups, PANEL * record, dtype=torch.uint8)
    required().calr_pack(
        records.data_ptr(),
        panels.data_ptr(),
        rows,
        columns,
        form.scale_group,
        form.bits,
        torch.get_num_threads(),
    )
    return panels


@cache
def table(form: Form) -> Tensor:
    """Return the levels by code, int8 [64], for codes that are looked up."""
    values = form.values[:CODES] if form.bits < 8 else ()
    return torch.tensor([*values, *[0] * (CODES - len(values))], dtype=torch.int8)
