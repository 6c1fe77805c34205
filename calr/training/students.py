"""What a quantised model is while it is trained: integers frozen, scales and factors floating."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from calr_kernels import Form, records, scaled


class Primary(nn.Module):
    """A matrix [N, K] of frozen integers, in records, and trained scales [N, groups], float16.

    The scales may be of a wider type while they are trained; what they are rounded to is computed
    with. One that is 0 stays 0, and none changes its sign.
    """

    def __init__(self, stored: Tensor, form: Form, columns: int) -> None:
        super().__init__()
        self.form, self.columns, self.stored = form, columns, stored
        self.scales = nn.Parameter(records.scales_of(stored).clone())

    @torch.no_grad()
    def records(self) -> Tensor:
        """Return the records of the scales as they are now."""
        now = scaled.stored_scales(self.stored, self.scales, self.form)
        return records.rescaled(self.stored, now)


class StudentLinear(nn.Module):
    """A quantised linear layer while it is trained: x [..., K] -> [..., N].

    down [c, K] and up [c, N], float32: the factors of its corrective path, or None.
    """

    def __init__(
        self,
        primary: Primary,
        bias: nn.Parameter | None,
        down: Tensor | None = None,
        up: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.primary, self.bias = primary, bias
        self.down = None if down is None else nn.Parameter(down.float().clone())
        self.up = None if up is None else nn.Parameter(up.float().clone())

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        own = self.primary
        y = scaled.scaled_linear(input, own.stored, own.scales, own.form, self.bias)
        if self.down is None or self.up is None:
            return y
        t = linear(input, self.down.to(input.dtype))
        return y + linear(t, self.up.mT.to(input.dtype))


class StudentEmbedding(nn.Module):
    """A quantised embedding while it is trained: ids [...] -> [..., K] in a dtype, times scale."""

    def __init__(self, primary: Primary, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.primary, self.scale, self.dtype = primary, scale, dtype
        self.num_embeddings = len(primary.stored)

    def forward(self, input: Tensor) -> Tensor:
        """Look ids up."""
        own, ids = self.primary, input.reshape(-1)
        found = scaled.scaled_rows(ids, own.stored, own.scales, own.form, own.columns)
        found = found.to(self.dtype)
        if self.scale != 1:
            found = found * torch.tensor(self.scale, dtype=self.dtype, device=found.device)
        rows: Tensor = found.view(*input.shape, -1)
        return rows
