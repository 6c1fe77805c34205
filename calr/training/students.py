"""What a quantised model is while it is trained: integers frozen, scales and factors floating."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from calr_kernels import Form, records

ROWS = 4096  # of a matrix that are converted at once


class Primary(nn.Module):
    """A matrix [N, K] of frozen levels, int8, and trained scales [N, groups], float32.

    stored: its records. A scale that is 0 stays 0.
    """

    def __init__(self, stored: Tensor, form: Form, columns: int) -> None:
        super().__init__()
        self.form, self.columns = form, columns
        codes, self.before = records.unpack(stored, form, columns)
        self.values = torch.tensor(form.values, dtype=torch.int8, device=stored.device)
        self.levels = torch.cat([self.values[part.int()] for part in codes.split(ROWS)])
        self.scales = nn.Parameter(self.before.float())

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """Return the weights [N, K], float32, or those of some rows."""
        levels, scales = self.levels, self.scales * (self.before != 0)
        if rows is not None:
            levels, scales = levels[rows], scales[rows]
        return levels * scales.repeat_interleave(self.form.scale_group, 1)[:, : self.columns]

    @torch.no_grad()
    def records(self) -> Tensor:
        """Return the records of the scales as they are now; none changes its sign or becomes 0."""
        now = records.storable(self.scales, self.form)
        good = torch.isfinite(now) & (now * self.before > 0)
        values = self.values.int()
        codes = [torch.bucketize(part.int(), values) for part in self.levels.split(ROWS)]
        stored = torch.cat([part.to(torch.uint8) for part in codes])
        return records.pack(stored, torch.where(good, now, self.before), self.form)


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
        y = linear(input, self.primary().to(input.dtype), self.bias)
        if self.down is None or self.up is None:
            return y
        t = linear(input, self.down.to(input.dtype))
        return y + linear(t, self.up.mT.to(input.dtype))


class StudentEmbedding(nn.Module):
    """A quantised embedding while it is trained: ids [...] -> [..., K] in a dtype, times scale."""

    def __init__(self, primary: Primary, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.primary, self.scale, self.dtype = primary, scale, dtype

    def forward(self, input: Tensor) -> Tensor:
        """Look ids up."""
        found = self.primary(input.reshape(-1)).to(self.dtype)
        if self.scale != 1:
            found = found * torch.tensor(self.scale, dtype=self.dtype, device=found.device)
        rows: Tensor = found.view(*input.shape, -1)
        return rows
