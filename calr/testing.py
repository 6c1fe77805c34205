"""Tiny models of real classes and a byte tokenizer, for examples and tests: no downloads."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

M = TypeVar("M", bound=nn.Module)

VOCABULARY = 258  # <bos>, <eos>, then one token per byte
SETTINGS = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Build a randomly initialised Llama of two blocks and hidden size 32."""
    return _built(LlamaForCausalLM, LlamaConfig(**(SETTINGS | overrides)), seed)


def tiny_mixtral(seed: int = 0, **overrides: Any) -> MixtralForCausalLM:
    """Build a randomly initialised Mixtral of two blocks, four experts and hidden size 32."""
    settings: dict[str, Any] = SETTINGS | {
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }
    return _built(MixtralForCausalLM, MixtralConfig(**(settings | overrides)), seed)


def _built(kind: Callable[[Any], M], config: Any, seed: int) -> M:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval()


def byte_tokenizer(add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte.

    >>> byte_tokenizer(add_bos=True)("a").input_ids
    [0, 66]
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
