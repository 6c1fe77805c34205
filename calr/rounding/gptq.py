"""Integers chosen column by column, each making good what those before it lost (GPTQ).

Frantar et al., arXiv 2210.17323; the same rounding as LDLQ (QuIP, arXiv 2307.13304).
"""

import torch
from torch import Tensor

from calr.rounding.damping import damped_cholesky
from calr_kernels.forms import Form
from calr_kernels.records import code_cells, nearest

DAMPING = 0.01  # share of the mean diagonal added to the second moment
BLOCK = 64  # columns between updates of all columns behind them
PART = 1 << 22  # weights whose rows are worked on together: rows do not know of each other


def choose(weight: Tensor, scales: Tensor, moment: Tensor, form: Form) -> Tensor:
    """Return codes [N, K] uint8 for weight [N, K] under scales [N, groups], that err least in
    (w - ŵ) G (w - ŵ)ᵀ, G = moment [K, K], when chosen one column after another.

    Columns come in the order of falling diagonal of G; what a column's rounding lost is taken over
    by those that follow, along the rows of the Cholesky factor of G⁻¹. Damping makes a singular
    moment harmless.
    """
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor = _factor(moment[order[:, None], order])
    rows = max(1, PART // weight.shape[1])
    parts = zip(weight.split(rows), scales.split(rows), strict=True)
    return torch.cat([_chosen(w, s, order, factor, form) for w, s in parts])


def _chosen(weight: Tensor, scales: Tensor, order: Tensor, factor: Tensor, form: Form) -> Tensor:
    """Choose codes [n, K] column by column, in an order, along a factor [K, K] in that order."""
    columns = weight.shape[1]
    cells = code_cells(form, weight.device)
    values = torch.tensor(form.values, dtype=torch.float32, device=weight.device)
    rest = weight.float()[:, order].mT.contiguous()  # [K, n]: a row is a column of the weight
    spread = scales.mT.repeat_interleave(form.scale_group, 0)[:columns][order].contiguous()
    inverse = torch.where(spread == 0, 0.0, 1 / spread)
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty(end - start, len(weight), device=weight.device)
        for i in range(start, end):
            codes[i] = nearest(rest[i] * inverse[i], cells)
            error = (rest[i] - values[codes[i].int()] * spread[i]) / factor[i, i]
            rest[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
            errors[i - start] = error
        rest[end:] -= factor[start:end, end:].mT @ errors
    return codes[order.argsort()].mT.contiguous()


def _factor(moment: Tensor) -> Tensor:
    """Return the upper Cholesky factor, float32, of the inverse of a damped moment [K, K]."""
    factor = damped_cholesky(moment, DAMPING)
    factor = torch.cholesky_inverse(factor)  # one name: the former, K² float64, is free at once
    upper: Tensor = torch.linalg.cholesky(factor, upper=True)
    return upper.float()
