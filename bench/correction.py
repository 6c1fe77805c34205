"""Perplexity against the tokens that correction trains on, at several sizes.

    python bench/correction.py --model MODEL --data DIR

Calibration and training text is a mixture: 3 parts of web pages, 1 of WikiText-2 train; measured on
20 windows each of WikiText-2 raw test, held-out web pages and Sherlock Holmes (DIR as in
bench/README.md). Cells go to bench/results/correction.json as they are measured, and are reused.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from texts import unseen_windows

import calr
from calr.correction import HELD_OUT
from calr.evaluation import perplexity
from calr.text import calibration_windows

WINDOW = 512


def mixture(model, tokenizer, data: Path, windows: int) -> torch.Tensor:
    """Return shuffled windows [windows, WINDOW]: three quarters web pages, the rest WikiText-2."""
    pages = (data / "web/openwebtext_1000.jsonl").read_text().splitlines()[:900]
    web = [json.loads(page)["text"] for page in pages]
    shares = (
        (web, windows - windows // 4),
        (str(data / "wikitext2/wiki.train.tokens"), windows // 4),
    )
    ids = torch.cat(
        [
            calibration_windows(text, tokenizer, model, samples=count, window=WINDOW, seed=0)
            for text, count in shares
        ]
    )
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


def main() -> None:
    """Fill the cells and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--tokens", type=int, nargs="+", default=[0, 32_768])
    parser.add_argument("--statistics", default="bench/results/statistics-mixture")
    parser.add_argument("--output", type=Path, default=Path("bench/results/correction.json"))
    arguments = parser.parse_args()
    rows = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    dense, tokenizer = calr.load(arguments.model)
    measured = unseen_windows(arguments.data, tokenizer)
    ids = mixture(dense, tokenizer, arguments.data, max(arguments.tokens) // WINDOW + HELD_OUT)
    cells = [(1.0, 0), *((keep, tokens) for keep in arguments.keep for tokens in arguments.tokens)]
    for keep, tokens in cells:
        if any((row["keep"], row["tokens"]) == (keep, tokens) for row in rows):
            continue
        started, model, done = time.monotonic(), dense, {}
        if keep < 1:
            model = calr.compress(
                copy.deepcopy(dense),
                calr.Recipe(keep=keep, correction_tokens=tokens),
                calibration=ids,
                tokenizer=tokenizer,
                statistics=arguments.statistics,
            )
            done = model.config.quantization_config.recipe.get("correction", {})
        seconds = time.monotonic() - started
        found = {name: perplexity(model, windows).perplexity for name, windows in measured.items()}
        rows.append(
            {"keep": keep, "tokens": tokens, "seconds": seconds, "perplexity": found, **done}
        )
        print(
            f"| {keep} | {tokens:,} | "
            + " | ".join(f"{value:.2f}" for value in found.values())
            + f" | {seconds:.0f} s |",
            flush=True,
        )
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = arguments.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(rows, indent=1))
        temporary.rename(arguments.output)


if __name__ == "__main__":
    main()
