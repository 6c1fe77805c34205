"""The texts that benchmarks measure on and never calibrate on."""

import json
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calr.text import evaluation_windows


def unseen_windows(data: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Return 20 windows of 512 tokens of each text; data is laid out as in bench/README.md."""
    pages = (data / "web/openwebtext_1000.jsonl").read_text().splitlines()[900:]
    texts = {
        "WikiText-2 raw test": data / "wikitext2/wiki.test.raw",
        "web pages": [json.loads(page)["text"] for page in pages],
        "Sherlock Holmes": data / "books/The-Adventures-of-Sherlock-Holmes_1661.txt",
    }
    return {
        name: evaluation_windows(text, tokenizer, windows=20, window=512)
        for name, text in texts.items()
    }
