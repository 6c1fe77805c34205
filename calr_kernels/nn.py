"""The drop-in module of a linear layer compressed to low rank."""

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from calr_kernels import ops
from calr_kernels.cpu import Bound, Factors, bindable, is_plain
from calr_kernels.reference import pivot_source

Layout = Literal["two_factor", "pivoted"]


class LowRankLinear(nn.Linear):
    """A rank-r linear layer: x [..., K] -> y [..., N], with K, N = in_features, out_features.

    `down.weight` [r, K] is the first factor. In the "two_factor" layout `weight` [N, r] is the
    second and `y = weight (down x) + bias`. In the "pivoted" layout `down x` are the outputs listed
    in the buffer `pivots` [r] int32, ascending, and `weight` [N - r, r] gives the others from them.

    It is an `nn.Linear` whose own weight has the dense layer's name, so that PEFT, torchao and
    tensor parallel plans find it, and loading it into a dense model fails on the shape.
    Raises ValueError when rank is not in [1, min(in_features, out_features)].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        layout: Layout = "two_factor",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"rank {rank} of a {out_features}x{in_features} layer: "
                f"must lie between 1 and {min(in_features, out_features)}"
            )
        if layout not in ("two_factor", "pivoted"):
            raise ValueError(f"layout {layout!r}: must be 'two_factor' or 'pivoted'")
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.layout = rank, layout
        rows = out_features - rank if layout == "pivoted" else out_features
        self.weight = nn.Parameter(torch.empty(rows, rank, device=device, dtype=dtype))
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        if layout == "pivoted":
            self.register_buffer("pivots", torch.arange(rank, dtype=torch.int32, device=device))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        nn.init.normal_(self.weight, std=rank**-0.5)
        self._bound = Bound()

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: [..., in_features] -> [..., out_features]."""
        if self.may_fuse(input):
            factors = self.factors()
            if not torch.is_grad_enabled() and bindable(input, factors):
                return self._bound.linears(input, (factors,))[0]
            if torch.compiler.is_compiling() or torch._C._get_tracing_state() is None:
                down = cast(Tensor, factors.down)
                if factors.pivots is None:
                    return ops.lowrank_linear(input, down, factors.up, factors.bias)
                return ops.pivoted_linear(input, down, factors.up, factors.pivots, factors.bias)
        pivots = cast(Tensor, self.pivots) if self.layout == "pivoted" else None
        t = self.down(input)  # [..., r]
        if pivots is None:
            return linear(t, self.weight, self.bias)
        y = torch.cat([t, linear(t, self.weight)], dim=-1)
        y = y.index_select(-1, pivot_source(pivots, self.out_features))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def factors(self) -> Factors:
        """Return up, down, pivots (None in the two-factor layout) and bias (None without)."""
        parameters, buffers = self._parameters, self._buffers
        down = self._modules["down"]._parameters["weight"]  # type: ignore[union-attr]
        up = cast(Tensor, parameters["weight"])
        return Factors(up, down, buffers.get("pivots"), parameters["bias"])

    def may_fuse(self, input: Tensor) -> bool:
        """Tell whether reading `down.weight` bypasses nobody: offloading, tensor parallelism, hooks
        and wrapped weights all act when `down` itself is called. Wrapped inputs act on operations.
        """
        down = self._modules["down"]
        if type(down) is not nn.Linear or "forward" in down.__dict__:
            return False
        hooked = down._forward_hooks or down._forward_pre_hooks
        if hooked or down._backward_hooks or down._backward_pre_hooks:
            return False
        parameters = self._parameters
        if "bias" not in parameters:
            return False
        down_weight, weight = down._parameters.get("weight"), parameters.get("weight")
        bias = parameters["bias"]
        return may_bypass(input, weight, bias) and _readable(input, down_weight)

    def dense_weight(self) -> Tensor:
        """Return the equivalent weight matrix [out_features, in_features] in the factors' dtype."""
        rows = self.weight @ self.down.weight
        if self.layout == "two_factor":
            return rows
        rows = torch.cat([self.down.weight, rows])
        return rows[pivot_source(cast(Tensor, self.pivots), self.out_features)]

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        return f"{super().extra_repr()}, rank={self.rank}, layout={self.layout}"


def may_bypass(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Tell whether a weight may be read without its module: plain, of input's type, where it is."""
    return (
        _readable(input, weight)
        and (bias is None or (bias.dtype is input.dtype and bias.device == input.device))
        and is_plain(input)
        and not torch.is_autocast_enabled(input.device.type)
    )


def _readable(input: Tensor, weight: Tensor | None) -> bool:
    return (
        type(weight) is nn.Parameter
        and weight.device == input.device
        and weight.dtype is input.dtype
    )


def parameters(layout: Layout, out_features: int, in_features: int, rank: int) -> int:
    """Count the numbers stored for a rank-r layer without its bias.

    >>> parameters("two_factor", 4, 6, 2), parameters("pivoted", 4, 6, 2)
    (20, 16)
    """
    if layout == "pivoted":
        return rank * (out_features + in_features - rank)
    return rank * (out_features + in_features)


def rank_at(layout: Layout, out_features: int, in_features: int, keep: float) -> float:
    """Return the (real) rank at which the layer stores `keep` of its dense parameters.

    >>> rank_at("two_factor", 100, 100, 0.5), round(rank_at("pivoted", 100, 100, 0.75), 9)
    (25.0, 50.0)
    """
    total, product = out_features + in_features, out_features * in_features
    if layout == "two_factor":
        return keep * product / total
    return (total - math.sqrt(max(0.0, total * total - 4 * keep * product))) / 2
