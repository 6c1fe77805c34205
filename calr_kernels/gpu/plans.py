"""Which Triton kernel runs, with which tiles: a byte and FLOP model in plain Python.

Nothing here needs a GPU. Times are those of the model, not measurements; on an H200 it was two to
three times too optimistic. A table of measured tiles, written by `python -m
calr_kernels.tools.tune` on a machine with a GPU, overrides the choice of tiles.
"""

import itertools
import json
import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

TUNED = "CALR_TUNED"  # environment variable: file of measured tiles
LAUNCH = 2.5e-6  # s between dependent launches in a CUDA graph, assumed
LATENCY = 0.8e-6  # s from a load to its data in global memory, assumed
PEAK = 0.6  # assumed share of the matrix units' peak that our products reach
LIBRARY_PEAK = 0.75  # assumed for the vendor's library
MOST_ROWS_SPLIT = 4  # rows up to which partial sums over the rank stay small
MOST_RANK_ON_CHIP = 128
SLICE = 16  # rank per program in rank_split: the least that tl.dot takes, 32 bytes of a row of up


@dataclass(frozen=True)
class Arch:
    """A GPU: peak rates in bytes/s and FLOP/s (dense, float32 sums), shared memory in bytes."""

    name: str
    backend: Literal["cuda", "hip"]
    version: int | str
    warp: int
    processors: int
    bandwidth: float
    flops16: float
    flops32: float
    shared: int


ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm_80", "cuda", 80, 32, 108, 2.04e12, 312e12, 19.5e12, 166_912),  # A100 80 GB SXM
        Arch("sm_90", "cuda", 90, 32, 132, 3.35e12, 989e12, 67e12, 232_448),  # H100 SXM
        Arch("sm_100", "cuda", 100, 32, 148, 8.0e12, 2250e12, 80e12, 232_448),  # B200
        Arch("gfx942", "hip", "gfx942", 64, 304, 5.3e12, 1307e12, 163e12, 65_536),  # MI300X
    )
}


@dataclass(frozen=True)
class Tiles:
    """Sizes of one launch. split: programs that share an output tile (along K)."""

    block_m: int
    block_n: int
    block_k: int
    split: int = 1
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Plan:
    """How a low-rank layer runs, and the model's time for it.

    "rank_split" and "on_chip": one launch, one Tiles (block_n of the second product; the rank's
    block is `rank_block`). "products": two launches, first and second product. "library": both
    products by the vendor's library.
    """

    kind: Literal["rank_split", "on_chip", "products", "library"]
    tiles: tuple[Tiles, ...]
    seconds: float
    rank_block: int = 0


@cache
def plan(m: int, rows: int, k: int, r: int, itemsize: int, arch: Arch, pivoted: bool) -> Plan:
    """Choose the fastest way, by the model, to apply up [rows, r] after down [r, k] to m rows.

    >>> plan(1, 2904, 4096, 1192, 2, ARCHS["sm_100"], True).kind
    'rank_split'
    >>> plan(16, 1160, 576, 376, 2, ARCHS["sm_90"], True).kind
    'products'
    """
    plans = [_two_products(m, rows, k, r, itemsize, arch)]
    if m <= MOST_ROWS_SPLIT and (split := _rank_split(m, rows, k, r, itemsize, arch)):
        plans.append(split)
    if r <= MOST_RANK_ON_CHIP and m > 64:
        plans.append(_on_chip(m, rows, k, r, itemsize, arch, pivoted))
    if m > 64:
        plans.append(_library(m, rows, k, r, itemsize, arch, pivoted))
    return min(plans, key=lambda plan: plan.seconds)


@cache
def product_tiles(m: int, n: int, k: int, itemsize: int, arch: Arch) -> tuple[Tiles, float]:
    """Choose tiles for x [m, k] times w [n, k]: measured ones if there are, else by the model."""
    measured = tuned().get(f"{arch.name} {m} {n} {k} {itemsize}")
    if measured is not None:
        return measured, product_seconds(measured, m, n, k, itemsize, arch)
    timed = [
        (product_seconds(tiles, m, n, k, itemsize, arch), i, tiles)
        for i, tiles in enumerate(candidates(m, k, itemsize, arch))
    ]
    seconds, _, tiles = min(timed)
    return tiles, seconds


def bucket(m: int) -> int:
    """Round a number of rows up to what plans are made for: 1, 4, 16, 32, 64, 128, …, 16384.

    >>> [bucket(m) for m in (1, 3, 17, 65, 100_000)]
    [1, 4, 32, 128, 16384]
    """
    if m <= 4:
        return 1 if m == 1 else 4
    return min(16384, max(16, 1 << (m - 1).bit_length()))


def candidates(m: int, k: int, itemsize: int, arch: Arch) -> list[Tiles]:
    """List the tiles worth trying for m rows: those that fit shared memory and registers."""
    heights = [16 if m <= 16 else 32 if m <= 32 else 64] if m <= 64 else [64, 128]
    depths = (64, 128) if itemsize == 2 else (32, 64)
    stages = (2,) if arch.backend == "hip" else (3, 4)
    splits = (1, 2, 4, 8, 16) if m <= 512 and _may_share(arch) else (1,)
    found = []
    for height, width, depth, stage, split in itertools.product(
        heights, (16, 32, 64, 128, 256), depths, stages, splits
    ):
        warps = 8 if height * width > 64 * 128 else 4
        fits = stage * (height + width) * depth * itemsize <= arch.shared
        spills = itemsize == 4 and height >= 64 > 2 * width  # on sm_100
        spills |= split > 1 and (height, width) == (64, 128)  # in bfloat16 on sm_90 and sm_100
        spills |= split > 1 and itemsize == 4 and (height, width) == (64, 32)  # on sm_90
        if fits and (height, width) != (128, 256) and not spills and split * depth <= max(k, depth):
            found.append(Tiles(height, width, depth, split, warps, stage))
    return found


def product_seconds(tiles: Tiles, m: int, n: int, k: int, itemsize: int, arch: Arch) -> float:
    """Model the time of one product launch.

    The slowest of: reading everything once from global memory, at the rate that the bytes in
    flight allow; the busiest processor's tile loads from the L2 cache, taken as three times as fast
    as memory; and its FLOPs. Partial sums of a split are written and read once.
    """
    if n == 0:
        return 0.0
    height, width, depth = tiles.block_m, tiles.block_n, tiles.block_k
    programs = math.ceil(m / height) * math.ceil(n / width) * tiles.split
    waves = math.ceil(programs / arch.processors)
    chunk = math.ceil(k / tiles.split)
    flight = (tiles.stages - 1) * (height + width) * depth * itemsize
    rate = min(arch.bandwidth, min(programs, 2 * arch.processors) * flight / LATENCY)
    memory = (m * k + n * k + m * n) * itemsize / rate
    loads = waves * (height + width) * chunk * itemsize / (3 * arch.bandwidth / arch.processors)
    peak = arch.flops16 if itemsize == 2 else arch.flops32
    compute = waves * 2 * height * width * chunk / (PEAK * peak / arch.processors)
    shared = LAUNCH + 8 * tiles.split * m * n / arch.bandwidth if tiles.split > 1 else 0.0
    return max(memory, loads, compute) + shared + LATENCY * (2 if tiles.split > 1 else 1)


def factor_bytes(rows: int, k: int, r: int, itemsize: int) -> int:
    """Count the bytes of both factors: the least that a decode step must read."""
    return (rows + k) * r * itemsize


def minimum_bytes(m: int, rows: int, k: int, r: int, itemsize: int, pivoted: bool) -> int:
    """Count the bytes of both factors, the input and the output, each moved once."""
    n = rows + r if pivoted else rows
    return factor_bytes(rows, k, r, itemsize) + m * (k + n) * itemsize


def plan_bytes(m: int, rows: int, k: int, r: int, itemsize: int, arch: Arch, pivoted: bool) -> int:
    """Count the bytes that a plan moves to and from global memory, caches taken as large enough."""
    moved = minimum_bytes(m, rows, k, r, itemsize, pivoted)
    made = plan(bucket(m), rows, k, r, itemsize, arch, pivoted)
    if made.kind == "on_chip":
        return moved
    if made.kind == "rank_split":
        return moved + 8 * made.tiles[0].split * m * rows
    moved += 2 * m * r * itemsize  # the intermediate, out and in
    if made.kind == "products":
        widths = zip(made.tiles, (r, rows), strict=True)
        moved += sum(8 * tile.split * m * n for tile, n in widths if tile.split > 1)
    elif pivoted:
        moved += 2 * m * (rows + r) * itemsize
    return moved


def roofline_seconds(
    m: int, rows: int, k: int, r: int, itemsize: int, arch: Arch, pivoted: bool
) -> float:
    """Return the least time: all bytes once at full bandwidth, or all FLOPs at peak."""
    peak = arch.flops16 if itemsize == 2 else arch.flops32
    moved = minimum_bytes(m, rows, k, r, itemsize, pivoted) / arch.bandwidth
    return max(moved, 2 * m * r * (rows + k) / peak)


@cache
def tuned() -> dict[str, Tiles]:
    """Read the table of measured tiles named by CALR_TUNED; empty without one.

    Raises ValueError for a file that is not such a table.
    """
    path = os.environ.get(TUNED)
    if not path:
        return {}
    try:
        rows = json.loads(Path(path).read_text())
        return {key: Tiles(**value) for key, value in rows.items()}
    except (OSError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{TUNED}={path}: not a table written by calr_kernels.tools.tune: {error}"
        ) from error


def _two_products(m: int, rows: int, k: int, r: int, itemsize: int, arch: Arch) -> Plan:
    first, first_seconds = product_tiles(m, r, k, itemsize, arch)
    second, second_seconds = product_tiles(m, rows, r, itemsize, arch)
    return Plan("products", (first, second), first_seconds + second_seconds + LAUNCH)


def _may_share(arch: Arch) -> bool:
    """Tell whether programs may share an output tile: not on AMD's, where nothing in the code that
    Triton makes orders the other waves' partial sums before the ticket."""
    return arch.backend == "cuda"


def _rank_split(m: int, rows: int, k: int, r: int, itemsize: int, arch: Arch) -> Plan | None:
    """One launch, where there are slices for half the processors and partial sums stay small."""
    if not _may_share(arch):
        return None
    slices = math.ceil(r / SLICE)
    partial, factors = slices * m * rows * 8, factor_bytes(rows, k, r, itemsize)
    if slices < arch.processors / 2 or partial > factors / 4:
        return None
    waves = math.ceil(slices / arch.processors)
    busy = slices / (waves * arch.processors)
    stages = 2 if arch.backend == "hip" else 3
    tiles = Tiles(16, 128, 128 if itemsize == 2 else 64, slices, 4, stages)
    seconds = (factors / busy + partial) / arch.bandwidth + 3 * LATENCY + LAUNCH
    return Plan("rank_split", (tiles,), seconds, SLICE)


def _on_chip(m: int, rows: int, k: int, r: int, itemsize: int, arch: Arch, pivoted: bool) -> Plan:
    block_r = max(16, 1 << (r - 1).bit_length())
    tiles = Tiles(64, 64, 64 if itemsize == 2 else 32, 1, 4, 2)
    waves = math.ceil(m / tiles.block_m / arch.processors)
    peak = arch.flops16 if itemsize == 2 else arch.flops32
    per_tile = 2 * tiles.block_m * block_r * (k + rows) / (PEAK * peak / arch.processors)
    reads = tiles.block_m * (k + rows) * itemsize + factor_bytes(rows, k, r, itemsize)
    loads = reads / (3 * arch.bandwidth / arch.processors)
    least = roofline_seconds(m, rows, k, r, itemsize, arch, pivoted)
    return Plan("on_chip", (tiles,), max(least, waves * max(per_tile, loads)) + LATENCY, block_r)


def _library(m: int, rows: int, k: int, r: int, itemsize: int, arch: Arch, pivoted: bool) -> Plan:
    """Two library products; pivoted outputs then take one more pass, read and written."""
    peak = LIBRARY_PEAK * (arch.flops16 if itemsize == 2 else arch.flops32)
    seconds = LAUNCH
    for n, depth in ((r, k), (rows, r)):
        moved = (m * depth + n * depth + m * n) * itemsize / arch.bandwidth
        seconds += max(moved, 2 * m * n * depth / peak) + LATENCY
    if pivoted:
        seconds += LAUNCH + LATENCY + 4 * m * (rows + r) * itemsize / arch.bandwidth
    return Plan("library", (), seconds)
