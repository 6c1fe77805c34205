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
    """Order the columns by falling diagonal of a moment G [K, K]; return the upper Cholesky factor,
    float32, of G⁻¹ in that order. Damping makes a singular moment harmless.

    In reverse order G = L Lᵀ; turned round L is an upper U with G = U Uᵀ, so the factor is U⁻¹.
    """
    order = moment.diagonal().argsort(descending=True, stable=True)
    last_first = order.flip(0)
    factor = moment[last_first[:, None], last_first].to(torch.float64)  # one name: others are free
    factor = damped_cholesky(factor, DAMPING).flip(0, 1)
    _invert(factor)
    return order, factor.float().contiguous()


def _invert(upper: Tensor) -> None:
    """Invert an upper triangular matrix [K, K] in place: K³ / 3 operations, nearly all in products.

    The inverse of [[A, B], [0, D]] is [[A⁻¹, -A⁻¹ B D⁻¹], [0, D⁻¹]].
    """
    half = len(upper) // 2
    if half < SMALL:
        eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, eye, upper=True))
        return
    first, beside, last = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    found = torch.linalg.solve_triangular(first, beside, upper=True)
    found = torch.linalg.solve_triangular(last, found, upper=True, left=False)
    beside.copy_(found.neg_())
    _invert(first)
    _invert(last)


def choose(weight: Tensor, scales: Tensor, ordered: Ordered, form: Form) -> Tensor:
    """Return codes [N, K] uint8 for weight [N, K] under scales [N, groups], that err least in
    (w - ŵ) G (w - ŵ)ᵀ when chosen one column after another: what a column's rounding lost is taken
    over by those that follow, along the rows of the factor of G⁻¹."""
    order, factor = ordered
    columns = weight.shape[1]
    cells = level_cells(form, weight.device), code_cells(form, weight.device)
    rest = weight.float()[:, order].mT.contiguous()  # [K, n]: a row is a column of the weight
    spread = scales.mT.repeat_interleave(form.scale_group, 0)[:columns][order].contiguous()
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=weight.device)
    columns_of = rounding.choose if rounding.can_round(weight) else _columns
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        within = factor[block, block]
        errors = columns_of(rest[block], spread[block], within, cells, codes[block])
        rest[block.stop :] -= factor[block, block.stop :].mT @ errors
    return codes[order.argsort()].mT.contiguous()


def _columns(
    rest: Tensor, spread: Tensor, factor: Tensor, cells: tuple[Tensor, Tensor], codes: Tensor
) -> Tensor:
    """Choose the codes of a block of columns, as `calr_kernels.native.rounding.choose` does."""
    errors = torch.empty_like(rest)
    for i in range(len(rest)):
        ratios = rest[i] * torch.where(spread[i] == 0, 0.0, 1 / spread[i])
        codes[i] = nearest(ratios, cells[1])
        errors[i] = (rest[i] - nearest(ratios, cells[0]) * spread[i]) / factor[i, i]
        rest[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return errors
