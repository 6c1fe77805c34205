"""Rounding of weights on the native kernel.

Callers ask `can_round` first: shapes, types and places are trusted here.
"""

import torch
from torch import Tensor

from calr_kernels import records
from calr_kernels.forms import Form
from calr_kernels.native.loader import TYPES, library, required


def can_round(weight: Tensor) -> bool:
    """Tell whether a weight is one matrix, of a type and in a place that the kernel reads."""
    here = weight.dim() == 2 and weight.device.type == "cpu"
    return here and weight.dtype in TYPES and library() is not None


def search(weight: Tensor, importance: Tensor, tried: list[float], form: Form) -> Tensor:
    """Return the scales [N, groups] float32 of weight [N, K] that err least of those tried.

    importance [K] float32. tried: scales over the one that makes the largest weight the outermost
    level, of both signs.
    """
    weight, importance = weight.contiguous(), importance.contiguous()
    rows, columns = weight.shape
    cells = records.level_cells(form, weight.device)
    ratios = torch.tensor(tried, dtype=torch.float32, device="cpu")
    scales = torch.empty(rows, form.groups(columns), device="cpu")
    required().calr_search(
        weight.data_ptr(),
        importance.data_ptr(),
        cells.data_ptr(),
        float(cells.abs().max()),
        ratios.data_ptr(),
        len(ratios),
        scales.data_ptr(),
        rows,
        columns,
        form.scale_group,
        form.scale_dtype == "bfloat16",
        TYPES[weight.dtype],
        torch.get_num_threads(),
    )
    return scales


def choose(
    rest: Tensor, spread: Tensor, factor: Tensor, cells: tuple[Tensor, Tensor], codes: Tensor
) -> Tensor:
    """Choose the codes [b, N] uint8 of columns rest [b, N] one after another; return their errors.

    spread [b, N]: their scales; factor [b, b]: upper, a part of a larger one. cells: levels and
    codes by cell. errors [b, N]: what rounding lost, over the factor's diagonal.
    """
    errors = torch.empty_like(rest)
    required().calr_choose(
        rest.data_ptr(),
        spread.data_ptr(),
        factor.data_ptr(),
        factor.stride(0),
        cells[0].data_ptr(),
        cells[1].data_ptr(),
        codes.data_ptr(),
        errors.data_ptr(),
        *rest.shape,
        torch.get_num_threads(),
    )
    return errors
