"""Few rows times a matrix of numbers: y[m, goal[n]] = Σ w[n, k] x[m, k] (+ bias[goal[n]]).

Bound by reading w: every program owns a few rows of it and has a whole step of theirs in flight
while it works on the step before; the first is asked for before the wait for whoever writes x.
"""

import triton
import triton.language as tl
from torch import Tensor

from calr_kernels.gpu.kept import settle
from calr_kernels.gpu.launch import arch_of, on, options, unit
from calr_kernels.gpu.parts import rounded, wait

MOST_ROWS = 4  # of x: each takes a sum in registers of its own
STEP = {2: (8192, 4096, 2048, 2048), 4: (4096, 2048, 1024, 1024)}  # weights of a program, by M
LEAST, ROWS, WARPS = 512, 4, 4  # columns; rows of w and warps of a program


@triton.jit(do_not_specialize=["N", "K", "y_row", "x_row"])
def gemv(
    x, w, t, y, goal, bias, N, K, x_row, y_row,
    M: tl.constexpr, KEEP: tl.constexpr, PLACE: tl.constexpr, HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """y[m, goal[n]] = w x (+ bias); PLACE: goal is given, else n; KEEP: t[m, n] = w x, too.

    x [M, K] rows, w [N, K], t [M, N], goal [N] int32. Sums in float32, in a fixed order.
    """
    K, x_row = K * UNIT, x_row.to(tl.int64) * UNIT
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    inside = (rows < N)[:, None]
    at = w + rows.to(tl.int64)[:, None] * K + ks[None, :]
    tile = tl.load(at, mask=inside & (ks < K)[None, :], other=0.0, eviction_policy="evict_first")
    goals = rows
    if PLACE:
        goals = tl.load(goal + rows, mask=rows < N, other=0)
    wait(PDL)
    sum_0 = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    sum_1, sum_2, sum_3 = sum_0, sum_0, sum_0
    for begin in range(0, K, BLOCK_K):
        following = begin + BLOCK_K
        ahead = tl.load(
            at + following, mask=inside & (ks < K - following)[None, :], other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
        weights = tile.to(tl.float32)
        here, now = x + begin + ks, ks < K - begin
        sum_0 += weights * tl.load(here, mask=now, other=0.0).to(tl.float32)[None, :]
        if M > 1:
            sum_1 += weights * tl.load(here + x_row, mask=now, other=0.0).to(tl.float32)[None, :]
        if M > 2:
            row = here + 2 * x_row
            sum_2 += weights * tl.load(row, mask=now, other=0.0).to(tl.float32)[None, :]
        if M > 3:
            row = here + 3 * x_row
            sum_3 += weights * tl.load(row, mask=now, other=0.0).to(tl.float32)[None, :]
        tile = ahead
    for m in tl.static_range(M):
        total = sum_0 if m == 0 else sum_1 if m == 1 else sum_2 if m == 2 else sum_3
        value = tl.sum(total, 1)
        if KEEP:
            value = rounded(value, y.dtype.element_ty, EMULATE_BF16)
            tl.store(t + m * N + rows, value, mask=rows < N)
            value = value.to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + goals, mask=rows < N, other=0.0).to(tl.float32)
        value = rounded(value, y.dtype.element_ty, EMULATE_BF16)
        tl.store(y + m * y_row + goals, value, mask=rows < N)


def run_gemv(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    t: Tensor | None = None,
    goal: Tensor | None = None,
    bias: Tensor | None = None,
    emulate_bf16: bool = False,
) -> None:
    """Launch it: x [M, K] of unit column stride, w [N, K] contiguous, M up to 4; writes y, and t.

    y [M, …] of unit column stride, as wide as the goals reach; t [M, N] contiguous.
    """
    (m, k), n = x.shape, w.shape[0]
    height = ROWS if n >= ROWS * arch_of(x).processors else 1  # every processor has work
    most = STEP[w.itemsize][m - 1]
    block = min(most // height, max(LEAST, triton.next_power_of_2(k)))
    warps = max(1, WARPS * block * height // most)  # as many weights a thread, whatever the block
    size = unit(k, x.stride(0))
    overlap = arch_of(x).overlaps
    if overlap:
        settle(w, *(() if goal is None else (goal,)))
    with on(x):
        gemv[(triton.cdiv(n, height),)](
            x, w, y if t is None else t, y, y if goal is None else goal,
            y if bias is None else bias, n, k // size, x.stride(0) // size, y.stride(0),
            M=m, KEEP=t is not None, PLACE=goal is not None, HAS_BIAS=bias is not None,
            PDL=overlap, EMULATE_BF16=emulate_bf16,
            BLOCK_N=height, BLOCK_K=block, UNIT=size,
            **options(warps, overlap=overlap),
        )  # fmt: skip
