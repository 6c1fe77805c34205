"""Second moments: one triangle of xᵀx, mirrored."""

import triton
import triton.language as tl


@triton.jit
def gram(
    x, out, M, K, x_row,
    ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = xᵀ x (+ out), x [M, K] -> [K, K] float32: tiles on and below the diagonal, mirrored."""
    if tl.program_id(1) <= tl.program_id(0):
        lower = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        upper = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        rows = tl.arange(0, BLOCK_M)
        left = x + rows.to(tl.int64)[None, :] * x_row + (lower % K)[:, None]
        right = x + rows.to(tl.int64)[:, None] * x_row + (upper % K)[None, :]
        acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for begin in range(0, M, BLOCK_M):
            inside = rows < M - begin
            a = tl.load(left, mask=inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            left += BLOCK_M * x_row
            right += BLOCK_M * x_row
        # one triangle is stored twice: a tile on the diagonal need not be symmetric to the last bit
        mask = (lower < K)[:, None] & (upper[None, :] <= lower[:, None])
        here = out + lower.to(tl.int64)[:, None] * K + upper[None, :]
        if ADD:
            acc += tl.load(here, mask=mask, other=0.0)
        tl.store(here, acc, mask=mask)
        mirrored = out + upper.to(tl.int64)[None, :] * K + lower[:, None]
        tl.store(mirrored, acc, mask=mask & (upper[None, :] < lower[:, None]))
