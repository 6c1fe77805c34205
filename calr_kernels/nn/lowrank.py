"""The drop-in module of a linear layer compressed to low rank."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from calr_kernels import eligible, ops, reference
from calr_kernels.layout import LAYOUTS, Factors, Layout
from calr_kernels.native import Bound


class LowRankLinear(nn.Linear):
    """A rank-r linear layer: x [..., K] -> y [..., N], with K, N = in_features, out_features.

    `down.weight` [r, K] is the first factor. In the "two_factor" layout `weight` [N, r] is the
    second and `y = weight (down x) + bias`. In the "pivoted" layout `down x` are the outputs listed
    in the buffer `pivots` [r] int32, ascending, and `weight` [N - r, r] gives the others from them.

    It is an `nn.Linear` whose own weight has the dense layer's name, so that PEFT, torchao and
    tensor parallel plans find it, and loading it into a dense model fails on the shape.
    Raises ValueError when rank is not in [1, min(in_features, out_features)]. Two factors may have
    one term more, of zeros: at full rank, where N >= K, `weight` would have the dense one's shape.
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
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r}: must be one of {LAYOUTS}")
        most = min(in_features, out_features) + (layout == "two_factor")
        if not 1 <= rank <= most:
            raise ValueError(
                f"rank {rank} of a {out_features}x{in_features} layer: "
                f"must lie between 1 and {most}"
            )
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
        if self.fusible(input):
            factors = self.factors()
            if (
                not torch.is_grad_enabled()
                and not eligible.watched()
                and eligible.native(input, factors)
            ):
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
        return ops.assemble(t, linear(t, self.weight), pivots, self.bias)

    def factors(self) -> Factors:
        """Return up, down, pivots (None in the two-factor layout) and bias (None without)."""
        parameters, buffers = self._parameters, self._buffers
        down = self._modules["down"]._parameters["weight"]  # type: ignore[union-attr]
        up = cast(Tensor, parameters["weight"])
        return Factors(up, down, buffers.get("pivots"), parameters["bias"])

    def fusible(self, input: Tensor) -> bool:
        """Tell whether a kernel may read the factors for an input [..., in_features].

        Not where something acts when `down` itself is called (offloading, tensor parallelism,
        hooks, adapters), where a factor is wrapped, pruned, of another type or elsewhere, or where
        the input is.
        """
        down = self._modules["down"]
        parameters = self._parameters
        return (
            type(down) is nn.Linear
            and eligible.unhooked(down)
            and "bias" in parameters
            and eligible.readable(
                input, parameters["bias"], parameters.get("weight"), down._parameters.get("weight")
            )
        )

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the equivalent weight matrix [out_features, in_features].

        dtype: in which it is computed, by default the factors'.
        """
        down, up = self.down.weight.to(dtype), self.weight.to(dtype)
        if self.layout == "two_factor":
            return up @ down
        return reference.interleave(down, up @ down, cast(Tensor, self.pivots), dim=0)

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Make the dense layer that computes the same, its weight rounded once from float64.

        dtype: of its weight and bias, by default the factors'.
        """
        dtype = dtype or self.weight.dtype
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.dense_weight(torch.float64).to(dtype))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return dense

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        return f"{super().extra_repr()}, rank={self.rank}, layout={self.layout}"
