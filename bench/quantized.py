"""The quantised linear layer on a CPU, against the dense one.

    python bench/quantized.py [--threads 1] [--dtype bfloat16]

Shapes of SmolLM2-135M's layers, more of them than a cache holds, in turn: the native kernel on
panels, what torch computes from the weights as numbers (made each time), and the dense layer.
Medians of interleaved rounds, microseconds a layer; rows of x: up to which the native kernel is the
faster way is `QUANTIZED_ROWS` in `calr_kernels.eligible`.
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
from calr_kernels import Form, records
from calr_kernels.forms import PLANES
from calr_kernels.layout import Records
from calr_kernels.native import Bound
from calr_kernels.quantized import dequantize

SHAPES = [(576, 576), (1536, 576), (576, 1536), (49152, 576)]
BYTES, ROUNDS = 150_000_000, 5  # of dense weights in float32, in turn


def main() -> None:
    """Time every shape, width and number of rows; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 4, 16, 32])
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    print("| shape | bits | rows | native | numbers, then torch | dense | dense / native |")
    print("|---|---|---|---|---|---|---|")
    for n, k in SHAPES:
        dense = [torch.randn(n, k).to(dtype) for _ in range(max(1, BYTES // (4 * n * k)))]
        for bits in PLANES:
            form = Form(bits, BEST_LEVELS[bits], fitting_group(64, k))
            codes = torch.randint(1 << bits, (n, k)).to(torch.uint8)
            packed = records.pack(codes, torch.randn(n, form.groups(k)), form)
            many = [Records(packed.clone(), form, k) for _ in dense]
            for rows in arguments.rows:
                a, b, c = times(torch.randn(rows, k).to(dtype), many, dense)
                print(f"| {n}×{k} | {bits} | {rows} | {a:.0f} | {b:.0f} | {c:.0f} | {c / a:.2f} |")


@torch.no_grad()
def times(x: Tensor, many: list[Records], dense: list[Tensor]) -> list[float]:
    """Return the medians, microseconds a layer, of the three ways."""
    bounds = [Bound() for _ in many]
    sides: list[Callable[[int], object]] = [
        lambda i: bounds[i].linears(x, (many[i],)),
        lambda i: linear(x, dequantize(many[i].weight, many[i].form, x.shape[1], x.dtype)),
        lambda i: linear(x, dense[i]),
    ]
    found: list[list[float]] = [[] for _ in sides]
    for turn in range(ROUNDS + 1):
        for run, seconds in zip(sides, found, strict=True):
            start = time.perf_counter()
            for i in range(len(dense)):
                run(i)
            if turn:
                seconds.append((time.perf_counter() - start) / len(dense) * 1e6)
    return [statistics.median(seconds) for seconds in found]


if __name__ == "__main__":
    main()
