"""Attention for text that a model writes: keys and values that heads share are read once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "calr_grouped"


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Have a model on a CPU attend by `attend_grouped`, where it uses PyTorch's attention."""
    before = model.config._attn_implementation
    if before != "sdpa" or model.device.type != "cpu":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


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
    """Attend as transformers' "sdpa" does; one new token's heads of a group as positions of one.

    query [B, heads, 1, d], key and value [B, key_heads, T, d], mask [B or 1, 1, 1, T]: grouped
    queries (Ainslie et al., arXiv 2305.13245) otherwise read keys and values once a head, six times
    slower on a CPU. Anything else goes to "sdpa". Returns [B, 1, heads, d], and no weights.
    """
    b, heads, new, d = query.shape
    plain = position_bias is None and others.get("softcap") is None
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


AttentionInterface.register(NAME, attend_grouped)
AttentionMaskInterface.register(NAME, sdpa_mask)
