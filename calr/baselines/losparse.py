"""LoSparse (arXiv 2306.11222): a low-rank matrix plus a structured sparse one, W = UV + S."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from calr.blocks import set_submodule
from calr.errors import CalrError
from calr.structure import analyse

LOW_RANK_SHARE = 0.05  # of a layer's dense parameters that UV takes, as in the paper's experiments
SMOOTHING = 0.85  # β of the importance's moving average
WARM_UP, COOL_DOWN = 0.05, 0.3  # shares of the steps before and after pruning


class LowRankSparseLinear(nn.Module):
    """y = U(Vx) + Sx + b with up U [N, r], down V [r, K] and sparse S [N, K].

    Only the input columns of S in `kept` [K] count; `importance` [K] is their moving average.
    """

    kept: Tensor
    importance: Tensor

    def __init__(self, dense: nn.Linear, rank: int) -> None:
        super().__init__()
        weight = dense.weight.detach()
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
        root = s[:rank].sqrt()
        self.up = nn.Parameter((u[:, :rank] * root).to(weight.dtype))
        self.down = nn.Parameter((root[:, None] * vh[:rank]).to(weight.dtype))
        self.sparse = nn.Parameter(weight - self.up.detach() @ self.down.detach())
        self.bias = dense.bias
        columns = weight.shape[1]
        self.register_buffer("kept", torch.ones(columns, dtype=torch.bool, device=weight.device))
        self.register_buffer("importance", torch.zeros(columns, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., K] -> [..., N]."""
        sparse = self.sparse * self.kept
        return linear(linear(x, self.down), self.up) + linear(x, sparse, self.bias)

    @torch.no_grad()
    def observe(self) -> None:
        """Update the importance of each column, the mean of |S ∇S| over it (eq. 5), smoothed."""
        if self.sparse.grad is not None:
            seen = (self.sparse * self.sparse.grad).abs().mean(0).float()
            self.importance.lerp_(seen, 1 - SMOOTHING)

    @torch.no_grad()
    def prune(self, columns: int) -> None:
        """Keep the columns of largest importance among those still kept."""
        ranked = self.importance.masked_fill(~self.kept, -1).argsort(descending=True, stable=True)
        self.kept.zero_()
        self.kept[ranked[:columns]] = True

    @property
    def stored(self) -> int:
        """Numbers to store: both factors and the kept columns."""
        return self.up.numel() + self.down.numel() + int(self.kept.sum()) * self.sparse.shape[0]


class LoSparse:
    """A model whose linear layers became UV + S, and the schedule by which S is pruned.

    keep: fraction of the decoder's linear parameters that is left at the end. `update` is called
    after every backward pass. Raises CalrError when keep leaves nothing for S.
    """

    def __init__(self, model: PreTrainedModel, keep: float) -> None:
        if not LOW_RANK_SHARE < keep <= 1:
            raise CalrError(f"losparse: keep={keep} must lie in ({LOW_RANK_SHARE}, 1]")
        self.layers: list[LowRankSparseLinear] = []
        self.columns: list[int] = []
        for layer in analyse(model).layers:
            dense = model.get_submodule(layer.name)
            assert isinstance(dense, nn.Linear)
            n, k = layer.out_features, layer.in_features
            rank = max(1, int(LOW_RANK_SHARE * n * k / (n + k)))
            made = LowRankSparseLinear(dense, rank)
            set_submodule(model, layer.name, made)
            self.layers.append(made)
            self.columns.append(int((keep * n * k - rank * (n + k)) // n))

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """What training moves."""
        return [p for layer in self.layers for p in (layer.up, layer.down, layer.sparse)]

    def update(self, step: int, steps: int) -> None:
        """Take in a step's gradients and prune every S to what the cubic schedule leaves (eq. 6).

        update(0, 1) prunes to the end at once.
        """
        begin, end = WARM_UP * steps, (1 - COOL_DOWN) * steps
        progress = min(1.0, max(0.0, (step + 1 - begin) / (end - begin)))
        for layer, columns in zip(self.layers, self.columns, strict=True):
            layer.observe()
            total = layer.sparse.shape[1]
            layer.prune(columns + round((total - columns) * (1 - progress) ** 3))
