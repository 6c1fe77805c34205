"""LoSparse (arXiv 2306.11222): a low-rank matrix plus a structured sparse one, W = UV + S."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from calr.errors import CalrError
from calr.model import analyse, set_submodule

LOW_RANK_SHARE = 0.05  # of a layer's dense parameters that UV takes, as in the paper's experiments
SMOOTHING = 0.85  # β of the importance's moving average
WARM_UP, COOL_DOWN = 0.05, 0.3  # shares of the steps before and after pruning


class LowRankSparseLinear(nn.Module):
    """y = U(Vx) + Sx + b with up U [N, r], down V [r, K] and sparse S [N, K].

    Only the rows of S (output neurons) in `kept` [N] count; `importance` [N] is their moving
    average. Gradients reach the other rows too, so that they may come back while training.
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
        rows = weight.shape[0]
        self.register_buffer("kept", torch.ones(rows, dtype=torch.bool, device=weight.device))
        self.register_buffer("importance", torch.zeros(rows, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., K] -> [..., N]."""
        pruned = (self.sparse * ~self.kept[:, None]).detach()
        return linear(linear(x, self.down), self.up) + linear(x, self.sparse - pruned, self.bias)

    @torch.no_grad()
    def observe(self) -> None:
        """Update the importance of each row, the mean of |S ∇S| over it (eq. 5), smoothed."""
        if self.sparse.grad is not None:
            seen = (self.sparse * self.sparse.grad).abs().mean(1).float()
            self.importance.lerp_(seen, 1 - SMOOTHING)

    @property
    def stored(self) -> int:
        """Numbers to store beside the bias: both factors and the kept rows."""
        return self.up.numel() + self.down.numel() + int(self.kept.sum()) * self.sparse.shape[1]


class LoSparse:
    """A model whose linear layers became UV + S, and the schedule by which S is pruned.

    keep: fraction of the decoder's linear parameters that is left at the end. `update` is called
    after every backward pass. Raises CalrError when keep leaves nothing for S.
    """

    def __init__(self, model: PreTrainedModel, keep: float) -> None:
        structure = analyse(model)
        ranks = [
            max(1, int(LOW_RANK_SHARE * x.parameters / (x.out_features + x.in_features)))
            for x in structure.layers
        ]
        sides = [x.out_features + x.in_features for x in structure.layers]
        factors = sum(r * side for r, side in zip(ranks, sides, strict=True))
        self.budget = int(keep * structure.linear_parameters) - factors  # of all kept rows
        if self.budget <= 0 or keep > 1:
            least = factors / structure.linear_parameters
            raise CalrError(f"losparse: keep={keep} must lie in ({least:.3f}, 1]")
        self.total = structure.linear_parameters
        self.layers: list[LowRankSparseLinear] = []
        for layer, rank in zip(structure.layers, ranks, strict=True):
            dense = model.get_submodule(layer.name)
            assert isinstance(dense, nn.Linear)
            self.layers.append(LowRankSparseLinear(dense, rank))
            set_submodule(model, layer.name, self.layers[-1])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What training moves beside the norms."""
        return [p for layer in self.layers for p in layer.parameters()]

    def observe(self) -> None:
        """Take in the gradients of a backward pass."""
        for layer in self.layers:
            layer.observe()

    def update(self, step: int, steps: int) -> None:
        """Take in a step's gradients and prune all S to what the cubic schedule leaves (eq. 6).

        update(0, 1) prunes to the end at once.
        """
        self.observe()
        begin, end = WARM_UP * steps, (1 - COOL_DOWN) * steps
        progress = min(1.0, max(0.0, (step + 1 - begin) / (end - begin)))
        self._prune(self.budget + round((self.total - self.budget) * (1 - progress) ** 3))

    @torch.no_grad()
    def _prune(self, budget: int) -> None:
        """Keep the rows of largest importance in the whole model whose numbers fit the budget."""
        importance = torch.cat([layer.importance for layer in self.layers]).cpu()
        costs = torch.cat([torch.full(x.kept.shape, x.sparse.shape[1]) for x in self.layers])
        order = importance.argsort(descending=True, stable=True)
        kept = torch.zeros_like(importance, dtype=torch.bool)
        kept[order] = costs[order].cumsum(0) <= budget
        sizes = [len(layer.kept) for layer in self.layers]
        for layer, mask in zip(self.layers, kept.split(sizes), strict=True):
            layer.kept.copy_(mask)
            layer.sparse.mul_(layer.kept[:, None])
