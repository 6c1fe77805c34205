"""Measure tiles on this GPU and write the table that overrides the chooser's model.

    python -m calr_kernels.tools.tune tuned.json && export CALR_TUNED=tuned.json

For every layer shape of `calr_kernels.tools.aot` and every number of rows, the tiles that the model
ranks best are timed; the fastest goes into the table. Products of other sizes, such as those of
globally allocated ranks, keep the model's choice.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton

from calr_kernels.gpu import launches, plans
from calr_kernels.layout import LAYOUTS, rank_at
from calr_kernels.tools.aot import KEEPS, MODELS

TRIED = 12  # of the model's best tiles for each product
BUCKETS = sorted({plans.bucket(m) for m in range(1, 16385)})


def problems() -> list[tuple[int, int, int]]:
    """List the products (rows of x, rows of w, columns) of all layers, once each."""
    found: dict[tuple[int, int, int], None] = {}
    for shapes in MODELS.values():
        for (n, k), keep, m in itertools.product(shapes, KEEPS, BUCKETS):
            pivoted, plain = (int(rank_at(x, n, k, keep)) // 8 * 8 for x in LAYOUTS)
            wanted = [(m, pivoted, k), (m, n - pivoted, pivoted), (m, plain, k), (m, n, plain)]
            found |= dict.fromkeys(wanted)
    return list(found)


def tune(
    wanted: Iterable[tuple[int, int, int]],
    device: torch.device,
    dtype: torch.dtype,
    seconds: Callable[[Callable[[], Any]], float],
) -> dict[str, dict[str, int]]:
    """Return the fastest tiles of each product (m, n, k), keyed as `plans.tuned` reads them."""
    table, arch = {}, launches.device_arch(device)
    for m, n, k in wanted:
        x, w = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
        y = x.new_empty(m, n)
        ranked = sorted(
            plans.candidates(m, k, dtype.itemsize, arch),
            key=lambda t: plans.product_seconds(t, m, n, k, dtype.itemsize, arch),
        )
        timed = [
            (seconds(functools.partial(launches.product, x, w, y, None, None, None, t)), i)
            for i, t in enumerate(ranked[:TRIED])
        ]
        best = ranked[min(timed)[1]]
        table[f"{arch.name} {m} {n} {k} {dtype.itemsize}"] = dataclasses.asdict(best)
    return table


def main() -> int:
    """Tune for bfloat16 on the current GPU and write the table."""
    parser = argparse.ArgumentParser(prog="python -m calr_kernels.tools.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output", type=Path, help="file to write, JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here to measure on")
    table: dict[str, dict[str, int]] = {}
    todo = problems()
    for number, problem in enumerate(todo, 1):
        table |= tune(
            [problem],
            torch.device("cuda"),
            torch.bfloat16,
            lambda run: float(triton.testing.do_bench(run, return_mode="median")) / 1e3,
        )
        print(f"[{number}/{len(todo)}] {problem}: {list(table.values())[-1]}", flush=True)
        temporary = arguments.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(table, indent=1))
        os.replace(temporary, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
