"""Records into numbers: ŵ[n, k] = level · scale in float32, rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calr_kernels.forms import PLANES, SCALE_BYTES, Form
from calr_kernels.gpu.launch import on, options
from calr_kernels.gpu.parts import LEVELS, level

BLOCK = 1024
SCALE = tl.constexpr(SCALE_BYTES)


@triton.jit(do_not_specialize=["K", "row"])
def dequantize(
    records, scales, y, K, row,
    BITS: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr, RECORD: tl.constexpr,
    LOW: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """records [N, groups, RECORD] uint8 -> y [N, K]; APART: of scales [N, groups] float32."""
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    group, j = k // GROUP, k % GROUP
    at = records + n * row + group * RECORD
    first: tl.constexpr = GROUP * LOW // 8  # bytes of the plane of the lowest bits
    byte = tl.load(at + SCALE + j % first, mask=inside, other=0).to(tl.int32)
    code = (byte >> (j // first * LOW)) & ((1 << LOW) - 1)
    if BITS > LOW:
        more: tl.constexpr = BITS - LOW
        second: tl.constexpr = GROUP * more // 8
        byte = tl.load(at + SCALE + first + j % second, mask=inside, other=0).to(tl.int32)
        code |= ((byte >> (j // second * more)) & ((1 << more) - 1)) << LOW
    if APART:
        scale = tl.load(scales + n * (row // RECORD) + group, mask=inside, other=0.0)
    else:
        low = tl.load(at, mask=inside, other=0).to(tl.uint16)
        both = low | (tl.load(at + 1, mask=inside, other=0).to(tl.uint16) << 8)
        scale = both.to(tl.float16, bitcast=True).to(tl.float32)
    value = level((code - (1 << (BITS - 1))).to(tl.float32), BITS, LEVELS) * scale
    tl.store(y + n * K + k, value.to(y.dtype.element_ty), mask=inside)


def run_dequantize(
    records: Tensor,
    form: Form,
    columns: int,
    dtype: torch.dtype,
    scales: Tensor | None = None,
) -> Tensor:
    """Launch it: records [N, groups, record] -> numbers [N, columns], as `records.dequantize`."""
    records = records.contiguous()
    rows, groups, record = records.shape
    y = torch.empty(rows, columns, dtype=dtype, device=records.device)
    with on(records):
        dequantize[(rows, triton.cdiv(columns, BLOCK))](
            records, records if scales is None else scales.float().contiguous(), y,
            columns, groups * record,
            BITS=form.bits, LEVELS=LEVELS[form.levels], GROUP=form.scale_group, RECORD=record,
            LOW=PLANES[form.bits][0], APART=scales is not None,
            BLOCK=BLOCK, **options(4),
        )  # fmt: skip
    return y
