"""Bytes against quality: quantised models of several sizes, on text that nothing was fitted to.

    python bench/frontier.py --model MODEL --data DIR [--bits 6 5 4.5] [--tokens 0 65536]

Each cell, a budget in bits per parameter of the whole model and a number of tokens on which the
norms are trained (0: none), is measured once and written to bench/results/frontier.json; a killed
run continues. Statistics and training are on web pages 0 to 899, never on the texts measured. Then
the table is printed: bytes of tensors, and on each text the mean KL to the dense model in nats, the
share of equal most probable tokens and the ratio of perplexities. See bench/README.md for DIR.
"""

import argparse
import dataclasses
import gc
import json
import tempfile
import time
from pathlib import Path

from texts import HELD_OUT_PAGES, WINDOW, pages, unseen_windows, write_json

import calr
from calr.evaluation import compare
from calr.model import tensor_bytes
from calr.text import spread_windows

OUTPUT = Path("bench/results/frontier.json")


def main() -> None:
    """Fill the cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="*", default=[8.5, 6.0, 5.0, 4.5, 4.0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[0])
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 of a text")
    parser.add_argument("--statistics", type=Path, help="kept there for another run")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    rows = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    dense, tokenizer = calr.load(arguments.model)
    texts = unseen_windows(arguments.data, tokenizer, arguments.windows)
    count = 64 + max(arguments.tokens) // WINDOW + 8
    text = pages(arguments.data)[:-HELD_OUT_PAGES]
    ids = spread_windows(text, tokenizer, count, WINDOW, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.statistics or Path(folder) / "statistics"
        for bits in arguments.bits:
            for tokens in arguments.tokens:
                cell = {"bits": bits, "tokens": tokens, "windows": arguments.windows}
                if any(cell.items() <= row.items() for row in rows):
                    continue
                rows.append(cell | measure(arguments.model, dense, bits, tokens, ids, texts, place))
                write_json(arguments.output, rows)
    table(rows)


def measure(source, dense, bits, tokens, ids, texts, statistics):
    """Compress to a budget and compare with the dense model on each text."""
    started = time.monotonic()
    model, _ = calr.load(source)
    recipe = calr.Recipe(bits=bits, correction_tokens=tokens)
    calr.compress(model, recipe, calibration=ids, statistics=statistics)
    seconds = time.monotonic() - started
    size, parameters = tensor_bytes(model), sum(p.numel() for p in dense.parameters())
    found = {
        "tensor_bytes": size,
        "bits_per_parameter": 8 * size / parameters,
        "correction": model.config.quantization_config.recipe.get("correction"),
        "seconds": round(seconds),
    }
    model = model.dequantize()  # the same function, and faster where there is no kernel
    found["texts"] = {
        name: dataclasses.asdict(compare(model, dense, windows)) for name, windows in texts.items()
    }
    del model
    gc.collect()
    return found


def table(rows: list[dict]) -> None:
    """Print a row a cell, the largest first."""
    names = list(rows[0]["texts"])
    print(f"| bits | MB | tokens trained on | {' | '.join(names)} |")
    print("|" + "---|" * (3 + len(names)))
    for row in sorted(rows, key=lambda row: (-row["bits"], row["tokens"])):
        cells = [
            f"{t['kl']:.4f}, {t['agreement']:.3f}, {t['ratio']:.3f}" for t in row["texts"].values()
        ]
        megabytes = f"{row['tensor_bytes'] / 1e6:.1f}"
        print(
            f"| {row['bits_per_parameter']:.2f} | {megabytes} | {row['tokens']} | "
            f"{' | '.join(cells)} |"
        )


if __name__ == "__main__":
    main()
