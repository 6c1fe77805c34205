"""The quantised linear layer on a CPU, against the dense one in float32.

    python bench/quantized.py [--threads 1]

Shapes of SmolLM2-135M's layers, more of them than a cache holds, in turn: the native kernel, what
torch computes from the weights as numbers (made each time), and the dense layer. Medians of
interleaved rounds, microseconds a layer; rows of x: up to which the native kernel is the faster way
is `QUANTIZED_ROWS` in `calr_kernels.eligible`.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from calr.ranks import fitting_group
from calr.ranks.bits import BEST_LEVELS
from calr_kernels import Form, native, records
from calr_kernels.forms import PLANES
from calr_kernels.quantized import dequantize

SHAPES = [(576, 576), (1536, 576), (576, 1536), (49152, 576)]
BYTES, ROUNDS = 150_000_000, 5  # of dense weights in turn


def main() -> None:
    """Time every shape, width and number of rows; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 4, 16, 32])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| shape | bits | rows | native | numbers, then torch | dense float32 | dense / native |")
    print("|---|---|---|---|---|---|---|")
    for n, k in SHAPES:
        dense = [torch.randn(n, k) for _ in range(max(1, BYTES // (4 * n * k)))]
        for bits in PLANES:
            form = Form(bits, BEST_LEVELS[bits], fitting_group(64, k))
            codes = torch.randint(1 << bits, (n, k)).to(torch.uint8)
            packed = records.pack(codes, torch.randn(n, form.groups(k)), form)
            many = [packed.clone() for _ in dense]
            for rows in arguments.rows:
                a, b, c = times(torch.randn(rows, k), form, many, dense)
                print(f"| {n}×{k} | {bits} | {rows} | {a:.0f} | {b:.0f} | {c:.0f} | {c / a:.2f} |")


def times(x: Tensor, form: Form, many: list[Tensor], dense: list[Tensor]) -> list[float]:
    """Return the medians, microseconds a layer, of the three ways."""
    sides: list[Callable[[int], Tensor]] = [
        lambda i: native.quantized_linear(x, many[i], form, None),
        lambda i: linear(x, dequantize(many[i], form, x.shape[1], x.dtype)),
        lambda i: linear(x, dense[i]),
    ]
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(ROUNDS):
        for run, seconds in zip(sides, found, strict=True):
            start = time.perf_counter()
            for i in range(len(dense)):
                run(i)
            seconds.append((time.perf_counter() - start) / len(dense) * 1e6)
    return [statistics.median(seconds) for seconds in found]


if __name__ == "__main__":
    main()
