"""Error and time of truncated SVDs, every contender interleaved in one process.

    python bench/svd.py [--quick]

Writes bench/results/svd.json and svd.png and prints a table. Matrices have singular values i^-0.5.
torch.linalg.svd runs once per shape (it dominates the time), as does scipy's svds per rank; the
others take turns. SmolLM2's shape is a batch of 30.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy
import torch
from scipy.sparse.linalg import svds
from sklearn.utils.extmath import randomized_svd as sklearn_svd

from calr_kernels.svd import randomized_svd

SHAPES = [(30, 576, 1536), (1, 2048, 8192), (1, 4096, 4096), (1, 4096, 11008)]  # batch, m, n
FRACTIONS = [0.05, 0.12, 0.25, 0.5]
SVDS_LIMIT = 0.12  # scipy's Lanczos takes minutes above
ONCE = "scipy svds"


def matrices(batch: int, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random matrices [batch, m, n] with singular values i^-0.5, and these."""
    generator = torch.Generator().manual_seed(0)
    small = min(m, n)
    u = torch.linalg.qr(torch.randn(batch, m, small, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(batch, n, small, generator=generator))[0]
    s = torch.arange(1, small + 1, dtype=torch.float64) ** -0.5
    return (u * s.float()) @ v.mT, s


def one_by_one(a: torch.Tensor, svd: Callable[[numpy.ndarray], tuple]) -> tuple:
    """Apply an SVD of numpy arrays to every matrix of a batch."""
    found = zip(*(svd(matrix) for matrix in a.numpy()), strict=True)
    return tuple(torch.from_numpy(numpy.stack(part)) for part in found)


def contenders(rank: int, small: int) -> dict[str, Callable[[torch.Tensor], tuple]]:
    """Every truncated SVD at the same sketch size; calr's two iterations are of another kind."""
    extra = min(small, rank + max(32, rank // 4)) - rank
    iterations = 2 if rank <= 0.12 * small else 3  # what the others need for calr's error

    def sklearn(matrix: numpy.ndarray) -> tuple:
        return sklearn_svd(matrix, rank, n_oversamples=extra, n_iter=iterations, random_state=0)

    def lowrank(a: torch.Tensor) -> tuple:
        u, s, v = torch.svd_lowrank(a, q=rank + extra, niter=iterations)
        return u, s, v.mT

    found = {
        "calr": lambda a: randomized_svd(a, rank),
        "calr, bfloat16": lambda a: randomized_svd(a, rank, compute_dtype=torch.bfloat16),
        "torch.svd_lowrank": lowrank,
        "sklearn": lambda a: one_by_one(a, sklearn),
    }
    if rank <= SVDS_LIMIT * small + 1:
        found[ONCE] = lambda a: one_by_one(a, lambda matrix: svds(matrix, k=rank, random_state=0))
    return found


def relative_error(a: torch.Tensor, usv: tuple, rank: int) -> float:
    """Frobenius error of the rank-r products, over the norm of a."""
    u, s, vh = usv
    order = s[0].argsort(descending=True)[:rank]  # svds sorts upwards
    product = (u[..., order] * s[..., None, order]) @ vh[..., order, :]
    return float((a - product).norm() / a.norm())


def measure(shape: tuple[int, int, int], rounds: int) -> Iterator[dict]:
    """Time and judge every contender at every rank of one shape."""
    a, s = matrices(*shape)
    small = min(shape[1:])
    start = time.perf_counter()
    torch.linalg.svd(a, full_matrices=False)
    exact = time.perf_counter() - start
    for fraction in FRACTIONS:
        rank = round(fraction * small)
        optimum = float(s[rank:].norm() / s.norm())
        runs = contenders(rank, small)
        times: dict[str, list[float]] = {name: [] for name in runs}
        results = {}
        for turn in range(rounds):
            for name, run in runs.items():
                if name == ONCE and turn:
                    continue
                start = time.perf_counter()
                results[name] = run(a)
                times[name].append(time.perf_counter() - start)
        for name, taken in times.items():
            seconds = statistics.median(taken)
            yield {
                "shape": list(shape),
                "rank": rank,
                "fraction": fraction,
                "name": name,
                "seconds": seconds,
                "fastest": min(taken),
                "slowest": max(taken),
                "error_over_optimum": relative_error(a, results[name], rank) / optimum,
                "linalg_svd_seconds": exact,
                "speedup_over_linalg_svd": exact / seconds,
            }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest shape only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("bench/results/svd"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for shape in SHAPES[:1] if arguments.quick else SHAPES:
        for row in measure(shape, arguments.rounds):
            rows.append(row)
            print(
                f"{shape} rank {row['rank']} {row['name']:18} {row['seconds']:8.3f} s "
                f"{row['speedup_over_linalg_svd']:7.1f}× linalg.svd "
                f"error/optimum {row['error_over_optimum']:.4f}",
                flush=True,
            )
    machine = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(
        json.dumps({"machine": machine, "rows": rows}, indent=1)
    )
    plot(rows, arguments.output.with_suffix(".png"))


def plot(rows: list[dict], path: Path) -> None:
    """Draw error against time, one panel per shape."""
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(4 * len(shapes), 3.6), squeeze=False, layout="constrained"
    )
    for panel, shape in zip(panels[0], shapes, strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            points = [r for r in rows if tuple(r["shape"]) == shape and r["name"] == name]
            panel.plot(
                [p["seconds"] for p in points],
                [p["error_over_optimum"] for p in points],
                "o-",
                label=name,
            )
        exact = next(r["linalg_svd_seconds"] for r in rows if tuple(r["shape"]) == shape)
        panel.axvline(exact, color="grey", linestyle=":", label="torch.linalg.svd")
        panel.set(title=" × ".join(map(str, shape)), xscale="log", xlabel="seconds")
    panels[0][0].set_ylabel("Frobenius error ÷ optimum")
    panels[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
