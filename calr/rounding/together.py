"""Several matrices of one shape rounded at once: a GPU is idle over a single expert's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calr.rounding import gptq
from calr.rounding.matrix import round_matrix
from calr_kernels.forms import Form

TOGETHER = 2 << 30  # bytes that a GPU works on at once


def most_together(rows: int, columns: int, device: torch.device) -> int:
    """Return how many matrices [rows, columns] are best rounded at once: on a CPU one."""
    if device.type == "cpu":
        return 1
    return max(1, TOGETHER // (24 * columns * (columns + rows)))


def order_matrices(moments: Sequence[Tensor]) -> list[gptq.Ordered]:
    """Return `gptq.ordered` of every moment [K, K]."""
    if len(moments) == 1:
        return [gptq.ordered(moments[0])]
    return list(zip(*gptq.ordered(torch.stack(list(moments))), strict=True))


def round_matrices(
    weights: Sequence[Tensor], form: Form, moments: Sequence[Tensor], orders: Sequence[gptq.Ordered]
) -> list[Tensor]:
    """Return the records of every weight [N, K], rounded to a form under its own moment [K, K].

    orders: `order_matrices` of the moments.
    """
    if len(weights) == 1:
        return [round_matrix(weights[0], form, moments[0], orders[0]).records]
    order, factor = (torch.stack(parts) for parts in zip(*orders, strict=True))
    stacked = torch.stack(list(weights)), form, torch.stack(list(moments)), (order, factor)
    return list(round_matrix(*stacked).records)
