"""What each part of CALR contributes at one size: perplexity only.

    python bench/quality/ablation.py --model MODEL --data DIR

Each line that starts with + adds to the one before; the others say what they have. Cells go to
ablation.json as they are measured and are reused.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path

from methods import SAMPLES, Bench

sys.path.insert(0, str(Path(__file__).parents[1]))

from texts import WINDOW, mixture, unseen_windows, write_json

import calr
from calr.evaluation import perplexity
from calr.text import spread_windows
from calr.training import mixed

ONE_SIDED = {"method": "svd_llm", "layout": "two_factor", "allocation": "uniform"}
PIVOTED = {"method": "svd_llm", "allocation": "uniform"}
SHIFTED = {"shifted_inputs": True}
TRAINED = {"block_epochs": 1}
STEPS = [  # what it adds, its text, options of the recipe, whether it is healed
    ("one-sided truncation, two factors, uniform ranks", "WikiText-2", ONE_SIDED, False),
    ("+ pivoted", "WikiText-2", PIVOTED, False),
    ("+ loss-aware allocation", "WikiText-2", {"method": "svd_llm"}, False),
    ("+ two-sided truncation", "WikiText-2", {}, False),
    ("+ mixed calibration", "mixture", {}, False),
    ("mixed calibration + shifted inputs", "mixture", SHIFTED, False),
    ("mixed calibration + distillation of all factors", "mixture", {}, True),
    ("mixed calibration + half cross-entropy", "mixture", {"cross_entropy": 0.5}, True),
    ("mixed calibration + block-wise training", "mixture", TRAINED, False),
    ("+ distillation of all factors", "mixture", TRAINED, True),
    ("shifted inputs + block-wise training", "mixture", SHIFTED | TRAINED, False),
    ("both of them + distillation of all factors", "mixture", SHIFTED | TRAINED, True),
]


def main() -> None:
    """Fill the cells and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--tokens", type=int, default=24_576)
    parser.add_argument("--work", type=Path, default=Path("bench/quality/work"))
    parser.add_argument("--output", type=Path, default=Path("bench/quality/ablation.json"))
    arguments = parser.parse_args()
    dense, tokenizer = calr.load(arguments.model)
    texts = unseen_windows(arguments.data, tokenizer)
    wikitext = str(arguments.data / "wikitext2/wiki.train.tokens")
    calibration = {
        "WikiText-2": spread_windows(wikitext, tokenizer, SAMPLES, WINDOW, seed=0),
        "mixture": mixture(arguments.data, tokenizer),
    }
    homes = {"WikiText-2": "statistics-wikitext2", "mixture": "statistics"}
    rows = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for name, text, options, healed in STEPS:
        tokens = arguments.tokens if healed else 0
        key = {"step": name, "keep": arguments.keep, "healed_tokens": tokens}
        if any(key.items() <= row.items() for row in rows):
            continue
        bench = Bench(dense, calibration[text], arguments.work / homes[text])
        started = time.monotonic()
        model = bench.build("CALR", arguments.keep, tokens, **options).eval()
        row = key | {"calibration": text, "seconds": round(time.monotonic() - started, 1)}
        with mixed(model):
            row["perplexity"] = {t: perplexity(model, w).perplexity for t, w in texts.items()}
        rows.append(row)
        write_json(arguments.output, rows)
        cells = [name, text, f"{tokens:,}", *(f"{p:.2f}" for p in row["perplexity"].values())]
        print(f"| {' | '.join(cells)} |", flush=True)
        del model
        gc.collect()


if __name__ == "__main__":
    main()
