"""Error and time of truncated SVDs, every contender interleaved in one process.

    python bench/svd.py [--quick]

Writes bench/results/svd.json and svd.png and prints a table. Matrices have singular values i^-0.5.
torch.linalg.svd runs once per shape (it dominates the time); the others take turns.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from calr_kernels.svd import randomized_svd

SHAPES = [(576, 1536), (2048, 8192), (4096, 4096), (4096, 11008)]
FRACTIONS = [0.05, 0.12, 0.25, 0.5]
SVDS_LIMIT = 0.12  # scipy's Lanczos takes minutes above


def matrix(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random matrix with singular values i^-0.5, and these."""
    generator = torch.Generator().manual_seed(0)
    small = min(m, n)
    u = torch.linalg.qr(torch.randn(m, small, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(n, small, generator=generator))[0]
    s = torch.arange(1, small + 1, dtype=torch.float64) ** -0.5
    return (u * s.float()) @ v.T, s


def contenders(rank: int, small: int) -> dict:
    """Every truncated SVD at the same sketch size and number of power iterations."""
    from scipy.sparse.linalg import svds
    from sklearn.utils.extmath import randomized_svd as sklearn_svd

    extra = min(small, rank + max(32, rank // 4)) - rank
    iterations = 2 if rank <= 0.12 * small else 3
    found = {
        "calr": lambda a: randomized_svd(a, rank),
        "torch.svd_lowrank": lambda a: torch.svd_lowrank(a, q=rank + extra, niter=iterations),
        "sklearn": lambda a: sklearn_svd(
            a.numpy(), rank, n_oversamples=extra, n_iter=iterations, random_state=0
        ),
    }
    if rank <= SVDS_LIMIT * small + 1:
        found["scipy svds"] = lambda a: svds(a.numpy(), k=rank, random_state=0)
    return found


def relative_error(a: torch.Tensor, usv: tuple, rank: int, transposed: bool) -> float:
    """Frobenius error of the rank-r product, over the norm of a."""
    u, s, v = (
        torch.as_tensor(t.copy() if hasattr(t, "dtype") and not isinstance(t, torch.Tensor) else t)
        for t in usv
    )
    vh = v.mT if transposed else v
    order = s.argsort(descending=True)[:rank]
    return float((a - (u[:, order] * s[order]) @ vh[order]).norm() / a.norm())


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest shape only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("bench/results/svd"))
    arguments = parser.parse_args()
    rows = []
    for m, n in SHAPES[:1] if arguments.quick else SHAPES:
        a, s = matrix(m, n)
        start = time.perf_counter()
        torch.linalg.svd(a, full_matrices=False)
        exact = time.perf_counter() - start
        for fraction in FRACTIONS:
            rank = round(fraction * min(m, n))
            optimum = float(s[rank:].norm() / s.norm())
            runs = contenders(rank, min(m, n))
            times: dict[str, list[float]] = {name: [] for name in runs}
            results = {}
            rounds = arguments.rounds if min(m, n) > 1000 else 3 * arguments.rounds
            for turn in range(rounds):
                for name, run in runs.items():
                    if name == "scipy svds" and turn:
                        continue
                    start = time.perf_counter()
                    results[name] = run(a)
                    times[name].append(time.perf_counter() - start)
            for name, taken in times.items():
                error = relative_error(a, results[name], rank, name == "torch.svd_lowrank")
                seconds = statistics.median(taken)
                rows.append(
                    {
                        "shape": [m, n],
                        "rank": rank,
                        "fraction": fraction,
                        "name": name,
                        "seconds": seconds,
                        "fastest": min(taken),
                        "slowest": max(taken),
                        "error_over_optimum": error / optimum,
                        "linalg_svd_seconds": exact,
                        "speedup_over_linalg_svd": exact / seconds,
                    }
                )
                print(
                    f"{m}×{n} rank {rank} {name:18} {seconds:8.3f} s "
                    f"{exact / seconds:7.1f}× linalg.svd  error/optimum {error / optimum:.4f}",
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
    import matplotlib.pyplot as plt

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
        panel.set(title=f"{shape[0]}×{shape[1]}", xscale="log", xlabel="seconds")
    panels[0][0].set_ylabel("Frobenius error ÷ optimum")
    panels[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
