"""Bytes that decoding reads per second on a CPU: large layers against reading alone.

    python bench/bandwidth.py [--threads 1] [--rows 16384] [--columns 2048]

Layers of one shape, more of them than any cache holds, are multiplied with one row in bfloat16, one
after another: dense in bfloat16, as it lies and packed, and quantised to 8, 6, 5, 4 and 3 bits.
Reading is the fastest of three reductions of torch over as many bytes. All sides take turns within
one process. Writes bench/results/bandwidth.json, a row a form and number of threads, and prints a
table.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from decode import random_records
from texts import write_json

from calr_kernels import Form
from calr_kernels.layout import Factors, Records
from calr_kernels.native import Bound, pack

BYTES, ROUNDS = 512 << 20, 9
FORMS = {
    "8 bits": Form(8, "uniform", 32),
    "6 bits": Form(6, "uniform", 32),
    "5 bits": Form(5, "uniform", 32),
    "4 bits": Form(4, "table", 32),
    "3 bits": Form(3, "uniform", 32),
}
Side = Callable[[], object]


def layers(n: int, k: int, form: Form | None, *, panels: bool = False) -> tuple[Side, int]:
    """Return a function that multiplies one row by every one of many layers, and their bytes."""
    x = torch.randn(1, k).bfloat16()
    if form is None:
        size = 2 * n * k
        made = [Factors(torch.randn(n, k).bfloat16()) for _ in range(BYTES // size)]
        for layer in made if panels else ():
            pack(layer.up)
    else:
        first = random_records(n, k, form)
        size = first.nbytes
        made = [Records(first.clone(), form, k) for _ in range(BYTES // size)]
    bounds = [Bound() for _ in made]

    def run() -> None:
        for bound, layer in zip(bounds, made, strict=True):
            bound.linears(x, (layer,))

    return run, len(made) * size


def sides(n: int, k: int) -> dict[str, tuple[Side, int]]:
    """Make all that is timed: functions and the bytes that each reads."""
    memory = torch.ones(BYTES // 4)
    as_integers = memory.view(torch.int64)
    reading: dict[str, tuple[Side, int]] = {
        "reading: sum": (memory.sum, BYTES),
        "reading: largest": (memory.max, BYTES),
        "reading: sum of integers": (as_integers.sum, BYTES),
    }
    numbers = {
        "bfloat16, in rows": layers(n, k, None),
        "bfloat16": layers(n, k, None, panels=True),
    }
    return reading | numbers | {name: layers(n, k, form) for name, form in FORMS.items()}


@torch.no_grad()
def main() -> None:
    """Time all sides by turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=Path("bench/results/bandwidth.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    timed = sides(arguments.rows, arguments.columns)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(ROUNDS + 1):
        for name, (run, _) in timed.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    speeds = {name: timed[name][1] / statistics.median(times[name]) / 1e9 for name in timed}
    reading = max(speed for name, speed in speeds.items() if name.startswith("reading"))
    cell = {key: vars(arguments)[key] for key in ("threads", "rows", "columns")}
    print(f"{cell['rows']} x {cell['columns']}, {cell['threads']} threads\n| | GB/s | of reading |")
    print("|---|---|---|")
    for name, speed in speeds.items():
        print(f"| {name} | {speed:.1f} | {speed / reading:.0%} |")
    rows = [cell | {"side": name, "gb_per_second": speed} for name, speed in speeds.items()]
    kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    write_json(arguments.output, [row for row in kept if not cell.items() <= row.items()] + rows)


if __name__ == "__main__":
    main()
