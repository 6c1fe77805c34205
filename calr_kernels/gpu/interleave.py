"""A pivoted layer's outputs from its two products: y[m, j] = [t | rest][m, source[j]] (+ b[j])."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calr_kernels.gpu.kept import kept
from calr_kernels.gpu.launch import on, options

BLOCK = 1024


@triton.jit(do_not_specialize=["N", "R"])
def interleave(
    t, rest, source, bias, y, N, R,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """t [M, R], rest [M, N - R], source [N] int32 -> y [M, N]: columns of t, then those of rest."""
    m = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    at = tl.load(source + columns, mask=inside, other=0)
    value = tl.load(t + m * R + at, mask=inside & (at < R), other=0.0)
    other = tl.load(rest + m * (N - R) + at - R, mask=inside & (at >= R), other=0.0)
    value = tl.where(at < R, value, other).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m * N + columns, value.to(y.dtype.element_ty), mask=inside)


def run_interleave(t: Tensor, rest: Tensor, pivots: Tensor, bias: Tensor | None) -> Tensor:
    """Launch it: t [M, r], rest [M, N - r], contiguous; pivots [r] int32, bias [N] -> y [M, N]."""
    m, n = t.shape[0], t.shape[1] + rest.shape[1]
    y = t.new_empty(m, n)
    _, source = kept(pivots, places, n)
    with on(t):
        interleave[(m, triton.cdiv(n, BLOCK))](
            t, rest, source, y if bias is None else bias, y, n, t.shape[1],
            HAS_BIAS=bias is not None, BLOCK=BLOCK, **options(4),
        )  # fmt: skip
    return y


def places(pivots: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the outputs that are no pivots, ascending, [n - r] int32, and each output's column in
    [pivots | others], [n] int32. Nothing is read back from the device."""
    last = torch.ones(n, dtype=torch.int8, device=pivots.device)
    last[pivots.long()] = 0
    order = torch.argsort(last, stable=True)  # the pivots, ascending, then the others
    source = torch.empty(n, dtype=torch.int32, device=pivots.device)
    source[order] = torch.arange(n, dtype=torch.int32, device=pivots.device)
    return order[len(pivots) :].int(), source
