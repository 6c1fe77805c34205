"""Calibration and evaluation text: from a source to windows of token ids.

A source is a text file, FILE.jsonl or a `datasets` hub id (NAME[:CONFIG][:SPLIT]), the latter two
with an optional #field (default text); "sampled", text sampled from the model itself, a quarter of
it hard-wrapped; "builtin", English reference text that every Python installation carries; or
several of these separated by commas, in equal shares.
"""

import hashlib
import json
import random
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from calr.errors import CalrError

HELD_OUT = 5  # one fifth of the built-in text is kept from calibration, for evaluation
CACHE_BYTES = 2 << 30
CHARACTERS_PER_TOKEN = 8  # generous first guess of how much text a window needs
FILES = {".txt", ".json", ".jsonl", ".md", ".raw", ".tokens", ".text"}  # hub ids have dots, too
LINES = (60, 80)  # shortest and longest lines, in characters, of hard-wrapped text
Source = str | Path | Sequence[str] | Tensor

logger = logging.get_logger(__name__)


def calibration_windows(
    source: Source | None,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    *,
    samples: int,
    window: int,
    seed: int,
) -> Tensor:
    """Return [samples, window] int64 token ids, the same for the same arguments.

    source: a source string or path (see the module), a list of texts, or ids [S, T], which are used
    as they are. None is "sampled". Windows are spread evenly over the text, each at a seeded offset
    in its part, and shuffled, so that any few of them are of all sources; no padding; each starts
    with BOS where the tokenizer adds it. Raises CalrError when there is no window's worth of text;
    warns when there are fewer windows than samples.
    """
    if isinstance(source, Tensor):
        shaped = source.dim() == 2 and source.shape[0] >= 1 and source.shape[1] >= 2
        if not shaped or source.is_floating_point() or int(source.min()) < 0:
            raise CalrError(
                f"calibration ids {list(source.shape)} {source.dtype}: must be integers "
                "[windows, tokens] with at least two tokens"
            )
        return source.long().cpu()
    tokenizer = tokenizer or _tokenizer_of(model)
    parts = parts_of(source)
    counts = [samples // len(parts) + (i < samples % len(parts)) for i in range(len(parts))]
    windows = []
    for i, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if not count:
            continue
        if part == "sampled":
            rows = sample_from(model, tokenizer, count, window, seed + i)
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
    text = held_out_topics() if source == "builtin" else read_text(source)
    size = window - _adds_bos(tokenizer)
    if size < 1 or window < 2:
        raise CalrError(f"window={window}: too few tokens to predict one; raise it")
    length = windows * size * CHARACTERS_PER_TOKEN
    ids = _encode(tokenizer, text[:length])
    while len(ids) < windows * size and length < len(text):
        length *= 2
        ids = _encode(tokenizer, text[:length])
    rows = _cut(ids, size, tokenizer)[:windows]
    if not len(rows):
        raise CalrError(f"{_name(source)}: has {len(ids)} tokens, not one window of {window}")
    return rows


def sample_from(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: int, window: int, seed: int
) -> Tensor:
    """Let the model write its own calibration text: [samples, window] ids, at temperature 1.

    Each window starts with BOS where the tokenizer adds it, then a token drawn uniformly
    (as in LLM-QAT, arXiv 2305.17888).
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings: Any = model.get_input_embeddings()
    usable = set(range(min(len(tokenizer), embeddings.num_embeddings)))
    ordinary = torch.tensor(sorted(usable - set(tokenizer.all_special_ids)))
    start = ordinary[torch.randint(len(ordinary), (samples, 1), generator=generator)]
    if _adds_bos(tokenizer):
        start = torch.cat([torch.full_like(start, tokenizer.bos_token_id), start], 1)
    length = window - start.shape[1]
    own, generate = model.generation_config, cast(Any, model.generate)
    rows = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        try:
            # none of the model's own penalties and filters: plain sampling from its distribution
            model.generation_config = GenerationConfig(
                do_sample=True,
                top_k=0,
                min_new_tokens=length,
                max_new_tokens=length,
                eos_token_id=own.eos_token_id if own else None,
                pad_token_id=0,
            )
            for batch in logging.tqdm(
                start.split(_sampling_batch(model, window)), desc="sampling text", unit="batch"
            ):
                mask = torch.ones_like(batch, device=model.device)
                rows.append(generate(batch.to(model.device), attention_mask=mask).cpu())
        finally:
            model.generation_config = own
    return torch.cat(rows)


def hard_wrapped(windows: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Break the lines of windows [S, T] at 60 to 80 characters, as books, mail and comments are.

    Another length for each window, in turn. A window keeps its length: line breaks push text out at
    its end. One that would become shorter stays as it is.
    """
    start = _adds_bos(tokenizer)
    result = windows.clone()
    for i, row in enumerate(windows):
        wrap = textwrap.TextWrapper(
            LINES[0] + i % (LINES[1] - LINES[0] + 1),
            expand_tabs=False,
            replace_whitespace=False,
            break_long_words=False,
            break_on_hyphens=False,
        )
        text = str(tokenizer.decode(row[start:]))
        ids = _encode(tokenizer, "\n".join(wrap.fill(line) for line in text.split("\n")))
        if len(ids) >= len(row) - start:
            result[i, start:] = ids[: len(row) - start]
    return result


def _sampling_batch(model: PreTrainedModel, window: int) -> int:
    """Return how many windows to sample at once, for a key-value cache of at most 2 GiB."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * size * window * model.dtype.itemsize
    return int(max(1, min(64, CACHE_BYTES // cache)))


def read_text(source: str | Path | Sequence[str]) -> str:
    """Read a text, jsonl or hub source, or join a list of texts, into one string."""
    if not isinstance(source, str | Path):
        return "\n\n".join(source)
    if source == "builtin":
        return calibration_topics()
    name, _, field = str(source).partition("#")
    path = Path(name)
    if path.is_dir():
        raise CalrError(f"{source}: is a directory; name a text or jsonl file")
    if path.exists():
        try:
            if path.suffix == ".jsonl":
                return "\n\n".join(_jsonl(path, field or "text"))
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CalrError(f"{source}: cannot be read as text: {error}") from error
    if path.suffix in FILES or name.startswith((".", "/")):
        raise CalrError(f"{source}: no such file")
    return "\n\n".join(_hub(name, field or "text"))


def calibration_topics() -> str:
    """The built-in English text for calibration: the first four fifths of pydoc's topics."""
    paragraphs = _topics()
    return "\n\n".join(paragraphs[: -len(paragraphs) // HELD_OUT])


def held_out_topics() -> str:
    """The built-in English text that calibration never sees: the last fifth of pydoc's topics."""
    paragraphs = _topics()
    return "\n\n".join(paragraphs[-len(paragraphs) // HELD_OUT :])


def _topics() -> list[str]:
    """Return the paragraphs in order, each once: topics repeat one another's text."""
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[key] for key in sorted(topics)).split("\n\n")
    return list(dict.fromkeys(paragraphs))


def parts_of(source: str | Path | Sequence[str] | None) -> list[str | Path | Sequence[str]]:
    """Split a source string at its commas, unless it is a file's name; None is "sampled"."""
    if source is None:
        return ["sampled"]
    if isinstance(source, str) and "," in source and not Path(source).exists():
        parts = [part.strip() for part in source.split(",") if part.strip()]
        if not parts:
            raise CalrError(f"calibration={source!r}: names no text")
        return list(parts)
    return [source]


def content_of(source: str | Path | Sequence[str] | None) -> str:
    """Identify text by what its files hold; by name where it is no file (builtin is Python's)."""
    digests = []
    for part in parts_of(source):
        path = Path(str(part).partition("#")[0])
        if isinstance(part, str | Path) and path.is_file():
            digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return f"{source} {digests} {sys.version_info[:2]}"


def spread_windows(
    source: str | Path | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    window: int,
    seed: int,
) -> Tensor:
    """Take one window from each of `samples` equal parts of the text."""
    text = read_text(source)
    draw = random.Random(seed)
    size = window - _adds_bos(tokenizer)
    part = len(text) // samples
    rows = []
    for i in range(samples):
        slack = max(0, part - size * CHARACTERS_PER_TOKEN)
        begin = i * part + draw.randrange(slack + 1)
        if begin:
            begin = max(begin, text.find(" ", begin, begin + 200))
        ids = _encode(tokenizer, text[begin : min((i + 1) * part, begin + 8 * size)])
        if len(ids) < size:
            ids = _encode(tokenizer, text[begin : (i + 1) * part])
        if len(ids) < size:
            break
        rows.append(_cut(ids[:size], size, tokenizer))
    if len(rows) == samples:
        return torch.cat(rows)
    found = _cut(_encode(tokenizer, text), size, tokenizer)[:samples]
    if not len(found):
        raise CalrError(
            f"{_name(source)}: too short for calibration, it has less than one window of {window} "
            "tokens; give more text or a smaller window"
        )
    if len(found) < samples:
        logger.warning(
            f"{_name(source)}: gives {len(found)} windows of {window} tokens, not {samples}; "
            "compressing with less calibration than asked for"
        )
    return found


def _cut(ids: Tensor, size: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Cut ids into rows of size tokens, drop the rest, prepend BOS where the tokenizer does."""
    rows = ids[: len(ids) // size * size].view(-1, size)
    if _adds_bos(tokenizer):
        rows = torch.cat([torch.full_like(rows[:, :1], tokenizer.bos_token_id), rows], 1)
    return rows


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> int:
    bos = tokenizer.bos_token_id
    return int(bos is not None and tokenizer("a")["input_ids"][:1] == [bos])


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _jsonl(path: Path, field: str) -> list[str]:
    texts = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                texts.append(str(json.loads(line)[field]))
            except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
                raise CalrError(
                    f"{path} line {number}: no JSON object with a field {field!r}; name the field "
                    f"as {path.name}#field"
                ) from error
    return texts


def _hub(name: str, field: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise CalrError(
            f"{name}: is no file; for a hub data set install datasets (pip install datasets)"
        ) from error
    identifier, config, split = ([*name.split(":"), None, None])[:3]
    try:
        rows = datasets.load_dataset(identifier, config, split=split or "train")
        return [str(text) for text in rows[field]]
    except Exception as error:  # datasets raises many kinds, all mean the same here
        raise CalrError(f"{name}: neither a file nor a loadable data set: {error}") from error


def _name(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else "calibration"


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError, TypeError) as error:
        raise CalrError(
            f"tokenizer: none was given and {model.name_or_path!r} has none; pass tokenizer=, or "
            "token ids as calibration"
        ) from error
