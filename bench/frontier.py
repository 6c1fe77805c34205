"""Bytes against quality: quantised models of several sizes, on text that nothing was fitted to.

    python bench/frontier.py --model MODEL --data DIR [--bits 6 5 4.5] [--tokens 0 65536] [--ladder]
        [--without "corrective path"]

Each cell, a budget in bits per parameter of the whole model and a number of tokens of correction
(0: none), is measured once and written to bench/results/frontier.json; a killed run continues.
Statistics and training are on web pages 0 to 899, never on the texts measured. --ladder: measure
llama.cpp's own quantisations of the same weights, too, in the same way (pip install
llama-cpp-python; MODEL must be a GGUF file then). The table has bytes of tensors, and on each text
the mean KL to the dense model in nats, the share of equal most probable tokens and the ratio of
perplexities; of a model of ours also its mean KL over that of llama.cpp's ladder at the same bytes
(ln KL interpolated between the two nearest rungs), and the tokens per second at which it decodes,
alone, in bfloat16 on this CPU with all threads. --plot draws KL against both. --without: measure
the same cells without a part of the method, too. An output holds the cells of one model and its
text: name another --output for another. See bench/README.md for DIR.
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from ladder import rungs
from ladder import tensor_bytes as ladder_bytes
from texts import HELD_OUT_PAGES, WINDOW, pages, unseen_windows, write_json

import calr
from calr import benchmark
from calr.evaluation import compare
from calr.model import gguf_files, recast, tensor_bytes
from calr.ranks import bits as ranks_bits
from calr.text import spread_windows
from calr.training import Primary

OUTPUT = Path("bench/results/frontier.json")
LONGEST = 250_000  # tokens of correction for which there is text: one text for every cell
# what --without leaves out, as what a budget may choose otherwise; where that is nothing, the part
# is a matter of the recipe or of the training
PARTS = {
    "corrective path": {"corrective_ranks": (0,)},
    "other levels than uniform ones": {
        "levels": {bits: "uniform" for bits in ranks_bits.BEST_LEVELS}
    },
    "widths but 4 and 8": {"levels": {4: "table", 8: "uniform"}},
    "rotation": {},
    "scale groups but 64": {},
    "trained scales": {},
}


def main() -> None:
    """Fill the cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="*", default=[8.5, 6.0, 5.0, 4.5, 4.0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[0])
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 of a text")
    parser.add_argument("--without", nargs="*", choices=PARTS, default=[])
    parser.add_argument("--statistics", type=Path, help="kept there for another run")
    parser.add_argument("--ladder", action="store_true", help="measure llama.cpp's rungs, too")
    parser.add_argument("--plot", type=Path, help="draw the table here (PNG)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    rows = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    dense, tokenizer = calr.load(arguments.model, dtype="float32")
    texts = unseen_windows(arguments.data, tokenizer, arguments.windows)
    count = 64 + max(LONGEST, *arguments.tokens) // WINDOW + 8
    text = pages(arguments.data)[:-HELD_OUT_PAGES]
    ids = spread_windows(text, tokenizer, count, WINDOW, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.statistics or Path(folder) / "statistics"
        for bits, tokens, without in itertools.product(
            arguments.bits, arguments.tokens, [None, *arguments.without]
        ):
            cell = {"bits": bits, "tokens": tokens, "windows": arguments.windows}
            cell |= {"without": without}
            if not any(cell.items() <= row.items() for row in rows):
                recipe = calr.Recipe(
                    bits=bits,
                    correction_tokens=tokens,
                    rotate=without != "rotation",  # which has statistics of its own
                    scale_group=64 if without == "scale groups but 64" else None,
                )
                kept = place if recipe.rotate else place.with_name(f"{place.name}-unrotated")
                with leaving_out(without):
                    found = measure(arguments.model, dense, recipe, ids, texts, kept)
                rows.append(cell | found)
                write_json(arguments.output, rows)
        if arguments.ladder:
            for name, file in rungs(gguf_files(arguments.model)[0], Path(folder)):
                cell = {"rung": name, "windows": arguments.windows}
                if not any(cell.items() <= row.items() for row in rows):
                    rows.append(cell | measure_rung(file, dense, texts))
                    write_json(arguments.output, rows)
    rows = [row for row in rows if row["windows"] == arguments.windows]
    table(rows)
    if arguments.plot:
        plot(rows, arguments.plot)


@contextlib.contextmanager
def leaving_out(part):
    """Have budgets choose, and the correction train, without a part of the method."""
    whole, made = ranks_bits.ANY, Primary.__init__

    def frozen(primary, *given):
        made(primary, *given)
        scales = primary.scales.detach()
        del primary.scales
        primary.register_buffer("scales", scales)

    ranks_bits.ANY = dataclasses.replace(whole, **PARTS[part]) if part else whole
    Primary.__init__ = frozen if part == "trained scales" else made
    try:
        yield
    finally:
        ranks_bits.ANY, Primary.__init__ = whole, made


def measure(source, dense, recipe, ids, texts, place):
    """Compress to a budget and compare with the dense model on each text."""
    started = time.monotonic()
    model, _ = calr.load(source, dtype="float32")
    calr.compress(model, recipe, calibration=ids, statistics=place)
    seconds = time.monotonic() - started
    found = {
        "correction": model.config.quantization_config.recipe.get("correction"),
        "seconds": round(seconds),
    }
    recast(model, torch.bfloat16)  # as `calr compress` stores it
    size = tensor_bytes(model)
    found |= {"tokens_per_second": decoding(model), "threads": torch.get_num_threads()}
    model = model.float().dequantize()  # the same function, and faster where there is no kernel
    return found | against(model, dense, size, texts)


def decoding(model):
    """Return how many tokens a second a model gives, one sequence, on the native kernels."""
    fast = calr.optimize_for_inference(copy.deepcopy(model).eval(), pack=True)
    (row,) = benchmark.bench({"": fast}, prompt=16, new_tokens=128, rounds=5)
    return round(row["decode_tokens_per_second"]["median"], 1)


def measure_rung(file, dense, texts):
    """Compare a GGUF file, dequantised, with the dense model on each text."""
    model, _ = calr.load(str(file), dtype="float32")
    return against(model, dense, ladder_bytes(file), texts)


def against(model, dense, size, texts):
    """Compare a model of some bytes with the dense one."""
    parameters = sum(p.numel() for p in dense.parameters())
    found = {"tensor_bytes": size, "bits_per_parameter": 8 * size / parameters}
    found["texts"] = {
        name: dataclasses.asdict(compare(model, dense, windows)) for name, windows in texts.items()
    }
    gc.collect()
    return found


def mean_kl(row: dict) -> float:
    """Return a row's KL, the mean over its texts."""
    return statistics.mean(text["kl"] for text in row["texts"].values())


def over_ladder(row: dict, rows: list[dict]) -> str:
    """Return a row's KL over that of the ladder at its bytes; nothing for a rung itself."""
    ladder = sorted((r["tensor_bytes"], math.log(mean_kl(r))) for r in rows if "rung" in r)
    at = row["tensor_bytes"]
    if "rung" in row or not ladder:
        return ""
    below = [r for r in ladder if r[0] <= at]
    above = [r for r in ladder if r[0] > at]
    if not below or not above:
        return "no rung"
    (x, a), (y, b) = below[-1], above[0]
    return f"{mean_kl(row) / math.exp(a + (b - a) * (at - x) / (y - x)):.2f}"


def table(rows: list[dict]) -> None:
    """Print a row a cell, the largest first."""
    names = list(rows[0]["texts"])
    print(f"| | bits | MB | {' | '.join(names)} | mean KL | over the ladder | tokens/s |")
    print("|" + "---|" * (6 + len(names)))
    for row in sorted(rows, key=lambda row: -row["tensor_bytes"]):
        cells = [
            f"{t['kl']:.4f}, {t['agreement']:.3f}, {t['ratio']:.3f}" for t in row["texts"].values()
        ]
        megabytes = f"{row['tensor_bytes'] / 1e6:.1f}"
        name = row.get("rung") or label(row)
        print(
            f"| {name} | {row['bits_per_parameter']:.2f} | {megabytes} | {' | '.join(cells)} | "
            f"{mean_kl(row):.4f} | {over_ladder(row, rows)} | {row.get('tokens_per_second', '')} |"
        )


def label(row: dict) -> str:
    """Name a row of ours."""
    without = f", without {row['without']}" if row["without"] else ""
    return f"calr, {row['tokens']:,} tokens{without}"


def plot(rows: list[dict], file: Path) -> None:
    """Draw mean KL against bytes, and against tokens per second where they are known.

    Of the whole method: what leaves a part of it out is in the table alone.
    """
    import matplotlib.pyplot as plt

    rows = [row for row in rows if not row.get("without")]
    timed = [row for row in rows if "tokens_per_second" in row]
    figure, axes = plt.subplots(1, 2 if timed else 1, figsize=(11, 4.5), sharey=True, squeeze=False)
    left = axes[0, 0]
    groups: dict[str, list[dict]] = {}
    for row in rows:
        name = "llama.cpp" if "rung" in row else label(row)
        groups.setdefault(name, []).append(row)
    for name, members in groups.items():
        style = "x" if name == "llama.cpp" else "o-"
        members.sort(key=lambda row: row["tensor_bytes"])
        points = [(row["tensor_bytes"] / 1e6, mean_kl(row)) for row in members]
        left.plot(*zip(*points, strict=True), style, label=name)
        if timed:
            plot_speeds(axes[0, 1], [row for row in members if row in timed], style)
    for row in groups.get("llama.cpp", []):
        if "," not in row["rung"]:
            left.annotate(row["rung"], (row["tensor_bytes"] / 1e6, mean_kl(row)), fontsize=7)
    left.set(xlabel="MB of tensors", ylabel="mean KL to the dense model, nats", yscale="log")
    left.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")


def plot_speeds(axes, rows: list[dict], style: str) -> None:
    """Draw mean KL against tokens per second."""
    axes.plot([row["tokens_per_second"] for row in rows], [mean_kl(row) for row in rows], style)
    for row in rows:
        place = row["tokens_per_second"], mean_kl(row)
        axes.annotate(f"{row['bits_per_parameter']:.1f} bits", place, fontsize=7)
    axes.set(xlabel="tokens per second, one sequence on a CPU")


if __name__ == "__main__":
    main()
