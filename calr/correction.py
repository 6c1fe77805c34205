"""Correction: train a compressed model to give the dense model's own outputs again.

CALR (arXiv 2508.16680) adds a trained low-rank path to every compressed layer. A path that is
linear and fitted layer by layer cannot beat truncation at the summed rank, so ours is trained on
what truncation cannot see: the model's output distribution, by KL divergence from the dense model
(Hinton et al., arXiv 1503.02531). The path lies within the layer's own rank: all its factors move.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel
from transformers.utils import logging

from calr.blocks import set_submodule
from calr.errors import CalrError
from calr.recipe import Recipe
from calr.store import Store

WARM_UP = 8  # steps
CLIP = 1.0  # largest norm of a step's gradient
BETAS = (0.9, 0.95)
FINAL = 0.1  # learning rate at the end over its peak
MEASURE_EVERY = 16  # steps between measurements on held-out windows, where the best is kept
HELD_OUT = 4  # windows that are never trained on
BATCH_TOKENS = 1024  # tokens of a step
HELD_TOKENS = 512  # tokens whose logits are held at once
STATE = "correction"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Correction:
    """What training did: tokens, and KL to the dense model in nats per token on held-out text."""

    tokens: int
    loss_before: float
    loss_after: float


def windows_needed(recipe: Recipe) -> int:
    """Count the windows that a recipe's correction takes, held-out ones included; 0 without one."""
    if not recipe.correction_tokens:
        return 0
    return math.ceil(recipe.correction_tokens / recipe.window) + HELD_OUT


def correct(
    model: PreTrainedModel,
    dense: dict[str, nn.Module],
    ids: Tensor,
    recipe: Recipe,
    store: Store,
) -> Correction:
    """Train the factors of a compressed model, in place, and its norms.

    dense: the layers that were replaced, by name; the dense model is run with them for every batch.
    ids [S, T]: the last HELD_OUT windows measure, the others train, each at most once. AdamW with
    warm-up and cosine, on a float32 copy of what is trained; 16-bit products where the machine has
    matrix units for them. The state that did best on held-out windows is kept, so that the result
    is never worse there than the start (packing rounds it afterwards). Deterministic for a seed on
    one device; store: where an interrupted run continues from. Raises CalrError when there is too
    little text, or when the loss is not finite.
    """
    if len(ids) < 2:
        raise CalrError(
            "correction: one window of text is not enough to train on and to measure; give more, "
            "or correction_tokens=0"
        )
    held_out = min(HELD_OUT, -(-len(ids) // 4))
    windows = min(len(ids) - held_out, -(-recipe.correction_tokens // ids.shape[1]))
    if windows * ids.shape[1] < recipe.correction_tokens:
        logger.warning(
            f"correction trains on {windows * ids.shape[1]} tokens instead of "
            f"{recipe.correction_tokens}: there is no more text"
        )
    students = {name: model.get_submodule(name) for name in dense}
    trained = [p for student in students.values() for p in student.parameters()] + norms(model)
    swap = _Swap(model, dense, students, trained)
    with swap.training():
        return _Run(model, swap, ids[:windows], ids[-held_out:], recipe, store).run()


def norms(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters of a model's norms."""
    modules = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    return [p for module in modules for p in module.parameters(recurse=False)]


class _Swap:
    """The dense and the compressed model, one at a time in the same modules."""

    def __init__(
        self,
        model: PreTrainedModel,
        dense: dict[str, nn.Module],
        students: dict[str, nn.Module],
        trained: list[nn.Parameter],
    ) -> None:
        self.model, self.dense, self.students, self.trained = model, dense, students, trained
        self.before = [p.data for p in trained]

    @contextlib.contextmanager
    def teacher(self) -> Iterator[None]:
        """Have the dense model in place, norms included."""
        values = [p.data for p in self.trained]
        self._install(self.dense, self.before)
        try:
            yield
        finally:
            self._install(self.students, values)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Have float32 copies of what is trained, requiring gradients; round them at the end."""
        required = [(p, p.requires_grad) for p in self.model.parameters()]
        for p, _ in required:
            p.requires_grad_(False)
        try:
            for p, value in zip(self.trained, self.before, strict=True):
                p.data = value.float().clone()
                p.requires_grad_(True)
            yield
        except BaseException:
            for p, value in zip(self.trained, self.before, strict=True):
                p.data = value
            raise
        finally:
            for p, value in zip(self.trained, self.before, strict=True):
                p.grad, p.data = None, p.data.to(value.dtype)
            for p, flag in required:
                p.requires_grad_(flag)

    def _install(self, modules: dict[str, nn.Module], values: list[Tensor]) -> None:
        for name, module in modules.items():
            set_submodule(self.model, name, module)
        for p, value in zip(self.trained, values, strict=True):
            p.data = value


@dataclass
class _Run:
    """One training run."""

    model: PreTrainedModel
    swap: _Swap
    ids: Tensor
    held_out: Tensor
    recipe: Recipe
    store: Store

    def run(self) -> Correction:
        """Train, continuing where an interrupted run stopped, and leave the best weights."""
        batch = max(1, BATCH_TOKENS // self.ids.shape[1])
        steps = -(-len(self.ids) // batch)
        order = torch.randperm(
            len(self.ids), generator=torch.Generator().manual_seed(self.recipe.seed)
        )
        parameters = self.swap.trained
        optimizer = torch.optim.AdamW(
            parameters, lr=self.recipe.learning_rate, betas=BETAS, weight_decay=0.0, fused=True
        )
        first, losses, best = self._resume(optimizer)
        if not losses:
            losses, best = [self.measure()], [p.detach().clone() for p in parameters]
        progress = logging.tqdm(
            range(first, steps), desc="correction", unit="step", initial=first, total=steps
        )
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate * _schedule(step, steps)
            loss = self._step(self.ids[order[step * batch : (step + 1) * batch]], optimizer)
            progress.set_postfix(kl=f"{loss:.3f}", held_out=f"{losses[-1]:.3f}")
            if (step + 1) % MEASURE_EVERY == 0 or step + 1 == steps:
                losses.append(self.measure())
                if losses[-1] <= min(losses):
                    best = [p.detach().clone() for p in parameters]
                self._save(optimizer, step + 1, losses, best)
        with torch.no_grad():
            for p, value in zip(parameters, best, strict=True):
                p.copy_(value)
        return Correction(self.ids.numel(), losses[0], min(losses))

    def _step(self, windows: Tensor, optimizer: torch.optim.Optimizer) -> float:
        """Make one step, a few windows at a time."""
        total = 0.0
        with torch.enable_grad():
            for part in self._parts(windows):
                loss = self._loss(part) * len(part) / len(windows)
                loss.backward()
                total += float(loss.detach())
        if not math.isfinite(total):
            raise CalrError(
                "correction: the loss is not finite; lower learning_rate "
                f"(now {self.recipe.learning_rate})"
            )
        nn.utils.clip_grad_norm_(self.swap.trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return total

    @torch.no_grad()
    def measure(self) -> float:
        """Return the mean KL to the dense model on the held-out windows, nats per token."""
        parts = self._parts(self.held_out)
        return sum(float(self._loss(part)) * len(part) for part in parts) / len(self.held_out)

    def _parts(self, windows: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = windows.split(max(1, HELD_TOKENS // windows.shape[1]))
        return parts

    def _loss(self, windows: Tensor) -> Tensor:
        """Return KL(dense || compressed) per token of windows [B, T]."""
        windows = windows.to(self.model.device)
        with self.swap.teacher(), torch.no_grad(), _mixed(self.model):
            target = log_softmax(self._logits(windows), dim=-1)  # [tokens, vocabulary]
        with _mixed(self.model):
            found = log_softmax(self._logits(windows), dim=-1)
        return kl_div(found, target, log_target=True, reduction="sum") / windows.numel()

    def _logits(self, windows: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=windows, use_cache=False).logits
        return logits.float()

    def _save(
        self, optimizer: torch.optim.Optimizer, step: int, losses: list[float], best: list[Tensor]
    ) -> None:
        if self.store.directory is None:
            return
        tensors = {"losses": torch.tensor(losses, dtype=torch.float64), "step": torch.tensor(step)}
        for i, p in enumerate(self.swap.trained):
            state = optimizer.state[p]
            tensors |= {f"{i}.value": p.data, f"{i}.best": best[i]}
            tensors |= {f"{i}.{name}": value for name, value in state.items()}
        self.store.save(STATE, tensors)

    def _resume(self, optimizer: torch.optim.Optimizer) -> tuple[int, list[float], list[Tensor]]:
        """Return the next step, the losses so far and the best weights; nothing to start anew."""
        if STATE not in self.store:
            return 0, [], []
        tensors = self.store.load(STATE)
        best = []
        for i, p in enumerate(self.swap.trained):
            p.data.copy_(tensors[f"{i}.value"])
            optimizer.state[p] = {
                name: tensors[f"{i}.{name}"].to(p.device)
                for name in MOMENTS
                if f"{i}.{name}" in tensors  # a parameter without a gradient has none
            }
            best.append(tensors[f"{i}.best"].to(p.device))
        return int(tensors["step"]), tensors["losses"].tolist(), best


def _schedule(step: int, steps: int) -> float:
    """Return the learning rate over its peak: linear warm-up, then cosine.

    >>> [round(_schedule(step, 100), 2) for step in (0, 7, 99)]
    [0.12, 1.0, 0.1]
    """
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - 1 - WARM_UP)
    return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * progress)) / 2


def _mixed(model: PreTrainedModel) -> contextlib.AbstractContextManager[object]:
    """Autocast to bfloat16 where the machine has matrix units for it, or the model is 16-bit."""
    fast = model.device.type == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False)
    narrow = model.get_input_embeddings().weight.dtype != torch.float32
    return torch.autocast(model.device.type, torch.bfloat16, enabled=bool(fast or narrow))
