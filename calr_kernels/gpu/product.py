"""One phase of a low-rank layer: a product whose columns may go to their pivoted places."""

import triton
import triton.language as tl

from calr_kernels.gpu.parts import (
    last_to_arrive,
    ordered_sum,
    product_tile,
    rounded,
    store,
    store_others,
    store_pivots,
)

KEEP = tl.constexpr(0)  # store y [M, N] densely
PIVOTS = tl.constexpr(1)  # also put column j into `placed` at column pivots[j]
OTHERS = tl.constexpr(2)  # store column j at the j-th column that is not a pivot


@triton.jit
def product(
    x, w, y, placed, bias, pivots, partial, tickets,
    M, N, K, rank, chunk, x_row, w_row, w_column, y_row, placed_row,
    PLACE: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """y = x wᵀ (+ bias): x [M, K] rows, w [N, K] with any strides, one phase of a low-rank layer.

    PLACE KEEP: y [M, N]. PIVOTS: y, and placed[:, pivots[j]] = y[:, j] + bias. OTHERS: column j of
    the product goes to the j-th column of y that is not one of the ascending pivots [rank].
    Axis 1 of the grid splits K into SPLIT chunks; GROUP row tiles share their w tiles in the cache.
    """
    K, x_row, w_row = K * UNIT, x_row * UNIT, w_row * UNIT
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile, split = tl.program_id(0), tl.program_id(1)
    first = tile // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    tile_m = first + tile % (GROUP * tiles_n) % height
    tile_n = tile % (GROUP * tiles_n) // height
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = split * chunk
    acc = product_tile(
        x, w, rows, columns, M, N, begin, min(begin + chunk, K), x_row, w_row, w_column,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    finish = True
    if SPLIT > 1:
        offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
        area = M * N
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(partial + split * area + offsets, acc, mask=mask)
        finish = last_to_arrive(tickets + tile, SPLIT)
        if finish:
            acc = ordered_sum(partial, SPLIT, area, offsets, mask, tl.zeros_like(acc))
    if finish:
        if PLACE == PIVOTS:
            t = rounded(acc, y.dtype.element_ty, EMULATE_BF16)
            store(acc, y, y_row, bias, columns, rows, columns, M, N, False, EMULATE_BF16)
            store_pivots(
                t, placed, placed_row, bias, pivots, rows, columns, M, N, HAS_BIAS, EMULATE_BF16
            )
        else:
            store_others(
                acc, y, y_row, bias, pivots, rows, columns, M, N, rank,
                PLACE == OTHERS, HAS_BIAS, STEPS, EMULATE_BF16,
            )  # fmt: skip
