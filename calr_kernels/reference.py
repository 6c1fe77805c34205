"""Every operation in plain PyTorch: the specification for faster implementations.

All functions take any floating dtype, float64 included, and are differentiable.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from calr_kernels.forms import Form
from calr_kernels.records import dequantize


def lowrank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    corrective_down: Tensor | None = None,
    corrective_up: Tensor | None = None,
) -> Tensor:
    """Apply `y = up (down x) + corrective_up (corrective_down x) + bias`.

    x [..., K], down [r, K], up [N, r], bias [N], corrective_down [c, K], corrective_up [N, c]
    -> y [..., N], all of one dtype.

    >>> x, down, up = torch.ones(2, 3), torch.ones(1, 3), torch.ones(4, 1)
    >>> lowrank_linear(x, down, up).tolist()
    [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]
    """
    y = linear(linear(x, down), up, bias)
    if corrective_down is None or corrective_up is None:
        return y
    return y + linear(linear(x, corrective_down), corrective_up)


def pivoted_linear(
    x: Tensor, down: Tensor, up: Tensor, pivots: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Apply a rank-r matrix stored as r of its rows and the coefficients of the others.

    x [..., K], down [r, K], up [N - r, r], pivots [r] integer, bias [N] -> y [..., N].
    `y[..., pivots] = down x`; the other outputs, in ascending order, are `up (down x)`.
    Layout: pivoted rows as in PIFA (arXiv 2501.19090).

    >>> x, down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0]])
    >>> pivoted_linear(x, down, up, pivots=torch.tensor([1])).tolist()
    [[6.0, 3.0]]
    """
    t = linear(x, down)  # [..., r]
    y = interleave(t, linear(t, up), pivots)  # [..., N]
    return y if bias is None else y + bias


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    form: Form,
    bias: Tensor | None = None,
    corrective_down: Tensor | None = None,
    corrective_up: Tensor | None = None,
) -> Tensor:
    """Apply `y = ŵ x + corrective_up (corrective_down x) + bias`: ŵ the records' weights, each
    rounded once to x's dtype.

    x [..., K], weight [N, groups, record] uint8, bias [N], corrective_down [c, K], corrective_up
    [N, c] -> y [..., N]. Differentiable with respect to all but weight.
    """
    y = linear(x, dequantize(weight, form, x.shape[-1], x.dtype), bias)
    if corrective_down is None or corrective_up is None:
        return y
    return y + linear(linear(x, corrective_down), corrective_up)


def interleave(t: Tensor, rest: Tensor, pivots: Tensor, dim: int = -1) -> Tensor:
    """Put outputs in their places: t [..., r] at pivots [r], rest [..., N - r] at the others.

    dim: the dimension along which they are outputs.

    >>> interleave(torch.tensor([1, 2]), torch.tensor([3]), pivots=torch.tensor([2, 0])).tolist()
    [2, 3, 1]
    """
    source = pivot_source(pivots, t.shape[dim] + rest.shape[dim])
    return torch.cat([t, rest], dim).index_select(dim, source)


def pivot_source(pivots: Tensor, out_features: int) -> Tensor:
    """For each output row, its position in `cat([pivot rows, other rows])`.

    pivots [r] integer -> [out_features] int64, without a device synchronisation.

    >>> pivot_source(torch.tensor([2, 0]), 4).tolist()
    [1, 2, 0, 3]
    """
    pivots = pivots.long()
    others = torch.ones(out_features, dtype=torch.long, device=pivots.device)
    others = others.scatter(0, pivots, 0)
    rank = pivots.shape[0]
    positions = torch.arange(rank, device=pivots.device)
    return (rank - 1 + others.cumsum(0)).scatter(0, pivots, positions)
