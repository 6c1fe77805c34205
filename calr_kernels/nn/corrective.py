"""The low-rank path beside a quantised primary path."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from calr_kernels.forms import CORRECTIVE, Form
from calr_kernels.quantized import factor_numbers


class Corrective(nn.Module):
    """A corrective path of rank c: x [..., K] -> up (down x), [..., N], in x's dtype.

    A row of `down` [c, K] and one of `up` [c, N], the transposed second factor, are a term. In 8
    bits both are frozen records [c, groups, record] uint8 of `forms.CORRECTIVE`; in 16 they are
    floating parameters of the module's dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: Form,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rank = form.corrective_rank
        self.down = _empty(self.rank, in_features, form.corrective_bits, device, dtype)
        self.up = _empty(self.rank, out_features, form.corrective_bits, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the path: [..., in_features] -> [..., out_features]."""
        down, up = self.factors(input.dtype)
        return linear(linear(input, down), up)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return down [c, K] and up [N, c] as numbers."""
        down = factor_numbers(self.down, self.in_features, dtype)
        return down, factor_numbers(self.up, self.out_features, dtype).mT

    def extra_repr(self) -> str:
        """Describe the path in `print(model)`."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


def _empty(
    rank: int,
    columns: int,
    bits: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    """Make a factor of zeros."""
    if bits == 16:
        return nn.Parameter(torch.zeros(rank, columns, device=device, dtype=dtype))
    shape = CORRECTIVE.shape(rank, columns)
    return nn.Parameter(torch.zeros(shape, dtype=torch.uint8, device=device), requires_grad=False)
