"""Fit each block to the dense model on what the compressed blocks before it really feed it.

Two stages, block by block from the first: the closed form of the shifted inputs, and training of
the block's factors against the dense block's output.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calr.model import BlockRunner, Layer, Structure, Swapped, hooked, requiring, weight_of
from calr.recipe import Recipe
from calr.training.precision import mixed
from calr_kernels import LowRankLinear

BATCH_TOKENS = 1024  # tokens of a training step
CHOOSING = 4  # one batch in so many chooses the damping and the best epoch
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)  # λ, as fractions of the mean diagonal of E[x' x'ᵀ]
CLIP = 1.0  # largest norm of a step's gradient

Make = Callable[[Layer, Tensor | None, Tensor | None], LowRankLinear]


class BlockFit:
    """The block-by-block stages of one compression, on windows ids [S, T].

    make(layer, shift [K, K] | None, moment [K, K] | None) builds a low-rank layer: of the weight as
    it is, or of `weight @ shift` in the norm of the inputs' moment given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        structure: Structure,
        recipe: Recipe,
        ids: Tensor,
        make: Make,
    ) -> None:
        self.model, self.recipe, self.make = model, recipe, make
        self.runner = BlockRunner(model, structure, ids, BATCH_TOKENS)
        self.dense = self.student = self.runner.hidden

    def fit(
        self, block: int, layers: Sequence[Layer], known: dict[str, LowRankLinear]
    ) -> dict[str, LowRankLinear]:
        """Build the layers of the next block, or take those known; call it for every block.

        The model itself is as before when this returns or fails.
        """
        wanted = self.recipe.shifted_inputs and not known
        groups = {layer.group for layer in layers if not layer.routed} if wanted else set()
        dense, after = self._inputs(block, self.dense, groups)
        with Swapped[LowRankLinear](self.model) as places:
            for name, module in known.items():
                places.put(name, module)
            for group in dict.fromkeys(x.group for x in layers if x.name not in known):
                members = [layer for layer in layers if layer.group == group]
                for name, module in self._build(block, members, dense.get(group)).items():
                    places.put(name, module)
            if not known:
                self._train(block, places.now, after)
            self.student = self._run(block, self.student)
        self.dense = after
        return places.now

    def _run(self, block: int, hidden: list[Tensor]) -> list[Tensor]:
        with mixed(self.model):
            return self.runner.run(block, hidden)

    def _inputs(
        self, block: int, hidden: list[Tensor], groups: set[str]
    ) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        """Run a block; return what it fed to each group [tokens, K] per batch, and its outputs."""
        found: dict[str, list[Tensor]] = {group: [] for group in groups}
        with hooked(
            self.model.get_submodule(group).register_forward_pre_hook(_record(found[group]))
            for group in groups
        ):
            return found, self._run(block, hidden)

    def _build(
        self, block: int, members: list[Layer], dense: list[Tensor] | None
    ) -> dict[str, LowRankLinear]:
        """Build the layers of one input group; dense: what it got in the dense model."""
        if dense is None:
            return {layer.name: self.make(layer, None, None) for layer in members}
        group = members[0].group
        shifted = self._inputs(block, self.student, {group})[0][group]
        weights = [weight_of(self.model, m.name) for m in members]
        shift, moment = choose_shift(weights, dense, shifted)
        return {layer.name: self.make(layer, shift, moment) for layer in members}

    def _train(self, block: int, modules: dict[str, LowRankLinear], outputs: list[Tensor]) -> None:
        """Train a block's factors to give outputs; never worse on the held-out batches."""
        if not self.recipe.block_epochs or not modules:
            return
        named = [pair for module in modules.values() for pair in module.named_parameters()]
        parameters = [p for name, p in named if name != "bias"]
        held = list(range(0, len(outputs), CHOOSING))
        used = [i for i in range(len(outputs)) if i not in held] or held
        rate = self.recipe.block_learning_rate
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)

        def loss(batch: int) -> Tensor:
            with mixed(self.model):
                found = self.runner.run_one(block, batch, self.student[batch])
            target = outputs[batch].float()
            return (found.float() - target).square().mean() / target.square().mean()

        def measure() -> float:
            with torch.no_grad():
                return sum(float(loss(i)) for i in held)

        with requiring(self.model, parameters), torch.enable_grad():
            best, values = measure(), [p.detach().clone() for p in parameters]
            steps = self.recipe.block_epochs * len(used)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
                loss(used[step % len(used)]).backward()
                nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                optimizer.zero_grad()
                if (step + 1) % len(used) == 0 and (found := measure()) < best:
                    best, values = found, [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, value in zip(parameters, values, strict=True):
                p.copy_(value)


def choose_shift(
    weights: list[Tensor], dense: list[Tensor], shifted: list[Tensor]
) -> tuple[Tensor | None, Tensor]:
    """Return R [K, K], so that W R x' comes closest to W x, and E[x' x'ᵀ] [K, K], float64.

    R = (H + λI)(G' + λI)⁻¹, H = E[x x'ᵀ], G' = E[x' x'ᵀ]: the least-squares optimum damped towards
    the identity (AA-SVD's objective). λ is chosen on every CHOOSING-th batch of x and x'
    [tokens, K], with the identity, None, among the choices.
    """
    held = [i for i in range(len(dense)) if i % CHOOSING == 0]
    used = [i for i in range(len(dense)) if i % CHOOSING] or held
    h, g, tokens = _cross_moments(dense, shifted, used)
    held_h, held_g, held_tokens = _cross_moments(dense, shifted, held)
    eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
    curvature = sum(w.double().mT @ w.double() for w in weights)

    def error(shift: Tensor) -> float:  # up to E‖W x‖², which is the same for all
        inner = shift @ held_g @ shift.mT - 2 * shift @ held_h.mT
        return float((curvature * inner).sum())

    choices: list[Tensor | None] = [None]
    for damping in DAMPINGS:
        ridge = damping * (float(g.diagonal().mean()) or 1.0) * eye  # 1: an input that is zero
        choices.append(torch.linalg.solve(g + ridge, (h + ridge).mT).mT)
    errors = [error(eye if shift is None else shift) for shift in choices]
    best = min(range(len(choices)), key=lambda i: errors[i])
    if used == held:
        return choices[best], g
    return choices[best], (g * tokens + held_g * held_tokens) / (tokens + held_tokens)


def _cross_moments(
    dense: list[Tensor], shifted: list[Tensor], batches: list[int]
) -> tuple[Tensor, Tensor, int]:
    """Return E[x x'ᵀ], E[x' x'ᵀ] and the number of tokens of some batches."""
    size = dense[0].shape[1]
    h, g = torch.zeros(2, size, size, dtype=torch.float64, device=dense[0].device)
    for i in batches:  # float32 products of a few rows, summed in float64
        seen = shifted[i].float()
        h += dense[i].float().mT @ seen
        g += seen.mT @ seen
    tokens = sum(len(dense[i]) for i in batches)
    return h / tokens, g / tokens, tokens


def _record(into: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        into.append(args[0].reshape(-1, args[0].shape[-1]))

    return hook
