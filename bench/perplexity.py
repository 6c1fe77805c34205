"""Token perplexity of every method at keep 0.8 and 0.6: the table of the README.

    python bench/perplexity.py --model MODEL --data DIR

DIR holds wikitext2/wiki.train.tokens, wikitext2/wiki.test.raw, wikitext2/wiki.test.tokens and
books/The-Adventures-of-Sherlock-Holmes_1661.txt (see bench/README.md for where to get them).
Every cell is written to the JSON file as soon as it is measured and reused by the next run.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import calr
from calr.evaluation import perplexity
from calr.text import evaluation_windows

METHODS = {
    "plain SVD, two factors, uniform": {"method": "svd", "layout": "two_factor"},
    "output norm, two factors, uniform": {"method": "svd_llm", "layout": "two_factor"},
    "output norm, pivoted, uniform": {"method": "svd_llm"},
    "ERC-SVD, two factors, uniform": {"method": "erc_svd", "layout": "two_factor"},
    "ERC-SVD, two factors, last k": {
        "method": "erc_svd",
        "layout": "two_factor",
        "allocation": "last_k",
    },
    "output norm, pivoted, global by gradient": {"method": "svd_llm", "allocation": "global"},
    "two-sided, pivoted, global (default)": {"method": "calr", "allocation": "global"},
}
TEXTS = {
    "WikiText-2 raw": ("wikitext2/wiki.test.raw", 40),
    "Sherlock Holmes": ("books/The-Adventures-of-Sherlock-Holmes_1661.txt", 40),
    "WikiText-2 tokenised, 20 windows": ("wikitext2/wiki.test.tokens", 20),
}


def main() -> None:
    """Fill the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--statistics", default="bench/results/statistics")
    parser.add_argument("--output", type=Path, default=Path("bench/results/perplexity.json"))
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    done = {(row["method"], row["keep"]) for row in rows}
    dense, tokenizer = calr.load(arguments.model)
    windows = {
        name: evaluation_windows(arguments.data / file, tokenizer, windows=count, window=512)
        for name, (file, count) in TEXTS.items()
    }
    cells = [("dense", 1.0), *((name, keep) for keep in arguments.keep for name in METHODS)]
    for name, keep in cells:
        if (name, keep) in done:
            continue
        started, model = time.monotonic(), dense
        if name != "dense":
            options = {"allocation": "uniform"} | METHODS[name]
            model = calr.compress(
                copy.deepcopy(dense),
                calr.Recipe(keep=keep, correction_tokens=0, **options),
                calibration=arguments.data / "wikitext2/wiki.train.tokens",
                tokenizer=tokenizer,
                statistics=arguments.statistics,
            )
        seconds = time.monotonic() - started
        row = {
            "method": name,
            "keep": keep,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": round(seconds, 1),
            "perplexity": {
                text: round(perplexity(model, ids).perplexity, 2) for text, ids in windows.items()
            },
        }
        rows.append(row)
        arguments.output.write_text(json.dumps(rows, indent=1))
        print(row, flush=True)
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Format the rows as markdown."""
    lines = [f"| keep | method | {' | '.join(TEXTS)} |", "|---|---|" + "---|" * len(TEXTS)]
    for row in sorted(rows, key=lambda row: -row["keep"]):
        shown = [
            f"{value:.4g}" if value < 1e5 else f"{value:.1e}"
            for value in row["perplexity"].values()
        ]
        lines.append(f"| {row['keep']} | {row['method']} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
