"""The training loop that corrects a compressed model: distillation from recorded targets.

Knows neither methods nor layers, only parameters; baselines are healed by the same loop.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calr import parallel
from calr.errors import CalrError
from calr.model import requiring
from calr.progress import progress
from calr.storage import Store
from calr.training.targets import Targets, add_gradients, divergence, windows_at_once

WARM_UP = 8  # steps, or a quarter of them
CLIP = 1.0  # largest norm of a step's gradient
BETAS = (0.9, 0.95)
FINAL = 0.1  # learning rate at the end over its peak
MEASURE_TOKENS = 16_384  # between measurements on held-out windows, where the best is kept
STEP_TOKENS = 512  # of one step, by default
STATE, BEST = "training", "best"
OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter


@dataclass(frozen=True)
class Trained:
    """What training did: tokens, and the loss on held-out text, nats per token.

    That is the KL from the dense model, unless some of it is cross-entropy.
    """

    tokens: int
    loss_before: float
    loss_after: float


def train(
    model: PreTrainedModel,
    parameters: Sequence[nn.Parameter],
    targets: Targets,
    held_out: Targets,
    *,
    learning_rate: float,
    rates: Sequence[float] | None = None,
    step_tokens: int = STEP_TOKENS,
    cross_entropy: float = 0.0,
    seed: int = 0,
    store: Store | None = None,
    on_gradients: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train parameters of a model, in place, to predict what the targets say; see `divergence`.

    Every window once, in an order drawn from seed; a step takes step_tokens, at least a window,
    accumulated over some windows at a time. AdamW with warm-up and cosine, on a float32 copy of the
    parameters, which is rounded at the end; nothing else moves. The state that did best on
    held_out is kept, so that the result is never worse there than the start, but for that rounding.
    rates: what each parameter's learning rate is, over learning_rate; 1 by default.
    on_gradients(step, steps) is called after every backward pass (a baseline prunes there; it has
    no state in store); with it the last state is kept, whatever its loss. Deterministic for a seed
    on one device; store: where an interrupted run continues from. Raises CalrError when the loss is
    not finite; the parameters are then as they were.
    """
    with _in_float32(model, parameters):
        run = _Training(
            model,
            parameters,
            targets,
            held_out,
            learning_rate,
            rates or [1.0] * len(parameters),
            step_tokens,
            cross_entropy,
            seed,
            store or Store(),
            on_gradients,
        )
        return run.run()


@contextlib.contextmanager
def _in_float32(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Have float32 copies of the parameters, alone requiring gradients; round them at the end."""
    before = [p.data for p in parameters]
    try:
        with requiring(model, parameters):
            for p in parameters:
                p.data = p.data.float().clone()
            yield
            for p, value in zip(parameters, before, strict=True):
                p.data = p.data.to(value.dtype)
    except BaseException:
        for p, value in zip(parameters, before, strict=True):
            p.data = value
        raise


@dataclass
class _Training:
    model: PreTrainedModel
    parameters: Sequence[nn.Parameter]
    targets: Targets
    held_out: Targets
    learning_rate: float
    rates: Sequence[float]
    step_tokens: int
    cross_entropy: float
    seed: int
    store: Store
    on_gradients: Callable[[int, int], None] | None

    @property
    def at_once(self) -> int:
        return windows_at_once(self.model, self.targets.ids.shape[1])

    def run(self) -> Trained:
        """Train, continuing where an interrupted run stopped, and leave the best weights."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.targets), generator=generator)
        batches = order.split(max(1, self.step_tokens // self.targets.ids.shape[1]))
        groups: list[dict[str, Any]] = [
            {"params": [p for p, r in zip(self.parameters, self.rates, strict=True) if r == rate]}
            | {"rate": rate}
            for rate in dict.fromkeys(self.rates)
        ]
        optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)
        every = max(1, MEASURE_TOKENS // batches[0].numel() // self.targets.ids.shape[1])
        first, losses = self._resume(optimizer)
        if not losses:
            losses = [self.measure()]
            self._keep()
        tokens = self.targets.ids.shape[1] * sum(map(len, batches[:first]))
        with progress(
            desc="correction",
            unit="token",
            unit_scale=True,
            initial=tokens,
            total=self.targets.ids.numel(),
        ) as shown:
            for step in range(first, len(batches)):
                loss = self._step(step, batches, optimizer)
                shown.set_postfix(loss=f"{loss:.3f}", held_out=f"{losses[-1]:.3f}")
                shown.update(self.targets.ids.shape[1] * len(batches[step]))
                if (step + 1) % every == 0 or step + 1 == len(batches):
                    losses.append(self.measure())
                    if losses[-1] <= min(losses) or self.on_gradients is not None:
                        self._keep()
                    self._save(optimizer, step + 1, losses)
        parallel.wait()
        best = self.store.load(BEST)
        with torch.no_grad():
            for i, p in enumerate(self.parameters):
                p.copy_(best[f"{i}"])
        last = losses[-1] if self.on_gradients is not None else min(losses)
        return Trained(self.targets.ids.numel(), losses[0], last)

    def _step(
        self, step: int, batches: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> float:
        """Make one step and return its loss."""
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * self.learning_rate * _schedule(step, len(batches))
        whole, found = batches[step], torch.zeros((), dtype=torch.float64)
        for part in self.targets[parallel.mine(whole)].split(self.at_once):
            found += float(
                add_gradients(
                    self.model,
                    part,
                    cross_entropy=self.cross_entropy,
                    weight=len(part) / len(whole),
                )
            )
        self._add_up(found)
        self._finite(float(found))
        if self.on_gradients is not None:
            self.on_gradients(step, len(batches))
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(found)

    def _add_up(self, loss: Tensor) -> None:
        """Sum loss and gradients over the processes, each of which had other windows."""
        parallel.add_up([loss])
        if parallel.size() == 1:
            return
        reached = torch.tensor([float(p.grad is not None) for p in self.parameters])
        parallel.add_up([reached])
        for p, count in zip(self.parameters, reached.tolist(), strict=True):
            if count:  # the others stay without one, as they do in one process
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                parallel.add_up([p.grad])

    @torch.no_grad()
    def measure(self) -> float:
        """Return the mean loss on the held-out windows, nats per token."""
        parts = parallel.mine(self.held_out).split(self.at_once)
        summed = sum(float(self._loss(part)) * len(part) for part in parts)
        total = torch.tensor(summed, dtype=torch.float64)
        parallel.add_up([total])
        return self._finite(float(total) / len(self.held_out))

    def _loss(self, part: Targets) -> Tensor:
        return divergence(self.model, part, cross_entropy=self.cross_entropy)

    def _finite(self, loss: float) -> float:
        if math.isfinite(loss):
            return loss
        raise CalrError(
            f"correction: the loss is not finite; lower learning_rate (now {self.learning_rate})"
        )

    def _keep(self) -> None:
        """Keep the parameters as the best so far."""
        in_memory = self.store.directory is None
        if not in_memory and not parallel.first():
            return
        values = (p.detach().clone() if in_memory else p.detach() for p in self.parameters)
        self.store.save(BEST, {f"{i}": value for i, value in enumerate(values)})

    def _save(self, optimizer: torch.optim.Optimizer, step: int, losses: list[float]) -> None:
        if self.store.directory is None or not parallel.first():
            return
        tensors = {"losses": torch.tensor(losses, dtype=torch.float64), "step": torch.tensor(step)}
        for i, p in enumerate(self.parameters):
            tensors[f"{i}.value"] = p.data
            tensors |= {f"{i}.{name}": value for name, value in optimizer.state[p].items()}
        self.store.save(STATE, tensors)

    def _resume(self, optimizer: torch.optim.Optimizer) -> tuple[int, list[float]]:
        """Return the next step and the losses so far; nothing to start anew."""
        if not parallel.agree(STATE in self.store and BEST in self.store):
            return 0, []
        tensors = self.store.load(STATE)
        for i, p in enumerate(self.parameters):
            p.data.copy_(tensors[f"{i}.value"])
            optimizer.state[p] = {
                name: tensors[f"{i}.{name}"].to(p.device, copy=True)
                for name in OPTIMIZER_STATE
                if f"{i}.{name}" in tensors  # a parameter without a gradient has none
            }
        return int(tensors["step"]), tensors["losses"].tolist()


def _schedule(step: int, steps: int) -> float:
    """Return the learning rate over its peak: linear warm-up, then cosine.

    >>> [round(_schedule(step, 100), 2) for step in (0, 7, 99)]
    [0.12, 1.0, 0.1]
    >>> [round(_schedule(step, 4), 2) for step in range(4)]
    [1.0, 1.0, 0.55, 0.1]
    """
    warm_up = min(WARM_UP, max(1, steps // 4))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - 1 - warm_up)
    return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * progress)) / 2
