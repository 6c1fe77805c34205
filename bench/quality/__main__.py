"""Compare methods at several sizes: perplexity on text that no method saw, zero-shot accuracy.

    python bench/quality --model MODEL --data DIR

Every cell is measured once and written to quality.json at once; a killed run continues, and several
runs may fill different cells side by side. Then the tables are printed and the plot drawn. Models
are measured in bfloat16 products where the machine is fast at them. See bench/README.md for DIR and
for what the grid costs.
"""

import argparse
import gc
import json
import shutil
import sys
import time
from pathlib import Path

import torch
from filelock import FileLock
from methods import LONGER, METHODS, Bench, stored_parameters
from report import draw, tables

sys.path.insert(0, str(Path(__file__).parents[1]))

from texts import mixture, unseen_windows, write_json

import calr
from calr.evaluation import perplexity
from calr.integrations.lm_eval import evaluate
from calr.model import analyse
from calr.training import mixed

TASKS = ["arc_easy", "arc_challenge", "piqa", "hellaswag", "lambada_openai", "boolq", "sciq"]
EVERY = list(dict.fromkeys([*METHODS, *LONGER]))
REMOVED = (0.2693, 0.5177)  # of the whole model: the points of CALR's paper
COMMON = 81_920  # tokens on which every method is healed
LONG = 409_600  # and CALR's own, longer, correction: a quarter of its text is hard-wrapped


def grid(keeps: list[float]) -> list[tuple[str, float, int]]:
    """List the cells (method, keep, healed tokens): the most telling first."""
    smallest = min(keeps)
    cells = [("dense", 1.0, 0)]
    cells += [(method, keep, 0) for keep in keeps for method in reversed(METHODS)]
    cells += [(method, keep, COMMON) for keep in (0.8, smallest) for method in reversed(METHODS)]
    cells += [(method, keep, LONG) for keep in (0.8, 0.6) for method in LONGER]
    return cells


def main() -> None:
    """Fill the cells, print the tables, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100, help="first rows of a task; 0: all")
    parser.add_argument("--windows", type=int, default=20, help="windows of 512 of a text; 0: all")
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--methods", nargs="*", choices=EVERY, default=EVERY)
    parser.add_argument("--healed", type=int, nargs="*", help="only cells with so many tokens")
    parser.add_argument("--keep", type=float, nargs="*", help="only cells nearest to these")
    parser.add_argument("--work", type=Path, default=Path("bench/quality/work"))
    parser.add_argument("--output", type=Path, default=Path("bench/quality/quality.json"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    dense, tokenizer = calr.load(arguments.model)
    structure = analyse(dense)
    share = structure.model_parameters / structure.linear_parameters
    keeps = [0.8, 0.6, *(round(1 - removed * share, 4) for removed in REMOVED)]
    wanted = [min(keeps, key=lambda k: abs(k - asked)) for asked in arguments.keep or keeps]
    common = Bench(dense, mixture(arguments.data, tokenizer), arguments.work / "statistics")
    wrapped = mixture(arguments.data, tokenizer, wrapped=True)
    own = Bench(dense, wrapped, arguments.work / "statistics-wrapped")
    same = {name: getattr(arguments, name) for name in ("rows", "windows")}
    same["model"] = Path(arguments.model).name
    texts = unseen_windows(arguments.data, tokenizer, arguments.windows or 10**6)
    for method, keep, tokens in grid(keeps):
        if method not in ["dense", *arguments.methods]:
            continue
        if method != "dense" and tokens not in (arguments.healed or [tokens]):
            continue
        if method != "dense" and keep not in wanted:
            continue
        key = same | {"method": method, "healed_tokens": tokens, "keep": keep}
        row = next((row for row in read(arguments.output) if key.items() <= row.items()), None)
        if row is not None and set(arguments.tasks) <= set(row["accuracy"]):
            continue
        bench = own if tokens == LONG else common
        model, seconds = (dense, 0) if method == "dense" else built(bench, key, arguments.work)
        if row is None:
            row = key | {"params": stored_parameters(model), "seconds": seconds, "accuracy": {}}
            with mixed(model):
                row["perplexity"] = {t: perplexity(model, w).perplexity for t, w in texts.items()}
            record(arguments.output, row)
        missing = [task for task in arguments.tasks if task not in row["accuracy"]]
        if missing:
            with mixed(model):
                found = evaluate(
                    model,
                    tokenizer,
                    missing,
                    data=str(arguments.data / "tasks"),
                    limit=arguments.rows or None,
                )
            row["accuracy"] |= found
            record(arguments.output, row)
        print(method, keep, tokens, row["perplexity"], flush=True)
        del model
        gc.collect()
    rows = [row for row in read(arguments.output) if same.items() <= row.items()]
    print(tables(rows))
    draw(rows, arguments.output.with_suffix(".png"))


def read(path: Path) -> list[dict]:
    """Return the cells measured so far."""
    return json.loads(path.read_text()) if path.exists() else []


def record(path: Path, row: dict) -> None:
    """Add a cell, or replace it; other runs may fill the same file."""
    key = {
        name: row[name] for name in ("model", "method", "healed_tokens", "keep", "rows", "windows")
    }
    with FileLock(f"{path}.lock"):
        others = [known for known in read(path) if not key.items() <= known.items()]
        write_json(path, [*others, row])


def built(bench: Bench, key: dict, work: Path) -> tuple[torch.nn.Module, float | None]:
    """Build a model; what is trained is kept, since that takes minutes, and continues.

    Also returns the seconds it took, None where an earlier run did some of the work.
    """
    method, keep, tokens = key["method"], key["keep"], key["healed_tokens"]
    kept = work / f"{key['model']}-{method}-{keep}-{tokens}.pt"
    if kept.exists():
        return torch.load(kept, weights_only=False), None
    unfinished, started = kept.with_suffix(""), time.monotonic()
    continued = unfinished.exists()
    model = bench.build(method, keep, tokens, work=unfinished if tokens else None).eval()
    seconds = None if continued else round(time.monotonic() - started, 1)
    if tokens:
        torch.save(model, kept.with_suffix(".tmp"))
        kept.with_suffix(".tmp").rename(kept)
        shutil.rmtree(unfinished, ignore_errors=True)
    return model, seconds


if __name__ == "__main__":
    main()
