"""Which calibration text serves unseen text best: perplexity at keep 0.8 by the default method.

    python bench/calibration.py --model MODEL --data DIR

Writes bench/results/calibration.json row by row and prints a table. DIR as in bench/README.md, and
web/openwebtext_1000.jsonl, of whose pages the last 100 are used.
"""

import argparse
import copy
import json
from pathlib import Path

from texts import unseen_windows

import calr
from calr.evaluation import perplexity
from calr.text import evaluation_windows


def main() -> None:
    """Compress once per calibration text and measure on four others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--output", type=Path, default=Path("bench/results/calibration.json"))
    arguments = parser.parse_args()
    dense, tokenizer = calr.load(arguments.model)
    windows = unseen_windows(arguments.data, tokenizer)
    windows["builtin, held out"] = evaluation_windows("builtin", tokenizer, windows=20, window=512)
    wikitext = str(arguments.data / "wikitext2/wiki.train.tokens")
    sources = {
        "none (dense)": None,
        "WikiText-2 train": wikitext,
        "sampled": "sampled",
        "builtin": "builtin",
        "builtin and sampled": "builtin,sampled",
    }
    rows = []
    for name, source in sources.items():
        model = dense
        if source is not None:
            model = calr.compress(
                copy.deepcopy(dense),
                calr.Recipe(keep=arguments.keep, correction_tokens=0),
                calibration=source,
                tokenizer=tokenizer,
            )
        found = {text: round(perplexity(model, ids).perplexity, 2) for text, ids in windows.items()}
        rows.append({"calibration": name, "perplexity": found})
        print("|", name, "|", " | ".join(map(str, found.values())), "|", flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
