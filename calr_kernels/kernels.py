"""Triton kernels. What runs when, and with which tiles, is decided in `calr_kernels.tiles`.

K and the row strides of matrices come in units of UNIT elements, 8 where all are multiples of 8:
the compiler sees 16-byte alignment only in factors written out or in multiples of 16. All
accumulate in float32 and reduce in a fixed order: the same input gives the same bits. float32
products are "ieee", never tf32. Where several programs share an output tile they leave partial sums
in global memory, and the last to arrive (it draws a ticket) adds them in index order:
no floating-point atomics, no second kernel (only the tickets are zeroed before), no grid barrier.
"""

import triton
import triton.language as tl

KEEP = tl.constexpr(0)  # store y [M, N] densely
PIVOTS = tl.constexpr(1)  # also put column j into `placed` at column pivots[j]
OTHERS = tl.constexpr(2)  # store column j at the j-th column that is not a pivot


@triton.jit
def _rounded(value, dtype: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """Round float32 to dtype; EMULATE_BF16 rounds to bfloat16, to nearest even, within float32."""
    if EMULATE_BF16:  # the interpreter's own bfloat16 truncates
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _other_columns(pivots, index, rank, STEPS: tl.constexpr):
    """Return the index-th column that is no pivot: index + the number of pivots before it.

    pivots[j] - j others lie before pivot j and never fall with j: binary search, STEPS halvings.
    """
    low = tl.zeros_like(index)
    high = low + rank
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        before = tl.load(pivots + middle, mask=open_, other=0) - middle
        right = open_ & (before <= index)
        low = tl.where(right, middle + 1, low)
        high = tl.where(right | (low >= high), high, middle)
    return index + low


@triton.jit
def _last_to_arrive(ticket, arrivals):
    """Tell whether this program is the last of `arrivals`: what the others stored is visible."""
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    tl.debug_barrier()
    return last


@triton.jit
def _ordered_sum(partial, count, stride, offsets, mask, acc):
    """Add `count` partial tiles, in index order."""
    for part in range(count):
        acc += tl.load(
            partial + part * stride + offsets, mask=mask, other=0.0, cache_modifier=".cg"
        )
    return acc


@triton.jit
def _store(
    value, y, y_row, bias, targets, rows, columns, M, N,
    HAS_BIAS: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Store value (+ bias), rounded, at y[rows, targets], for rows < M and columns < N."""
    if HAS_BIAS:
        value += tl.load(bias + targets, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    at = y + rows.to(tl.int64)[:, None] * y_row + targets[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(at, _rounded(value, y.dtype.element_ty, EMULATE_BF16), mask=mask)


@triton.jit
def _store_others(
    value, y, y_row, bias, pivots, rows, columns, M, N, rank,
    PIVOTED: tl.constexpr, HAS_BIAS: tl.constexpr, STEPS: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Store value (+ bias) in the columns of y that are not pivots; all of them without PIVOTED."""
    targets = columns
    if PIVOTED:
        targets = _other_columns(pivots, columns, rank, STEPS)
    _store(value, y, y_row, bias, targets, rows, columns, M, N, HAS_BIAS, EMULATE_BF16)


@triton.jit
def _store_pivots(
    t, y, y_row, bias, pivots, rows, ranks, M, rank,
    HAS_BIAS: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Store t (+ bias) in the columns of y that are pivots."""
    targets = tl.load(pivots + ranks, mask=ranks < rank, other=0)
    value = t.to(tl.float32)
    _store(value, y, y_row, bias, targets, rows, ranks, M, rank, HAS_BIAS, EMULATE_BF16)


@triton.jit
def _product_tile(
    x, w, rows, columns, M, N, begin, end, x_row, w_row, w_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return x[rows] w[columns]ᵀ [BLOCK_M, BLOCK_N] in float32, over the columns [begin, end) of x.

    Rows and columns outside wrap around: they are read, and never stored.
    """
    ks = begin + tl.arange(0, BLOCK_K)
    x_at = x + (rows % M).to(tl.int64)[:, None] * x_row + ks[None, :]
    w_at = w + (columns % N).to(tl.int64)[None, :] * w_row + ks.to(tl.int64)[:, None] * w_column
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        left = end - k
        inside = tl.arange(0, BLOCK_K) < left
        x_tile = tl.load(x_at, mask=inside[None, :], other=0.0)
        w_tile = tl.load(w_at, mask=inside[:, None], other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K * w_column
    return acc


@triton.jit
def _intermediate(
    x, down, y, bias, pivots, rows, ranks, M, K, rank, x_row, down_row, down_column, y_row,
    PIVOTED: tl.constexpr, HAS_BIAS: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return t = down[ranks] x [BLOCK_M, BLOCK_R] in y's dtype; PIVOTED: also outputs."""
    t = _product_tile(
        x, down, rows, ranks, M, rank, 0, K, x_row, down_row, down_column,
        BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    t = _rounded(tl.where((ranks < rank)[None, :], t, 0.0), y.dtype.element_ty, EMULATE_BF16)
    if PIVOTED:
        _store_pivots(t, y, y_row, bias, pivots, rows, ranks, M, rank, HAS_BIAS, EMULATE_BF16)
    return t


@triton.jit
def _second_product(t, up, ranks, columns, rank, N, up_row, up_column):
    """Return t up[columns, ranks]ᵀ in float32."""
    at = up + columns.to(tl.int64)[None, :] * up_row + ranks.to(tl.int64)[:, None] * up_column
    inside = (ranks < rank)[:, None] & (columns < N)[None, :]
    return tl.dot(t, tl.load(at, mask=inside, other=0.0), input_precision="ieee")


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
    acc = _product_tile(
        x, w, rows, columns, M, N, begin, min(begin + chunk, K), x_row, w_row, w_column,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    finish = True
    if SPLIT > 1:
        offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
        area = M * N
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(partial + split * area + offsets, acc, mask=mask)
        finish = _last_to_arrive(tickets + tile, SPLIT)
        if finish:
            acc = _ordered_sum(partial, SPLIT, area, offsets, mask, tl.zeros_like(acc))
    if finish:
        if PLACE == PIVOTS:
            t = _rounded(acc, y.dtype.element_ty, EMULATE_BF16)
            _store(acc, y, y_row, bias, columns, rows, columns, M, N, False, EMULATE_BF16)
            _store_pivots(
                t, placed, placed_row, bias, pivots, rows, columns, M, N, HAS_BIAS, EMULATE_BF16
            )
        else:
            _store_others(
                acc, y, y_row, bias, pivots, rows, columns, M, N, rank,
                PLACE == OTHERS, HAS_BIAS, STEPS, EMULATE_BF16,
            )  # fmt: skip


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
    t = _intermediate(
        x, down, y, bias, pivots, rows, ranks, M, K, rank, x_row, down_row, down_column, y_row,
        PIVOTED, HAS_BIAS, EMULATE_BF16, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_N)
    area = M * N
    for turn in range(tiles):
        tile = (turn + slice_) % tiles  # programs start at different tiles: few meet at a ticket
        columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = _second_product(t, up, ranks, columns, rank, N, up_row, up_column)
        offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(partial + slice_ * area + offsets, acc, mask=mask)
        if _last_to_arrive(tickets + tile, slices):
            acc = _ordered_sum(partial, slices, area, offsets, mask, tl.zeros_like(acc))
            _store_others(
                acc, y, y_row, bias, pivots, rows, columns, M, N, rank,
                PIVOTED, HAS_BIAS, STEPS, EMULATE_BF16,
            )  # fmt: skip


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
    t = _intermediate(
        x, down, y, bias, pivots, rows, ranks, M, K, rank, x_row, down_row, down_column, y_row,
        PIVOTED, HAS_BIAS, EMULATE_BF16, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    for begin in range(0, N, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        acc = _second_product(t, up, ranks, columns, rank, N, up_row, up_column)
        _store_others(
            acc, y, y_row, bias, pivots, rows, columns, M, N, rank,
            PIVOTED, HAS_BIAS, STEPS, EMULATE_BF16,
        )  # fmt: skip


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
        mask = (lower < K)[:, None] & (upper < K)[None, :]
        here = out + lower.to(tl.int64)[:, None] * K + upper[None, :]
        if ADD:
            acc += tl.load(here, mask=mask, other=0.0)
        tl.store(here, acc, mask=mask)
        if tl.program_id(1) < tl.program_id(0):
            mirrored = out + upper.to(tl.int64)[None, :] * K + lower[:, None]
            tl.store(mirrored, acc, mask=mask)
