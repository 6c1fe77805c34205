"""What a student is trained on: the dense model's most probable next tokens, kept on disk.

The dense model runs once over the text. Afterwards it need not be in memory, and runs over the same
text share what it said.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calr import parallel
from calr.model import BlockRunner, Structure, analyse, behind_blocks, resident
from calr.progress import give_back, progress
from calr.statistics import LOGITS
from calr.storage import Store
from calr.training.precision import in_sixteen_bits, mixed

TOP = 128  # next tokens kept per position; the others count as one
TARGET_BYTES = 6 * TOP  # of a position: a token and a probability each
CHUNK = 16  # windows of one saved file
PART_TOKENS = 1024  # tokens that run together
LOGITS_AT_ONCE = LOGITS // 2  # numbers, of a student's, which have gradients
ROWS = 32  # of the logits that are worked on at once: they stay in the cache of a CPU
LEAST_MASS = 1e-6  # of the others: below it float32 sums are noise


@dataclass(frozen=True)
class Targets:
    """The dense model's next-token distributions over windows of text.

    ids [S, T]. log_probabilities [S, T, k] float16, in falling order, of the k most probable next
    tokens [S, T, k] int32 after each position.
    """

    ids: Tensor
    log_probabilities: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: "Tensor | slice") -> "Targets":
        return Targets(self.ids[index], self.log_probabilities[index], self.tokens[index])

    def split(self, size: int) -> list["Targets"]:
        """Cut into groups of at most size windows."""
        return [self[start : start + size] for start in range(0, len(self), size)]


@torch.no_grad()
def collect_targets(model: PreTrainedModel, ids: Tensor, store: Store) -> Targets:
    """Run the dense model over windows [S, T], except over those that the store knows.

    Files are named after the text and how the model ran; the store must be of one model only.
    """
    structure, kind = analyse(model), f"{TOP} {in_sixteen_bits(model)}"
    chunks = [(_name(kind, chunk), chunk) for chunk in ids.split(CHUNK)]
    for name, chunk in progress(parallel.mine(chunks), desc="dense outputs", unit="chunk"):
        if name not in store:
            store.save(name, _most_probable(model, structure, chunk))
            give_back()
    parallel.wait()
    found = [store.load(name) for name, _ in chunks]
    log_probabilities, tokens = (
        torch.cat([part[name] for part in found]) for name in ("log_probabilities", "tokens")
    )
    return Targets(ids, log_probabilities, tokens)


def _name(kind: str, ids: Tensor) -> str:
    text = f"{kind} {list(ids.shape)}".encode() + ids.numpy().tobytes()
    return f"targets-{hashlib.sha256(text).hexdigest()[:16]}"


def divergence(model: PreTrainedModel, targets: Targets, *, cross_entropy: float = 0.0) -> Tensor:
    """Return KL(dense || model) in nats per token, the tokens outside the top k taken as one.

    That is the divergence of two coarser distributions, so a lower bound of the whole one (Cover
    and Thomas, Elements of Information Theory, section 2.8). cross_entropy: weight, in [0, 1], of
    the cross-entropy with the text's own next token, which takes that much of the divergence's
    place (Hinton et al., arXiv 1503.02531, section 2); a window's last position has no next token.
    """
    hidden, logits = _behind_blocks(model, targets)
    losses = _losses(model, hidden, logits, targets, cross_entropy)
    return torch.stack(list(losses)).sum()


def add_gradients(
    model: PreTrainedModel, targets: Targets, *, cross_entropy: float = 0.0, weight: float = 1.0
) -> Tensor:
    """Return `weight` times the divergence, after adding its gradients to the parameters'.

    Where logits are many, those of some positions at a time are in memory.
    """
    found = torch.zeros(())
    with torch.enable_grad():
        hidden, logits = _behind_blocks(model, targets)
        behind = hidden.detach().requires_grad_()
        for loss in _losses(model, behind, logits, targets, cross_entropy):
            (weight * loss).backward()
            found += weight * loss.detach().cpu()
        give_back()
        if hidden.requires_grad:
            hidden.backward(behind.grad)
        give_back()
    return found


def _behind_blocks(
    model: PreTrainedModel, targets: Targets
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    with mixed(model):
        return behind_blocks(model, targets.ids)


def _losses(
    model: PreTrainedModel,
    hidden: Tensor,
    logits: Callable[[Tensor], Tensor],
    targets: Targets,
    cross_entropy: float,
) -> Iterator[Tensor]:
    """Yield the loss of some positions at a time, each its share of the mean over all.

    hidden [S, T, H]: what the last block gives; logits: what makes logits of that.
    """
    top, device = targets.tokens.shape[-1], hidden.device
    following = targets.ids.to(device).roll(-1, dims=1)
    share = torch.full_like(following, cross_entropy, dtype=torch.float32)
    share[:, -1] = 0
    columns = (
        hidden.flatten(0, 1),
        targets.log_probabilities.to(device).float().view(-1, top),
        targets.tokens.to(device).long().view(-1, top),
        following.view(-1, 1),
        share.view(-1, 1),
    )
    positions = following.numel()
    pieces = -(-positions * _vocabulary(model) // LOGITS_AT_ONCE)
    size = -(-positions // pieces)
    for part, *wanted in zip(*(column.split(size) for column in columns), strict=True):
        with mixed(model):
            found = logits(part[None])[0]
        loss: Tensor = cast(Any, _Divergence).apply(found, *wanted)
        yield loss * (len(part) / positions)


def windows_at_once(model: PreTrainedModel, window: int) -> int:
    """Return how many windows of that many tokens a student runs on together: where a vocabulary is
    large fewer, since their logits and the gradients of these are held whole."""
    return max(1, min(PART_TOKENS, 2 * LOGITS // _vocabulary(model)) // window)


class _Divergence(torch.autograd.Function):
    """Mean over positions of the coarse KL and the cross-entropy, without float32 logits.

    With t, T the dense model's probabilities of the top tokens and of all others together, p, P the
    student's, and s the share of the cross-entropy with the token y that follows:
    (1 - s) (Σ t log(t / p) + T log(T / P)) - s log p_y. Its gradient is p - (1 - s) t at a top
    token and p (1 - (1 - s) T / P) at any other, at y less s.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, log_t: Tensor, tokens: Tensor, following: Tensor, share: Tensor
    ) -> Tensor:
        totals = torch.cat([_wide(part).logsumexp(-1, keepdim=True) for part in logits.split(ROWS)])
        log_p = logits.gather(-1, tokens).to(totals) - totals  # [n, k]
        t, rest_t, kept = log_t.exp(), _rest(log_t), (1 - share).to(totals)
        ratio = rest_t / _rest(log_p)
        ctx.save_for_backward(
            logits, totals, tokens, log_p.exp() - kept * t, 1 - kept * ratio, following, share
        )
        losses = (t * (log_t - log_p)).sum(-1, keepdim=True) + rest_t * ratio.log()
        log_y = logits.gather(-1, following).to(totals) - totals
        return (kept * losses - share * log_y).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, totals, tokens, top, others, following, share = ctx.saved_tensors
        gradient, scale = torch.empty_like(logits), grad / len(logits)
        for start in range(0, len(logits), ROWS):
            part = slice(start, start + ROWS)
            found = (_wide(logits[part]) - totals[part]).exp_().mul_(others[part] * scale)
            found.scatter_(-1, tokens[part], top[part] * scale)
            gradient[part] = found.scatter_add_(
                -1, following[part], (-scale * share[part]).to(found)
            )
        return gradient, None, None, None, None


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _rest(log_probabilities: Tensor) -> Tensor:
    """Return what the top tokens leave to the others: [n, k] -> [n, 1]."""
    return (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp(min=LEAST_MASS)


def _most_probable(model: PreTrainedModel, structure: Structure, ids: Tensor) -> dict[str, Tensor]:
    found, top = [], min(TOP, _vocabulary(model) - 1)
    positions = max(1, LOGITS // _vocabulary(model))
    with mixed(model):
        runner = BlockRunner(model, structure, ids, PART_TOKENS)
        hidden = runner.hidden
        for block in range(structure.blocks):
            runner.advance(block, hidden)
        with resident(*runner.around):
            for part in torch.cat(hidden).flatten(0, 1).split(positions):
                for logits in runner.logits(part[None])[0].split(ROWS):
                    values, tokens = logits.float().topk(top)
                    values -= logits.float().logsumexp(-1, keepdim=True)
                    found.append((values.half().cpu(), tokens.int().cpu()))
    return {
        "log_probabilities": torch.cat([v for v, _ in found]).view(*ids.shape, top),
        "tokens": torch.cat([t for _, t in found]).view(*ids.shape, top),
    }


def _vocabulary(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)
