"""Integers chosen column by column, each making good what those before it lost (GPTQ).

Frantar et al., arXiv 2210.17323; the same rounding as LDLQ (QuIP, arXiv 2307.13304).
"""

import torch
from torch import Tensor

from calr.rounding.damping import damped_cholesky
from calr_kernels.forms import Form
from calr_kernels.native import rounding
from calr_kernels.records import code_cells, level_cells, nearest

DAMPING = 0.01  # share of the mean diagonal added to the second moment
BLOCK = 64  # columns between updates of all columns behind them
SMALL = 64  # half of a triangle that is inverted at once
Ordered = tuple[Tensor, Tensor]  # the order of columns [K], and the factor [K, K] in it


def ordered(moment: Tensor) -> Ordered:
    """Order the columns by falling diagonal of a moment G [..., K, K]; return the upper Cholesky
    factor, float32, of G⁻¹ in that order. Damping makes a singular moment harmless.

    In reverse order G = L Lᵀ; turned round L is an upper U with G = U Uᵀ, so the factor is U⁻¹.
    """
    order = moment.diagonal(dim1=-2, dim2=-1).argsort(descending=True, stable=True)
    last_first = order.flip(-1)
    factor = _rows(moment, last_first)  # one name: what it was before is free
    factor = _rows(factor.mT, last_first)
    factor = factor.to(torch.float64)
    factor = damped_cholesky(factor, DAMPING).flip(-2, -1)
    _invert(factor)
    return order, factor.float().contiguous()


def _rows(matrix: Tensor, order: Tensor) -> Tensor:
    """Take the rows of matrices [..., K, N] in an order [..., K]."""
    if order.dim() == 1:  # the same, faster
        return matrix.index_select(0, order)
    return matrix.take_along_dim(order[..., None], -2)


def _invert(upper: Tensor) -> None:
    """Invert upper triangular matrices [..., K, K] in place: K³ / 3 operations, most in products.

    The inverse of [[A, B], [0, D]] is [[A⁻¹, -A⁻¹ B D⁻¹], [0, D⁻¹]].
    """
    size = upper.shape[-1]
    half = size // 2
    if half < SMALL:
        eye = torch.eye(size, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, eye, upper=True))
        return
    first, beside = upper[..., :half, :half], upper[..., :half, half:]
    last = upper[..., half:, half:]
    found = torch.linalg.solve_triangular(first, beside, upper=True)
    found = torch.linalg.solve_triangular(last, found, upper=True, left=False)
    beside.copy_(found.neg_())
    _invert(first)
    _invert(last)


def choose(weight: Tensor, scales: Tensor, ordered: Ordered, form: Form) -> Tensor:
    """Return codes [..., N, K] uint8 for weight [..., N, K] under scales [..., N, groups], that err
    least in (w - ŵ) G (w - ŵ)ᵀ when chosen one column after another: what a column's rounding lost
    is taken over by those that follow, along the rows of the factor of G⁻¹."""
    order, factor = ordered
    columns = weight.shape[-1]
    cells = level_cells(form, weight.device), code_cells(form, weight.device)
    rest = _rows(weight.float().mT, order).contiguous()  # [..., K, N]: a row is a column of it
    spread = scales.mT.repeat_interleave(form.scale_group, -2)[..., :columns, :]
    spread = _rows(spread, order).contiguous()
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=weight.device)
    columns_of = rounding.choose if rounding.can_round(weight) else _columns
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        within, behind = factor[..., block, block], factor[..., block, block.stop :]
        of_block = rest[..., block, :], spread[..., block, :], within
        errors = columns_of(*of_block, cells, codes[..., block, :])
        rest[..., block.stop :, :] -= behind.mT @ errors
    return _rows(codes, order.argsort(-1)).mT.contiguous()


def _columns(
    rest: Tensor, spread: Tensor, factor: Tensor, cells: tuple[Tensor, Tensor], codes: Tensor
) -> Tensor:
    """Choose the codes of a block of columns, as `calr_kernels.native.rounding.choose` does."""
    errors = torch.empty_like(rest)
    inverse = torch.where(spread == 0, 0.0, 1 / spread)
    for i in range(rest.shape[-2]):
        own, scale = rest[..., i, :], spread[..., i, :]
        ratios = own * inverse[..., i, :]
        codes[..., i, :] = nearest(ratios, cells[1])
        lost = (own - nearest(ratios, cells[0]) * scale) / factor[..., i, i, None]
        errors[..., i, :] = lost
        behind = factor[..., i, i + 1 :, None]
        rest[..., i + 1 :, :].addcmul_(behind, lost[..., None, :], value=-1)
    return errors
