"""Quantised matrices as bytes: scale groups packed into records, and back into numbers.

A record is a scale group: its scale in float16, little-endian, then its integers q + 2^(bits-1) in
planes of 8, 4, 2 and 1 bits, the lowest bits first. In a plane of b bits, byte i of S = group · b/8
holds, from its lowest bits up, those of the weights i, i + S, i + 2S and so on.
"""

import torch
from torch import Tensor

from calr_kernels.forms import PLANES, SCALE_BYTES, Form

FIRST = 256  # cells of a half below 0: levels are int8


def pack(codes: Tensor, scales: Tensor, form: Form) -> Tensor:
    """Pack codes [N, K] uint8, which are q + 2^(bits-1), and scales [N, groups], of any float type.

    -> records [N, groups, record] uint8. What pads a last group is the level nearest to 0.
    Raises ValueError for codes beyond the form's bits and for scales that float16 does not hold.
    """
    rows, columns = codes.shape
    stored = storable(scales, form)
    if not bool(torch.isfinite(stored).all()):
        raise ValueError("scales: not finite in float16")
    if codes.numel() and int(codes.max()) >> form.bits:
        raise ValueError(f"codes: {int(codes.max())} has more than {form.bits} bits")
    padding = form.groups(columns) * form.scale_group - columns
    codes = torch.nn.functional.pad(codes, (0, padding), value=_zero(form))
    codes = codes.view(rows, form.groups(columns), form.scale_group)
    parts, shift = [stored[..., None].view(torch.uint8)], 0
    for bits in PLANES[form.bits]:
        per = 8 // bits
        plane = ((codes >> shift) & ((1 << bits) - 1)).view(
            *codes.shape[:2], per, form.scale_group // per
        )
        packed = plane[:, :, 0].clone()
        for j in range(1, per):
            packed |= plane[:, :, j] << (j * bits)
        parts.append(packed)
        shift += bits
    return torch.cat(parts, -1)


def storable(scales: Tensor, form: Form) -> Tensor:
    """Round scales to the nearest that a form stores, float16."""
    found = scales.to(torch.float16)
    return found.bfloat16().half() if form.scale_dtype == "bfloat16" else found


def unpack(records: Tensor, form: Form, columns: int) -> tuple[Tensor, Tensor]:
    """Return codes [N, columns] uint8 and scales [N, groups] float16 of records."""
    return _codes(records, form).flatten(1)[:, :columns], scales_of(records)


def dequantize(
    records: Tensor, form: Form, columns: int, dtype: torch.dtype, scales: Tensor | None = None
) -> Tensor:
    """Return the weights [N, columns]: level · scale in float32, rounded once to a dtype.

    For float64 they are the float32 ones. scales [N, groups]: in place of the records' own.
    """
    scales = scales_of(records) if scales is None else scales
    weights = (_levels(records, form) * scales.float()[..., None]).flatten(1)
    return weights[:, :columns].to(dtype)


def scale_gradients(records: Tensor, gradients: Tensor, form: Form) -> Tensor:
    """Return a loss's gradient at scales [N, groups], float32, from that at weights [N, K]."""
    padding = records.shape[1] * form.scale_group - gradients.shape[1]
    padded = torch.nn.functional.pad(gradients.float(), (0, padding))
    return (padded.view(*records.shape[:2], form.scale_group) * _levels(records, form)).sum(-1)


def scales_of(records: Tensor) -> Tensor:
    """Return the scales [N, groups] float16 of records."""
    return records[..., :SCALE_BYTES].contiguous().view(torch.float16)[..., 0]


def rescaled(records: Tensor, scales: Tensor) -> Tensor:
    """Return records with other scales [N, groups] float16."""
    bytes_of = scales.contiguous()[..., None].view(torch.uint8)
    return torch.cat([bytes_of, records[..., SCALE_BYTES:]], -1)


def check(records: Tensor, form: Form, rows: int, columns: int) -> None:
    """Raise ValueError for records that no matrix [rows, columns] of a form has.

    Another dtype or shape, a scale that is not finite or not of the form, a padded place that is
    not the level nearest to 0.
    """
    wanted = form.shape(rows, columns)
    if records.dtype != torch.uint8 or tuple(records.shape) != wanted:
        raise ValueError(
            f"{list(records.shape)} {records.dtype}: must be {list(wanted)} torch.uint8"
        )
    scales = scales_of(records)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("a scale is NaN or infinity")
    if bool((storable(scales, form) != scales).any()):
        raise ValueError(f"a scale is no number of {form.scale_dtype}")
    padding = form.groups(columns) * form.scale_group - columns
    if padding and bool((_codes(records[:, -1:], form)[..., -padding:] != _zero(form)).any()):
        raise ValueError("bits are set that pad a scale group")


def nearest(ratios: Tensor, cells: Tensor) -> Tensor:
    """Look up what stands for the level nearest to each of ratios, weights over scales, float32.

    cells: of the codes, or of the levels themselves (`code_cells`, `level_cells`).
    """
    return cells[(ratios * 2 + FIRST).clamp_(0, len(cells) - 1).int()]


def code_cells(form: Form, device: torch.device) -> Tensor:
    """Return the code, uint8, of the level nearest to every number of a cell: levels are whole
    numbers, so that what lies between two of them changes only at multiples of a half."""
    values = torch.tensor(form.values, dtype=torch.float32)
    middles = (torch.arange(2 * FIRST) - FIRST + 0.5) / 2
    codes = torch.bucketize(middles, (values[1:] + values[:-1]) / 2)
    return codes.to(device, torch.uint8)


def level_cells(form: Form, device: torch.device) -> Tensor:
    """Return the level, float32, nearest to every number of a cell."""
    values = torch.tensor(form.values, dtype=torch.float32, device=device)
    return values[code_cells(form, device).int()]


def _zero(form: Form) -> int:
    """Return the code of the level nearest to 0."""
    return min(range(len(form.values)), key=lambda code: abs(form.values[code]))


def _levels(records: Tensor, form: Form) -> Tensor:
    """Return levels [N, groups, scale_group] float32, padding included."""
    values = torch.tensor(form.values, dtype=torch.float32, device=records.device)
    return values[_codes(records, form).int()]


def _codes(records: Tensor, form: Form) -> Tensor:
    """Return codes [N, groups, scale_group] uint8, padding included."""
    start, shift = SCALE_BYTES, 0
    codes: Tensor | None = None
    for bits in PLANES[form.bits]:
        size = form.scale_group * bits // 8
        packed = records[..., start : start + size]
        mask = (1 << bits) - 1
        plane = torch.cat([(packed >> (j * bits)) & mask for j in range(8 // bits)], -1)
        codes = plane if codes is None else codes | (plane << shift)
        start, shift = start + size, shift + bits
    assert codes is not None
    return codes
