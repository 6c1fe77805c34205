"""A quantised matrix times up to 64 rows on the matrix units, weights made numbers in registers.

y[m, n] = Σ_k ŵ[n, k] x[m, k] (+ Σ_c up[c, n] t[m, c]) (+ bias[n]), ŵ = level · scale rounded once
to x's type. Programs share the columns: each leaves partial sums, and a second launch adds them in
order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calr_kernels.gpu.launch import arch_of, on, options, unit
from calr_kernels.gpu.packing import WORDS, Packed
from calr_kernels.gpu.parts import LEVELS, levels_of, look_up, looks_up, rounded, wait

MOST_ROWS = 64  # of x: one tile
BLOCK_N, FINISHED = 64, 128  # outputs of a program, of the second launch
LEAST_BLOCKS = 4  # that a program reads


@triton.jit(do_not_specialize=["M", "N", "K", "BLOCKS", "chunk", "x_row"])
def quantized_product(
    x, words, high, scales, partial, M, N, K, BLOCKS, chunk, x_row,
    BITS: tl.constexpr, LEVELS: tl.constexpr, SPAN: tl.constexpr, ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
    EMULATE_BF16: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr, FIELDS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """x [M, K] rows; words, high, scales as in `packing` -> partial [chunks of blocks, M, N]."""
    K, x_row = K * UNIT, x_row.to(tl.int64) * UNIT
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    ms, c = tl.arange(0, BLOCK_M), tl.arange(0, WORDS)
    inside, taken = (rows < N)[:, None], (ms < M)[None, :]
    line = rows.to(tl.int64) * BLOCKS
    at = line[:, None] * WORDS + c[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    wait(PDL)
    for block in range(split * chunk, min(split * chunk + chunk, BLOCKS)):
        word = tl.load(words + at + block * WORDS, mask=inside, other=0)
        bits = word
        if BITS != 8 and BITS != 4:
            bits = tl.load(high + at + block * WORDS, mask=inside, other=0).to(tl.int32)
        looked_up = look_up(word, bits, BITS, ASSEMBLY)
        for span in tl.static_range(WORDS * FIELDS // SPAN):
            scale = tl.load(
                scales + (line + block) * (WORDS * FIELDS // SPAN) + span, mask=rows < N, other=0.0
            ).to(tl.float32)[:, None]  # fmt: skip
            for i in tl.static_range(span * SPAN // WORDS, (span + 1) * SPAN // WORDS):
                numbers = levels_of(word, bits, looked_up, i, BITS, LEVELS, ASSEMBLY) * scale
                weights = rounded(numbers, x.dtype.element_ty, EMULATE_BF16)
                ks = (block * FIELDS + i) * WORDS + c
                tile = tl.load(
                    x + ms[None, :] * x_row + ks[:, None],
                    mask=taken & (ks < K)[:, None], other=0.0,
                )  # fmt: skip
                acc = tl.dot(weights, tile, acc, input_precision="ieee")
    out = partial + (split.to(tl.int64) * M + ms[None, :]) * N + rows[:, None]
    tl.store(out, acc, mask=inside & taken)


@triton.jit(do_not_specialize=["N", "SPLIT", "RANK", "area"])
def finish(
    partial, t, up, bias, y, N, SPLIT, RANK, area,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr, EMULATE_BF16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[m] = Σ_s partial[s, m] (+ t[m] up) (+ bias), in the order of s: a program has one row m."""
    m = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    value = tl.zeros((BLOCK,), dtype=tl.float32)
    wait(PDL)
    for split in range(SPLIT):
        value += tl.load(partial + split * area + m * N + rows, mask=inside, other=0.0)
    for rank in range(RANK):
        factor = tl.load(up + rank * N + rows, mask=inside, other=0.0).to(tl.float32)
        value += factor * tl.load(t + m * RANK + rank).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m * N + rows, rounded(value, y.dtype.element_ty, EMULATE_BF16), mask=inside)


def run_quantized_product(
    x: Tensor,
    weight: Packed,
    y: Tensor,
    *,
    t: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    emulate_bf16: bool = False,
) -> None:
    """Launch both: x [M, K] of unit column stride, M up to 64, weight Packed [N, K] -> y [M, N].

    t [M, c] and up [c, N], contiguous: the corrective path's intermediate and second factor.
    """
    (m, k), n = x.shape, weight.words.shape[0]
    arch, blocks = arch_of(x), weight.words.shape[1]
    tiles = triton.cdiv(n, BLOCK_N)
    split = min(triton.cdiv(2 * arch.processors, tiles), triton.cdiv(blocks, LEAST_BLOCKS))
    chunk = triton.cdiv(blocks, split)
    split = triton.cdiv(blocks, chunk)
    partial = torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    size = unit(k, x.stride(0))
    with on(x):
        quantized_product[(tiles, split)](
            x, weight.words, weight.words if weight.high is None else weight.high, weight.scales,
            partial, m, n, k // size, blocks, chunk, x.stride(0) // size,
            BITS=weight.form.bits, LEVELS=LEVELS[weight.form.levels], SPAN=weight.span,
            ASSEMBLY=looks_up(arch, weight.form),
            PDL=arch.overlaps, EMULATE_BF16=emulate_bf16,
            BLOCK_M=max(16, triton.next_power_of_2(m)), BLOCK_N=BLOCK_N, WORDS=WORDS,
            FIELDS=weight.block // WORDS, UNIT=size,
            **options(4, 2 if arch.backend == "hip" else 3, overlap=arch.overlaps),
        )  # fmt: skip
        finish[(m, triton.cdiv(n, FINISHED))](
            partial, y if t is None else t, y if up is None else up, y if bias is None else bias, y,
            n, split, 0 if t is None else t.shape[1], m * n,
            HAS_BIAS=bias is not None, PDL=arch.overlaps, EMULATE_BF16=emulate_bf16,
            BLOCK=FINISHED, **options(4, overlap=arch.overlaps),
        )  # fmt: skip
