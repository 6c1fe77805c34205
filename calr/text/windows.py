"""Windows of token ids for calibration, training and evaluation."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from calr.errors import CalrError
from calr.text.sampling import CACHE_BYTES, hard_wrapped, sample_from
from calr.text.sources import Source, held_out_topics, name_of, parts_of, read_text
from calr.text.tokens import adds_bos, cut, encode, tokenizer_of

CHARACTERS_PER_TOKEN = 8  # generous first guess of how much text a window needs

logger = logging.get_logger(__name__)


def calibration_windows(
    source: Source | None,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    *,
    samples: int,
    window: int,
    seed: int,
    cache_bytes: int = CACHE_BYTES,
    natively: bool = True,
) -> Tensor:
    """Return [samples, window] int64 token ids, on one machine the same for the same arguments.

    source: a source string or path (see the module), a list of texts, or ids [S, T], which are used
    as they are. None is "sampled"; cache_bytes, natively: see `sample_from`. Windows are spread
    evenly over the text, each at a seeded offset in its part, and shuffled, so that any few of them
    are of all sources; no padding; each starts with BOS where the tokenizer adds it. Raises
    CalrError when there is no window's worth of text; warns when there are fewer windows than
    samples.
    """
    if isinstance(source, Tensor):
        shaped = source.dim() == 2 and source.shape[0] >= 1 and source.shape[1] >= 2
        if not shaped or source.is_floating_point() or int(source.min()) < 0:
            raise CalrError(
                f"calibration ids {list(source.shape)} {source.dtype}: must be integers "
                "[windows, tokens] with at least two tokens"
            )
        return source.long().cpu()
    tokenizer = tokenizer or tokenizer_of(model)
    parts = parts_of(source)
    counts = [samples // len(parts) + (i < samples % len(parts)) for i in range(len(parts))]
    windows = []
    for i, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if not count:
            continue
        if part == "sampled":
            rows = sample_from(model, tokenizer, count, window, seed + i, cache_bytes, natively)
            wrapped = count // 4
            windows.append(torch.cat([hard_wrapped(rows[:wrapped], tokenizer), rows[wrapped:]]))
        else:
            windows.append(spread_windows(part, tokenizer, count, window, seed + i))
    ids = torch.cat(windows)
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]


def evaluation_windows(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, windows: int, window: int
) -> Tensor:
    """Return the first consecutive windows of a text, [at most windows, window] int64 token ids.

    "builtin" here is the part of the built-in text that calibration never sees. Windows start with
    BOS where the tokenizer adds it, at the cost of one text token. Raises CalrError for "sampled"
    and for less than one window of text.
    """
    if isinstance(source, Tensor):
        return source[:windows].long().cpu()
    if source == "sampled":
        raise CalrError(
            "text: what the model samples says nothing about other text; name a file, a hub data "
            "set or builtin"
        )
    text = held_out_topics() if source == "builtin" else read_text(source, tokenizer)
    size = window - adds_bos(tokenizer)
    if size < 1 or window < 2:
        raise CalrError(f"window={window}: too few tokens to predict one; raise it")
    length = windows * size * CHARACTERS_PER_TOKEN
    ids = encode(tokenizer, text[:length])
    while len(ids) < windows * size and length < len(text):
        length *= 2
        ids = encode(tokenizer, text[:length])
    rows = cut(ids, size, tokenizer)[:windows]
    if not len(rows):
        raise CalrError(f"{name_of(source)}: has {len(ids)} tokens, not one window of {window}")
    return rows


def spread_windows(
    source: str | Path | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    window: int,
    seed: int,
) -> Tensor:
    """Take one window from each of `samples` equal parts of the text."""
    text = read_text(source, tokenizer)
    draw = random.Random(seed)
    size = window - adds_bos(tokenizer)
    part = len(text) // samples
    rows = []
    for i in range(samples):
        slack = max(0, part - size * CHARACTERS_PER_TOKEN)
        begin = i * part + draw.randrange(slack + 1)
        if begin:
            begin = max(begin, text.find(" ", begin, begin + 200))
        ids = encode(tokenizer, text[begin : min((i + 1) * part, begin + 8 * size)])
        for start in (begin, i * part):  # of text that makes few tokens all of the part
            if len(ids) < size:
                ids = encode(tokenizer, text[start : (i + 1) * part])
        if len(ids) < size:
            break
        rows.append(cut(ids[:size], size, tokenizer))
    if len(rows) == samples:
        return torch.cat(rows)
    found = spread(cut(encode(tokenizer, text), size, tokenizer), samples)
    if not len(found):
        raise CalrError(
            f"{name_of(source)}: too short for calibration, it has less than one window of "
            f"{window} tokens; give more text or a smaller window"
        )
    if len(found) < samples:
        logger.warning(
            f"{name_of(source)}: gives {len(found)} windows of {window} tokens, not {samples}; "
            "compressing with less calibration than asked for"
        )
    return found


def spread(ids: Tensor, count: int) -> Tensor:
    """Choose at most count windows of [S, T], evenly."""
    count = min(count, len(ids))
    return ids[torch.linspace(0, len(ids) - 1, count).round().long()]
