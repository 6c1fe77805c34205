"""Attention on a CPU, where PyTorch's is slow: of one new token, and of whole windows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "sdpa"  # under which transformers finds PyTorch's attention
ROWS = 128  # positions of a window whose scores are computed at once
SCORES = 8 << 20  # that are in memory at once, but for 16 positions


@contextmanager
def fast_attention() -> Iterator[None]:
    """Have models that use PyTorch's attention attend by `attend`, in this process.

    The function changes, not its name, which some families compare. One that somebody registered
    under that name stays.
    """
    before = AttentionInterface()[NAME]
    if before is not sdpa_attention_forward:
        yield
        return
    AttentionInterface.register(NAME, attend)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, before)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers' "sdpa" does, on a CPU: faster, and otherwise within rounding.

    query [B, heads, T, d], key and value [B, key_heads, S, d]. Heads that share keys (Ainslie et
    al., arXiv 2305.13245) become positions of one head. One new token goes to PyTorch in that form:
    without a mask transformers has each head read keys and values anew, which takes six times as
    long; in bfloat16, a window of more than ROWS positions that see those before them to
    `causal_attention`. Anything else goes to "sdpa". Returns [B, T, heads, d], and no weights.
    """
    plain = query.is_cpu and position_bias is None
    plain = plain and others.get("softcap") is None and others.get("cache") is None
    b, heads, new, d = query.shape
    if plain and new == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
        groups = query.reshape(b, key.shape[1], -1, d)
        y = scaled_dot_product_attention(groups, key, value, attention_mask, dropout, scale=scaling)
        return y.reshape(b, 1, heads, -1), None
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    whole = attention_mask is None and causal and not dropout
    if plain and whole and ROWS < new == key.shape[2] and _multiplied_in(query) is torch.bfloat16:
        q, k, v = (x.to(torch.bfloat16) for x in (query, key, value))
        found = causal_attention(q, k, v, d**-0.5 if scaling is None else scaling)
        return found.transpose(1, 2).contiguous(), None
    return cast(
        tuple[Tensor, Tensor | None],
        sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
            **others,
        ),
    )


def _multiplied_in(x: Tensor) -> torch.dtype:
    """Return the type in which products of a tensor are made, by autocast or its own."""
    cast_to = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if cast_to else x.dtype


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return softmax(scale Q Kᵀ) V where a position sees itself and those before it.

    query [B, heads, T, d], key [B, key_heads, T, d], value [B, key_heads, T, d'] -> [B, heads, T,
    d'], of one type. ROWS positions at a time, in bfloat16 1.5 times as fast as PyTorch's own or
    more; scores are computed again for the backward pass, as there (Dao et al., arXiv 2205.14135).
    They are rounded, which PyTorch's are not; so keys are taken less their mean, which no
    probability depends on (Zhang et al., arXiv 2410.02367), and values, where the gradients of
    scores are computed, in the same way.
    """
    return cast(Tensor, cast(Any, _Causal).apply(query, key, value, scale))


class _Causal(torch.autograd.Function):
    """dV = Pᵀ dY, dS = P (dP - rowsum(P dP)) with dP = dY Vᵀ, dQ = scale dS K, dK = scale dSᵀ Q."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k = _side_by_side(query, key.shape[1]), _centred(key.flatten(0, 1))
        v = value.flatten(0, 1)
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        y = q.new_empty(*q.shape[:3], v.shape[-1])
        with torch.autocast("cpu", enabled=False):
            for rows in _parts(q):
                seen = slice(rows.stop)
                p = _probabilities(q[:, :, rows], k[:, seen], scale)
                y[:, :, rows] = (p @ v[:, seen]).view_as(y[:, :, rows])
        return y.view(*query.shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dy, centred = _side_by_side(grad, ctx.shapes[1][1]), _centred(v)
        wide = torch.promote_types(q.dtype, torch.float32)  # in which parts are summed
        of_k, of_v = (torch.zeros_like(x, dtype=wide) for x in (k, v))
        of_q = torch.empty_like(q)
        with torch.autocast("cpu", enabled=False):
            for rows in _parts(q):
                seen, own, out = slice(rows.stop), q[:, :, rows], dy[:, :, rows].flatten(1, 2)
                p = _probabilities(own, k[:, seen], ctx.scale)
                of_v[:, seen] += p.mT @ out
                of_p = out @ centred[:, seen].mT
                of_s = torch._softmax_backward_data(of_p, p, -1, p.dtype).mul_(ctx.scale)
                of_q[:, :, rows] = (of_s @ k[:, seen]).view_as(own)
                of_k[:, seen] += of_s.mT @ own.flatten(1, 2)
        found = zip((of_q, of_k, of_v), ctx.shapes, strict=True)
        return *(x.to(q.dtype).view(shape) for x, shape in found), None


def _side_by_side(x: Tensor, key_heads: int) -> Tensor:
    """[B, heads, T, d] -> [B key_heads, heads of a key head, T, d]."""
    return x.reshape(x.shape[0] * key_heads, -1, *x.shape[2:])


def _centred(x: Tensor) -> Tensor:
    """Take the mean over positions from x [n, T, d]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide - wide.mean(1, keepdim=True)).to(x.dtype)


def _parts(q: Tensor) -> Iterator[slice]:
    """Cut the positions of q [n, groups, T, d] into parts, of ROWS unless heads are many."""
    n, groups, positions, _ = q.shape
    size = max(16, min(ROWS, SCORES // (n * groups * positions)))
    for start in range(0, positions, size):
        yield slice(start, min(start + size, positions))


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return P [n, groups rows, seen] of the last rows q [n, groups, rows, d] of k [n, seen, d]."""
    n, groups, rows, _ = q.shape
    seen = k.shape[1]
    scores = q.new_empty(n, groups * rows, seen)
    torch.baddbmm(scores, q.flatten(1, 2), k.mT, beta=0, alpha=scale, out=scores)
    later = torch.ones(rows, rows, dtype=torch.bool).triu_(1)
    scores.view(n, groups, rows, seen)[..., seen - rows :].masked_fill_(later, -torch.inf)
    return torch.softmax(scores, -1, out=scores)
