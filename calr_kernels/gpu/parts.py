"""What the Triton kernels share: rounding, places of pivoted outputs, sums, a tile of products.

K and the row strides of matrices come in units of UNIT elements, 8 where all are multiples of 8:
the compiler sees 16-byte alignment only in factors written out or in multiples of 16. All
accumulate in float32 and reduce in a fixed order: the same input gives the same bits. float32
products are "ieee", never tf32. Where several programs share an output tile they leave partial sums
in global memory, and the last to arrive (it draws a ticket) adds them in index order:
no floating-point atomics, no second kernel (only the tickets are zeroed before), no grid barrier.
"""

import triton
import triton.language as tl


@triton.jit
def rounded(value, dtype: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """Round float32 to dtype; EMULATE_BF16 rounds to bfloat16, to nearest even, within float32."""
    if EMULATE_BF16:  # the interpreter's own bfloat16 truncates
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def other_columns(pivots, index, rank, STEPS: tl.constexpr):
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
def last_to_arrive(ticket, arrivals):
    """Tell whether this program is the last of `arrivals`: what the others stored is visible."""
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    tl.debug_barrier()
    return last


@triton.jit
def ordered_sum(partial, count, stride, offsets, mask, acc):
    """Add `count` partial tiles, in index order."""
    for part in range(count):
        acc += tl.load(
            partial + part * stride + offsets, mask=mask, other=0.0, cache_modifier=".cg"
        )
    return acc


@triton.jit
def store(
    value, y, y_row, bias, targets, rows, columns, M, N,
    HAS_BIAS: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Store value (+ bias), rounded, at y[rows, targets], for rows < M and columns < N."""
    if HAS_BIAS:
        value += tl.load(bias + targets, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    at = y + rows.to(tl.int64)[:, None] * y_row + targets[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(at, rounded(value, y.dtype.element_ty, EMULATE_BF16), mask=mask)


@triton.jit
def store_others(
    value, y, y_row, bias, pivots, rows, columns, M, N, rank,
    PIVOTED: tl.constexpr, HAS_BIAS: tl.constexpr, STEPS: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Store value (+ bias) in the columns of y that are not pivots; all of them without PIVOTED."""
    targets = columns
    if PIVOTED:
        targets = other_columns(pivots, columns, rank, STEPS)
    store(value, y, y_row, bias, targets, rows, columns, M, N, HAS_BIAS, EMULATE_BF16)


@triton.jit
def store_pivots(
    t, y, y_row, bias, pivots, rows, ranks, M, rank,
    HAS_BIAS: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Store t (+ bias) in the columns of y that are pivots."""
    targets = tl.load(pivots + ranks, mask=ranks < rank, other=0)
    value = t.to(tl.float32)
    store(value, y, y_row, bias, targets, rows, ranks, M, rank, HAS_BIAS, EMULATE_BF16)


@triton.jit
def product_tile(
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
def intermediate(
    x, down, y, bias, pivots, rows, ranks, M, K, rank, x_row, down_row, down_column, y_row,
    PIVOTED: tl.constexpr, HAS_BIAS: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return t = down[ranks] x [BLOCK_M, BLOCK_R] in y's dtype; PIVOTED: also outputs."""
    t = product_tile(
        x, down, rows, ranks, M, rank, 0, K, x_row, down_row, down_column,
        BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    t = rounded(tl.where((ranks < rank)[None, :], t, 0.0), y.dtype.element_ty, EMULATE_BF16)
    if PIVOTED:
        store_pivots(t, y, y_row, bias, pivots, rows, ranks, M, rank, HAS_BIAS, EMULATE_BF16)
    return t


@triton.jit
def second_product(t, up, ranks, columns, rank, N, up_row, up_column):
    """Return t up[columns, ranks]ᵀ in float32."""
    at = up + columns.to(tl.int64)[None, :] * up_row + ranks.to(tl.int64)[:, None] * up_column
    inside = (ranks < rank)[:, None] & (columns < N)[None, :]
    return tl.dot(t, tl.load(at, mask=inside, other=0.0), input_precision="ieee")
