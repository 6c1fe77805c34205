"""One launch for many rows and a small rank: the intermediate never leaves the chip."""

import triton
import triton.language as tl

from calr_kernels.gpu.parts import (
    intermediate,
    second_product,
    store_others,
)


@triton.jit
def on_chip(
    x, down, up, y, bias, pivots,
    M, N, K, rank, x_row, down_row, down_column, up_row, up_column, y_row,
    PIVOTED: tl.constexpr, HAS_BIAS: tl.constexpr, STEPS: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """y = up (down x) (+ bias), many rows, a rank of at most BLOCK_R: t never leaves the chip."""
    K, x_row, down_row, up_row = K * UNIT, x_row * UNIT, down_row * UNIT, up_row * UNIT
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    t = intermediate(
        x, down, y, bias, pivots, rows, ranks, M, K, rank, x_row, down_row, down_column, y_row,
        PIVOTED, HAS_BIAS, EMULATE_BF16, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    for begin in range(0, N, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        acc = second_product(t, up, ranks, columns, rank, N, up_row, up_column)
        store_others(
            acc, y, y_row, bias, pivots, rows, columns, M, N, rank,
            PIVOTED, HAS_BIAS, STEPS, EMULATE_BF16,
        )  # fmt: skip
