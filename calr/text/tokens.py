"""Between text and token ids."""

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from calr.errors import CalrError


def cut(ids: Tensor, size: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Cut ids into rows of size tokens, drop the rest, prepend BOS where the tokenizer does."""
    rows = ids[: len(ids) // size * size].view(-1, size)
    if adds_bos(tokenizer):
        rows = torch.cat([torch.full_like(rows[:, :1], tokenizer.bos_token_id), rows], 1)
    return rows


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the tokens, 0 or 1, that the tokenizer puts before a text."""
    bos = tokenizer.bos_token_id
    return int(bos is not None and tokenizer("a")["input_ids"][:1] == [bos])


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Turn text into ids [T] int64, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies where a model came from; CalrError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError, TypeError) as error:
        raise CalrError(
            f"tokenizer: none was given and {model.name_or_path!r} has none; pass tokenizer=, or "
            "token ids as calibration"
        ) from error
