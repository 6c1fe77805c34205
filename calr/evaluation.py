"""Token perplexity, its protocol stated exactly."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from calr.errors import CalrError
from calr.model import check_vocabulary
from calr.progress import progress


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per predicted token, and what it was measured on."""

    perplexity: float
    nats_per_token: float
    windows: int
    window: int
    predicted_tokens: int


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor) -> Perplexity:
    """Measure token perplexity on windows of token ids [S, T].

    Windows are independent (stride T, no overlap); in each, tokens 2 to T are predicted from those
    before them, so S (T - 1) tokens count. Likelihoods in float32, summed in float64. This is the
    SVD literature's perplexity, not lm-eval's word perplexity. Raises CalrError when the model's
    outputs are not finite.
    """
    if ids.dim() != 2 or ids.shape[1] < 2 or not len(ids):
        raise CalrError(f"evaluation ids {list(ids.shape)}: must be [windows, at least 2 tokens]")
    check_vocabulary(model, "evaluation ids", ids)
    total = 0.0
    for window in progress(ids.split(2), desc="perplexity", unit="batch"):
        window = window.to(model.device)
        logits = model(input_ids=window, use_cache=False).logits[:, :-1].float()
        labels = window[:, 1:]
        nats = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        total += float(nats.double().sum())
    _require_finite(total, model)
    predicted = ids.shape[0] * (ids.shape[1] - 1)
    mean = total / predicted
    return Perplexity(
        perplexity=_exp(mean),
        nats_per_token=mean,
        windows=ids.shape[0],
        window=ids.shape[1],
        predicted_tokens=predicted,
    )


@dataclass(frozen=True)
class Comparison:
    """How far a model's next-token distributions are from the dense model's.

    kl: mean KL(dense || model), nats per token. agreement: the share of positions at which both
    hold the same token to be the most probable. perplexity: the model's; ratio: over the dense
    model's.
    """

    kl: float
    agreement: float
    perplexity: float
    ratio: float


@torch.no_grad()
def compare(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor) -> Comparison:
    """Compare a model with the dense one, both in memory, on windows of token ids [S, T].

    All positions but each window's last count. In float32, summed in float64.
    """
    kl, same, nats, more = 0.0, 0, 0.0, 0.0
    for window in progress(ids.split(1), desc="comparison", unit="window"):
        q, p = (
            m(input_ids=window.to(m.device), use_cache=False).logits[0, :-1].float().log_softmax(-1)
            for m in (model, dense)
        )
        p, labels = p.to(q.device), window[0, 1:, None].to(q.device)
        difference = torch.where(p > -math.inf, p - q, 0.0)  # 0 where neither gives it a chance
        kl += float((p.exp() * difference).sum(-1).double().sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        nats -= float(q.gather(-1, labels).double().sum())
        more += float((p.gather(-1, labels) - q.gather(-1, labels)).double().sum())
    _require_finite(nats + kl, model)
    _require_finite(more, dense)
    predicted = ids.shape[0] * (ids.shape[1] - 1)
    kl, agreement, mean, more = (x / predicted for x in (kl, same, nats, more))
    return Comparison(kl, agreement, _exp(mean), _exp(more))


def measured(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Report how a model compares with the dense one on windows of token ids [S, T] of the built-in
    text that calibration never sees."""
    found, (windows, window) = compare(model, dense, ids), ids.shape
    return {
        "measured_on": f"{windows} windows of {window} tokens of the built-in text, held out",
        "kl_from_dense": round(found.kl, 4),
        "top_1_agreement": round(found.agreement, 4),
        "perplexity_dense": round(found.perplexity / found.ratio, 3),
        "perplexity_compressed": round(found.perplexity, 3),
        "perplexity_ratio": round(found.ratio, 4),
    }


def _require_finite(nats: float, model: PreTrainedModel) -> None:
    if not math.isfinite(nats):
        cause = "its weights are damaged"
        if model.dtype == torch.float16:
            cause = "they overflow float16: load it with --dtype bfloat16 or float32"
        raise CalrError(f"the model's predictions hold NaN or infinity; {cause}")


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
