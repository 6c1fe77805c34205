"""Second moments: one triangle of xᵀ x, mirrored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calr_kernels.gpu.launch import arch_of, on, options


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


def run_gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute xᵀ x (+ out) in float32: x [M, K] -> [K, K]; adds in place when out is given."""
    arch = arch_of(x)
    x = x if x.stride(-1) == 1 else x.contiguous()
    m, k = x.shape
    result = torch.empty(k, k, dtype=torch.float32, device=x.device) if out is None else out
    # large tiles where there are many
    block = 128 if (k / 128) ** 2 / 2 >= arch.processors and x.itemsize == 2 else 64
    stages = 2 if arch.backend == "hip" else 3
    side = triton.cdiv(k, block)
    with on(x):
        gram[(side, side)](
            x, result, m, k, x.stride(0),
            ADD=out is not None, BLOCK=block, BLOCK_M=64 if x.itemsize == 2 else 32,
            **options(8 if block == 128 else 4, stages),
        )  # fmt: skip
    return result
