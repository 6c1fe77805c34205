"""Attention for text that a model writes: keys and values that heads share are read once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "sdpa"  # under which transformers finds PyTorch's attention


@contextmanager
def grouped_attention() -> Iterator[None]:
    """Have models that use PyTorch's attention attend by `attend_grouped`.

    The function changes, not its name, which some families compare.
    """
    before = AttentionInterface()[NAME]
    AttentionInterface.register(NAME, attend_grouped)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, before)


def attend_grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers' "sdpa" does; for one new token, heads that share keys at once.

    query [B, heads, 1, d], key and value [B, key_heads, T, d], mask [B or 1, 1, 1, T], on a CPU:
    the query heads of a key head (Ainslie et al., arXiv 2305.13245) become positions of one head.
    Without a mask transformers has each read keys and values anew, which takes six times as long.
    Anything else goes to "sdpa". Returns [B, 1, heads, d], and no weights.
    """
    b, heads, new, d = query.shape
    plain = query.is_cpu and position_bias is None and others.get("softcap") is None
    if new != 1 or not plain or not (attention_mask is None or attention_mask.shape[1] == 1):
        result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            position_bias=position_bias,
            **others,
        )
        return result
    groups = query.reshape(b, key.shape[1], -1, d)
    y = scaled_dot_product_attention(groups, key, value, attention_mask, dropout, scale=scaling)
    return y.reshape(b, 1, heads, -1), None
