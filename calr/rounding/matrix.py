"""One weight matrix in a quantised form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calr.rounding import gptq
from calr.rounding.scales import refit, search
from calr_kernels import records
from calr_kernels.forms import Form

PART = 1 << 22  # weights whose rows are rounded together: rows do not know of each other
PART_ON_GPU = 1 << 26  # the same on a GPU: every column of a part takes it a few short kernels
SEARCHED = 15_000  # operations of a product in whose time the scales for a weight are searched


def rounding_operations(parameters: int, columns: int) -> float:
    """Estimate how many operations of a product take the time of rounding a matrix."""
    return parameters * (SEARCHED + columns) + 8.0 * columns**3


@dataclass(frozen=True)
class Rounded:
    """A matrix [..., N, K] in a form, as it is stored: records [..., N, groups, record] uint8."""

    form: Form
    records: Tensor
    columns: int

    @classmethod
    def of(cls, form: Form, codes: Tensor, scales: Tensor) -> "Rounded":
        """Make one of codes [..., N, K] uint8 and scales [..., N, groups] of float16 numbers."""
        packed = records.pack(codes.flatten(0, -2), scales.flatten(0, -2), form)
        return cls(form, packed.unflatten(0, codes.shape[:-1]), codes.shape[-1])

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights [..., N, K] that the form holds."""
        flat = self.records.flatten(0, -3)
        found = records.dequantize(flat, self.form, self.columns, dtype)
        return found.view(*self.records.shape[:-2], self.columns)


@torch.no_grad()
def round_matrix(
    weight: Tensor, form: Form, moment: Tensor | None = None, order: gptq.Ordered | None = None
) -> Rounded:
    """Round a weight [N, K] to a form, or several at once, [..., N, K]: what a GPU wants.

    moment [..., K, K]: the second moment of its inputs. With it the scales are searched under its
    diagonal, the integers chosen by GPTQ, and the scales fitted to them; None rounds to nearest
    with searched scales. order: `gptq.ordered` of it, where it is known.
    """
    most = PART if weight.device.type == "cpu" else PART_ON_GPU
    rows = max(1, most // weight[..., 0, :].numel())
    if moment is not None and order is None:
        order = gptq.ordered(moment)
    made = torch.empty(0)
    for start in range(0, weight.shape[-2], rows):
        part = weight[..., start : start + rows, :]
        if moment is None or order is None:
            found = _nearest(part, form).records
        else:
            found = _fitted(part, form, moment, order).records
        if not start:  # at once: small pieces would lie between what is freed, and keep it
            made = found.new_empty(*weight.shape[:-1], *found.shape[-2:])
        made[..., start : start + rows, :, :] = found
    return Rounded(form, made, weight.shape[-1])


def _nearest(weight: Tensor, form: Form) -> Rounded:
    scales = search(weight, torch.ones(weight.shape[-1], device=weight.device), form)
    spread = scales.repeat_interleave(form.scale_group, -1)[..., : weight.shape[-1]]
    ratios = weight.float() / torch.where(spread == 0, 1.0, spread)
    codes = records.nearest(ratios, records.code_cells(form, ratios.device))
    return Rounded.of(form, codes, scales)


def _fitted(weight: Tensor, form: Form, moment: Tensor, order: gptq.Ordered) -> Rounded:
    scales = search(weight, moment.diagonal(dim1=-2, dim2=-1), form)
    codes = gptq.choose(weight, scales, order, form)
    return Rounded.of(form, codes, refit(weight, codes, moment, scales, form))
