"""Which calibration text serves unseen text best: perplexity at keep 0.8 by the default method.

    python bench/calibration.py --model MODEL --data DIR

Rows go to bench/results/calibration.json as they are measured and are reused. DIR as in
bench/README.md.
"""

import argparse
import copy
import json
from functools import partial
from pathlib import Path

from texts import WINDOW, unseen_windows, write_json

import calr
from calr.evaluation import perplexity
from calr.text import evaluation_windows, sample_from


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
    windows["builtin, held out"] = evaluation_windows(
        "builtin", tokenizer, windows=20, window=WINDOW
    )
    wikitext = str(arguments.data / "wikitext2/wiki.train.tokens")
    recipe = calr.Recipe(keep=arguments.keep, correction_tokens=0)
    sample = partial(sample_from, dense, tokenizer, recipe.samples, recipe.window, recipe.seed)
    sources = {
        "none (dense)": None,
        "WikiText-2 train": wikitext,
        "sampled": "sampled",
        "sampled, no line wrapped": sample,
        "builtin": "builtin",
    }
    rows = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for name, source in sources.items():
        if any(row["calibration"] == name for row in rows):
            continue
        model = dense
        if source is not None:
            calibration = source() if callable(source) else source
            model = calr.compress(
                copy.deepcopy(dense), recipe, calibration=calibration, tokenizer=tokenizer
            )
        found = {text: round(perplexity(model, ids).perplexity, 2) for text, ids in windows.items()}
        rows.append({"calibration": name, "perplexity": found})
        print("|", name, "|", " | ".join(map(str, found.values())), "|", flush=True)
        write_json(arguments.output, rows)


if __name__ == "__main__":
    main()
