"""A decoder block's linear layers on a GPU, in CUDA graphs: every form against the dense layers.

    python bench/chains.py [--model 8B 1B] [--rows 1 4 16 64 256 2048] [--rounds 9]

Blocks of Llama-3-8B's and Llama-3.2-1B's shapes, three or as many as no L2 cache holds the weights
of, run as a chain in bfloat16: "dense" as seven layers, "dense, grouped" with q, k and v one
product and gate and up another, which is the base of all ratios; pivoted layers at keep 0.5 and
0.8; quantised ones, with corrective paths of rank 16 in 8 bits; for comparison two of the vendor's
products on two factors. All sides are captured and replayed by turns in one process; the table has
medians in microseconds a block, how many times as fast as the base that is, and how many times as
long as reading the weights takes at the rate of a copy on this GPU. Writes chains.json in
bench/results. Needs a GPU.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from decode import random_records
from texts import write_json
from torch import Tensor, nn
from torch.nn.functional import linear

from calr_kernels import Form, LowRankLinear, QuantizedLinear
from calr_kernels.forms import CORRECTIVE
from calr_kernels.layout import rank_at

OUTPUT = Path("bench/results/chains.json")
MODELS = {  # groups of layers that share an input: (rows of each, columns)
    "8B": [((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336)],
    "1B": [((2048, 512, 512), 2048), ((2048,), 2048), ((8192, 8192), 2048), ((2048,), 8192)],
}
FORMS = {
    "8 bits, rank 16": Form(8, "uniform", 64, corrective_rank=16),
    "5 bits, rank 16": Form(5, "formula", 64, corrective_rank=16),
    "4 bits, rank 16": Form(4, "table", 64, corrective_rank=16),
    "4 bits, uniform, rank 16": Form(4, "uniform", 64, corrective_rank=16),
    "4 bits": Form(4, "table", 64),
}
KEEPS, RANK_STEP = (0.5, 0.8), 16
BLOCKS, CACHE = 3, 256 << 20  # blocks of a chain, or as many as no cache holds the weights of
GROUPED = "dense, grouped"
Groups = list[tuple[tuple[int, ...], int]]


class Chain(NamedTuple):
    """Blocks, one layer after another; the bytes of a block's tensors, and the number of blocks."""

    run: Callable[[], None]
    nbytes: int
    blocks: int


def quantized(n: int, k: int, form: Form, device: str) -> nn.Module:
    """Make a layer of a form."""
    layer = QuantizedLinear(k, n, form, bias=False, device=device, dtype=torch.bfloat16)
    layer.weight.copy_(random_records(n, k, form))
    if layer.corrective is not None:
        layer.corrective.down.copy_(random_records(form.corrective_rank, k, CORRECTIVE))
        layer.corrective.up.copy_(random_records(form.corrective_rank, n, CORRECTIVE))
    return layer


def lowrank(n: int, k: int, keep: float, layout: str, device: str) -> nn.Module:
    """Make a low-rank layer."""
    rank = max(RANK_STEP, int(rank_at(layout, n, k, keep)) // RANK_STEP * RANK_STEP)
    made = LowRankLinear(k, n, rank, layout, bias=False, device=device, dtype=torch.bfloat16)
    if layout == "pivoted":
        made.pivots.copy_(torch.randperm(n)[:rank].sort()[0])
    return made


def chain(groups: Groups, xs: list[Tensor], make: Callable[[int, int], nn.Module]) -> Chain:
    """Make a chain of layers, each made of its rows and columns."""

    def block() -> list[tuple[Tensor, nn.Module]]:
        return [(x, make(n, k)) for x, (ns, k) in zip(xs, groups, strict=True) for n in ns]

    layers = block()
    tensors = [t for _, layer in layers for t in (*layer.parameters(), *layer.buffers())]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    blocks = max(BLOCKS, -(-CACHE // nbytes)) if xs[0].is_cuda else 1
    layers += [pair for _ in range(blocks - 1) for pair in block()]

    def run() -> None:
        for x, layer in layers:
            layer(x)

    return Chain(run, nbytes, blocks)


def sides(groups: Groups, rows: int, device: str) -> dict[str, Chain]:
    """Make all that is timed."""
    xs = [torch.randn(rows, k, device=device).bfloat16() for _, k in groups]
    plain = {"bias": False, "device": device, "dtype": torch.bfloat16}

    def products(n: int, k: int) -> nn.Module:
        made = lowrank(n, k, 0.5, "two_factor", device)
        made.forward = lambda x: linear(linear(x, made.down.weight), made.weight)
        return made

    joined: Groups = [((sum(ns),), k) for ns, k in groups]
    found = {
        GROUPED: chain(joined, xs, lambda n, k: nn.Linear(k, n, **plain)),
        "dense": chain(groups, xs, lambda n, k: nn.Linear(k, n, **plain)),
        "keep 0.5, two products": chain(groups, xs, products),
    }
    for keep in KEEPS:
        make = partial(lowrank, keep=keep, layout="pivoted", device=device)
        found[f"keep {keep}, pivoted"] = chain(groups, xs, make)
    for name, form in FORMS.items():
        found[name] = chain(groups, xs, partial(quantized, form=form, device=device))
    return found


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Capture a chain, after it has compiled and packed what it needs."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def by_turns(made: dict[str, Chain], rounds: int) -> dict[str, list[float]]:
    """Replay all chains by turns, one round to warm up; return microseconds a block."""
    graphs = {name: captured(side.run) for name, side in made.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 1):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record()
            for _ in range(5):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end) / 5 / made[name].blocks * 1e3)
    return times


def copy_rate() -> float:
    """Measure the bytes per second of a copy on the GPU, reads and writes counted."""
    a = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    b = torch.empty_like(a)
    start, end = torch.cuda.Event(True), torch.cuda.Event(True)
    for turn in range(13):
        if turn == 3:
            start.record()
        b.copy_(a)
    end.record()
    torch.cuda.synchronize()
    return 2 * a.numel() * 10 / (start.elapsed_time(end) / 1e3)


@torch.no_grad()
def main() -> None:
    """Time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["8B", "1B"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256, 2048])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here to measure on; python bench/modelled.py needs none")
    torch.manual_seed(0)
    rate, kept = copy_rate(), []
    print(f"{torch.cuda.get_device_name()}, a copy moves {rate / 1e12:.2f} TB/s")
    print("| model | rows | | µs a block | times grouped dense | times reading |")
    print("|---|---|---|---|---|---|")
    for model in arguments.model:
        for rows in arguments.rows:
            made = sides(MODELS[model], rows, "cuda")
            times = by_turns(made, arguments.rounds)
            base = statistics.median(times[GROUPED])
            for name, found in times.items():
                us, reading = statistics.median(found), made[name].nbytes / rate * 1e6
                ratios = f"{base / us:.2f} | {us / reading:.2f}"
                print(f"| {model} | {rows} | {name} | {us:.1f} | {ratios} |")
                kept.append(
                    {"model": model, "rows": rows, "form": name, "microseconds": us}
                    | {"fastest": min(found), "slowest": max(found), "bytes": made[name].nbytes}
                )  # fmt: skip
            write_json(arguments.output, {"gpu": torch.cuda.get_device_name(), "cells": kept})


if __name__ == "__main__":
    main()
