"""One launch for few rows, split over the rank: both factors read once, partial sums in between."""

import triton
import triton.language as tl

from calr_kernels.gpu.parts import (
    intermediate,
    last_to_arrive,
    ordered_sum,
    second_product,
    store_others,
)


@triton.jit
def rank_split(
    x, down, up, y, bias, pivots, partial, tickets,
    M, N, K, rank, x_row, down_row, down_column, up_row, up_column, y_row,
    PIVOTED: tl.constexpr, HAS_BIAS: tl.constexpr, STEPS: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """y = up (down x) (+ bias) for few rows in one launch: a program owns BLOCK_R of the rank.

    It computes its slice of t = down x over all of K, multiplies it with its columns of up [N, r]
    tile by tile and leaves partial sums [slices, M, N]; the last to finish a tile adds them. Every
    factor byte is read once. A corrective path is more rank, so more slices.
    """
    K, x_row, down_row, up_row = K * UNIT, x_row * UNIT, down_row * UNIT, up_row * UNIT
    slice_, slices = tl.program_id(0), tl.num_programs(0)
    rows = tl.arange(0, BLOCK_M)
    ranks = slice_ * BLOCK_R + tl.arange(0, BLOCK_R)
    t = intermediate(
        x, down, y, bias, pivots, rows, ranks, M, K, rank, x_row, down_row, down_column, y_row,
        PIVOTED, HAS_BIAS, EMULATE_BF16, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_N)
    area = M * N
    for turn in range(tiles):
        tile = (turn + slice_) % tiles  # programs start at different tiles: few meet at a ticket
        columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = second_product(t, up, ranks, columns, rank, N, up_row, up_column)
        offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(partial + slice_ * area + offsets, acc, mask=mask)
        if last_to_arrive(tickets + tile, slices):
            acc = ordered_sum(partial, slices, area, offsets, mask, tl.zeros_like(acc))
            store_others(
                acc, y, y_row, bias, pivots, rows, columns, M, N, rank,
                PIVOTED, HAS_BIAS, STEPS, EMULATE_BF16,
            )  # fmt: skip
