"""One weight matrix in a quantised form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calr.rounding import gptq
from calr.rounding.scales import refit, search
from calr_kernels import records
from calr_kernels.forms import Form


@dataclass(frozen=True)
class Rounded:
    """A matrix [N, K] in a form: codes [N, K] uint8, scales [N, groups] of float16 numbers."""

    form: Form
    codes: Tensor
    scales: Tensor

    @property
    def records(self) -> Tensor:
        """The bytes that are stored, [N, groups, record] uint8."""
        return records.pack(self.codes, self.scales, self.form)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights that the form holds."""
        return records.dequantize(self.records, self.form, self.codes.shape[1], dtype)


@torch.no_grad()
def round_matrix(weight: Tensor, form: Form, moment: Tensor | None = None) -> Rounded:
    """Round a weight [N, K] to a form.

    moment [K, K]: the second moment of its inputs. With it the scales are searched under its
    diagonal, the integers chosen by GPTQ, and the scales fitted to them; None rounds to nearest
    with searched scales.
    """
    if moment is None:
        scales = search(weight, torch.ones(weight.shape[1], device=weight.device), form)
        spread = scales.repeat_interleave(form.scale_group, 1)[:, : weight.shape[1]]
        ratios = weight.float() / torch.where(spread == 0, 1.0, spread)
        cells = records.code_cells(form, ratios.device)
        return Rounded(form, records.nearest(ratios, cells), scales)
    scales = search(weight, moment.diagonal(), form)
    codes = gptq.choose(weight, scales, moment, form)
    return Rounded(form, codes, refit(weight, codes, moment, scales, form))
