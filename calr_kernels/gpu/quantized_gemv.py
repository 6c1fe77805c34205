"""Few rows times a quantised matrix, and the corrective path beside it, in one pass.

y[m, n] = Σ_g scale[n, g] Σ_{k in g} level[n, k] x[m, k] (+ Σ_c up[c, n] t[m, c]) (+ bias[n]), in
float32.
"""

import triton
import triton.language as tl
from torch import Tensor

from calr_kernels.gpu.kept import settle
from calr_kernels.gpu.launch import arch_of, on, options, unit
from calr_kernels.gpu.packing import WORDS, Packed
from calr_kernels.gpu.parts import LEVELS, levels_of, look_up, looks_up, rounded, wait

MOST_ROWS = 4  # of x: each takes a sum in registers of its own
BLOCK_N, RANKS = 4, 16  # rows of w, and terms of the corrective path at a time
MOST_HELD = {4: 2, 8: 3, 16: 0}  # rows of x up to which a thread holds 8 words, by their fields


@triton.jit(do_not_specialize=["N", "K", "BLOCKS", "RANK", "y_row", "x_row"])
def quantized_gemv(
    x, words, high, scales, t, up, bias, y, N, K, BLOCKS, RANK, x_row, y_row,
    M: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, SPAN: tl.constexpr,
    ASSEMBLY: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_N: tl.constexpr, STEP: tl.constexpr, RANKS: tl.constexpr, WORDS: tl.constexpr,
    FIELDS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """x [M, K] rows; words, high, scales as in `packing`; t [M, RANK], up [RANK, N] -> y [M, N]."""
    K, x_row = K * UNIT, x_row.to(tl.int64) * UNIT
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    blocks, c = tl.arange(0, STEP), tl.arange(0, WORDS)
    inside = (rows < N)[:, None]
    first = rows.to(tl.int64)[:, None] * BLOCKS + blocks[None, :]  # of a row, in blocks
    at = first[:, :, None] * WORDS + c[None, None, :]
    word = tl.load(
        words + at, mask=(inside & (blocks < BLOCKS)[None, :])[:, :, None], other=0,
        eviction_policy="evict_first",
    )  # fmt: skip
    wait(PDL)
    same = tl.zeros((BLOCK_N, STEP, WORDS), dtype=tl.int32)
    sum_0 = same.to(tl.float32)
    sum_1, sum_2, sum_3 = sum_0, sum_0, sum_0
    for begin in range(0, BLOCKS, STEP):
        now = inside & (blocks < BLOCKS - begin)[None, :]
        bits = word
        if BITS != 8 and BITS != 4:
            bits = tl.load(
                high + at + begin * WORDS, mask=now[:, :, None], other=0,
                eviction_policy="evict_first",
            ).to(tl.int32)  # fmt: skip
        looked_up = look_up(word, bits, BITS, ASSEMBLY)
        later = inside & (blocks < BLOCKS - begin - STEP)[None, :]
        ahead = tl.load(
            words + at + (begin + STEP) * WORDS, mask=later[:, :, None], other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        # every row reads x for itself, so that its threads hold the numbers that their weights meet
        ks = ((begin + blocks)[:, None] * (WORDS * FIELDS) + c[None, :])[None, :, :] + same
        for span in tl.static_range(WORDS * FIELDS // SPAN):
            scale = tl.load(
                scales + (first + begin) * (WORDS * FIELDS // SPAN) + span, mask=now, other=0.0
            ).to(tl.float32)[:, :, None]  # fmt: skip
            part_0 = tl.zeros_like(sum_0)
            part_1, part_2, part_3 = part_0, part_0, part_0
            for i in tl.static_range(span * SPAN // WORDS, (span + 1) * SPAN // WORDS):
                levels = levels_of(word, bits, looked_up, i, BITS, LEVELS, ASSEMBLY)
                k = ks + i * WORDS
                here, have = x + k, k < K
                part_0 += levels * tl.load(here, mask=have, other=0.0).to(tl.float32)
                if M > 1:
                    x_1 = tl.load(here + x_row, mask=have, other=0.0).to(tl.float32)
                    part_1 += levels * x_1
                if M > 2:
                    x_2 = tl.load(here + 2 * x_row, mask=have, other=0.0).to(tl.float32)
                    part_2 += levels * x_2
                if M > 3:
                    x_3 = tl.load(here + 3 * x_row, mask=have, other=0.0).to(tl.float32)
                    part_3 += levels * x_3
            sum_0 += part_0 * scale
            if M > 1:
                sum_1 += part_1 * scale
            if M > 2:
                sum_2 += part_2 * scale
            if M > 3:
                sum_3 += part_3 * scale
        word = ahead
    ranks = tl.arange(0, RANKS)
    for m in tl.static_range(M):
        total = sum_0 if m == 0 else sum_1 if m == 1 else sum_2 if m == 2 else sum_3
        value = tl.sum(tl.sum(total, 2), 1)
        for rank in range(0, RANK, RANKS):
            have = ranks < RANK - rank
            factor = tl.load(
                up + (rank + ranks)[None, :] * N + rows[:, None],
                mask=inside & have[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            term = tl.load(t + m * RANK + rank + ranks, mask=have, other=0.0).to(tl.float32)
            value += tl.sum(factor * term[None, :], 1)
        if HAS_BIAS:
            value += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
        value = rounded(value, y.dtype.element_ty, EMULATE_BF16)
        tl.store(y + m * y_row + rows, value, mask=rows < N)


def run_quantized_gemv(
    x: Tensor,
    weight: Packed,
    y: Tensor,
    *,
    t: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    emulate_bf16: bool = False,
) -> None:
    """Launch it: x [M, K] of unit column stride, M up to 4, weight Packed [N, K] -> y [M, N].

    t [M, c] and up [c, N], contiguous: the corrective path's intermediate and second factor.
    """
    (m, k), n = x.shape, weight.words.shape[0]
    size = unit(k, x.stride(0))
    arch = arch_of(x)
    blocks = weight.words.shape[1]
    if arch.overlaps:
        settle(weight.words)
    fields = weight.block // WORDS
    held = 4 if m > MOST_HELD[fields] else 8  # words a thread: registers are for sums, too
    step = min(2 * held, triton.next_power_of_2(blocks))
    warps = max(1, BLOCK_N * step * WORDS // held // arch.warp)
    with on(x):
        quantized_gemv[(triton.cdiv(n, BLOCK_N),)](
            x, weight.words, weight.words if weight.high is None else weight.high, weight.scales,
            y if t is None else t, y if up is None else up, y if bias is None else bias, y,
            n, k // size, blocks, 0 if t is None else t.shape[1], x.stride(0) // size, y.stride(0),
            M=m, BITS=weight.form.bits, LEVELS=LEVELS[weight.form.levels], SPAN=weight.span,
            ASSEMBLY=looks_up(arch, weight.form),
            HAS_BIAS=bias is not None, PDL=arch.overlaps, EMULATE_BF16=emulate_bf16,
            BLOCK_N=BLOCK_N, STEP=step, RANKS=RANKS,
            WORDS=WORDS, FIELDS=fields, UNIT=size,
            **options(warps, overlap=arch.overlaps),
        )  # fmt: skip
