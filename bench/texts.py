"""The texts of the benchmarks: a mixture to calibrate on, and others that are only measured on."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calr.text import evaluation_windows, hard_wrapped, spread_windows

WINDOW = 512
WINDOWS = 804  # of the mixture: 407,552 tokens to train on, and eight windows to choose by
HELD_OUT_PAGES = 100


def mixture(
    data: Path, tokenizer: PreTrainedTokenizerBase, windows: int = WINDOWS, *, wrapped: bool = False
) -> Tensor:
    """Return shuffled windows [windows, 512]: three quarters web pages, the rest WikiText-2 train.

    data is laid out as in bench/README.md. wrapped: with the first quarter hard-wrapped.
    """
    wikitext = str(data / "wikitext2/wiki.train.tokens")
    shares = ((pages(data)[:-HELD_OUT_PAGES], windows - windows // 4), (wikitext, windows // 4))
    ids = torch.cat(
        [spread_windows(text, tokenizer, count, WINDOW, seed=0) for text, count in shares]
    )
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    first = windows // 4 if wrapped else 0
    return torch.cat([hard_wrapped(ids[:first], tokenizer), ids[first:]])


def unseen_windows(
    data: Path, tokenizer: PreTrainedTokenizerBase, windows: int = 20
) -> dict[str, Tensor]:
    """Return the first windows of 512 tokens of each text."""
    texts = {
        "WikiText-2 raw test": data / "wikitext2/wiki.test.raw",
        "web pages": pages(data)[-HELD_OUT_PAGES:],
        "Sherlock Holmes": data / "books/The-Adventures-of-Sherlock-Holmes_1661.txt",
    }
    return {
        name: evaluation_windows(text, tokenizer, windows=windows, window=WINDOW)
        for name, text in texts.items()
    }


def write_json(path: Path, rows: object) -> None:
    """Replace a results file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows, indent=1))
    temporary.rename(path)


def pages(data: Path) -> list[str]:
    """Return the web pages; the last HELD_OUT_PAGES are only measured on."""
    lines = (data / "web/openwebtext_1000.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]
