"""The low-rank linear against what a user would write, interleaved in one process.

    python bench/kernels.py [--device cuda] [--quick]

Every layer keeps half of its dense parameters (pivoted). Contenders compute a rank-r function of
M rows: `calr`, the module as it runs under torch.no_grad; `dense`, F.linear on the dense weight;
`two`, F.linear twice on two factors of that rank; `four`, two for a primary path, two for a
corrective path of rank 16, and their sum; `compiled`, torch.compile of `two`. Weights cycle through
more memory than the caches hold. Writes bench/results/kernels.json and kernels.png, prints a table.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import linear

from calr_kernels import LowRankLinear
from calr_kernels.layout import rank_at

LAYERS = {  # out_features, in_features
    "SmolLM2-135M q": (576, 576),
    "SmolLM2-135M up": (1536, 576),
    "SmolLM2-135M down": (576, 1536),
    "Llama-3.2-1B q": (2048, 2048),
    "Llama-3.2-1B up": (8192, 2048),
    "Llama-3-8B q": (4096, 4096),
}
ROWS = (1, 4, 16, 64, 256)
KEEP, CORRECTIVE = 0.5, 16
BURST = 8  # calls a turn, as decoding makes them: the code is warm, the weights are not
Run = Callable[[int], torch.Tensor]


def two(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Apply two factors as anybody would."""
    return linear(linear(x, down), up)


def contenders(
    n: int, k: int, m: int, dtype: torch.dtype, device: str, cycle: int, compiled: Callable
) -> dict[str, tuple[Run, int]]:
    """Make every contender, a function of the call's number, and its weights' bytes per call."""
    r = int(rank_at("pivoted", n, k, KEEP)) // 8 * 8
    x = torch.randn(m, k, device=device).to(dtype)

    def many(*shape: int) -> tuple[torch.Tensor, int]:
        copies = max(2, -(-cycle // (torch.Size(shape).numel() * dtype.itemsize)))
        block = torch.randn(shape, device=device).to(dtype) * shape[-1] ** -0.5
        return block.repeat(copies, *(1 for _ in shape)), copies

    weights, copies = many(n, k)
    downs, pairs = many(r, k)
    ups = many(n, r)[0]
    pairs = min(pairs, len(ups))
    layers = []
    for i in range(pairs):
        layer = LowRankLinear(k, n, r, "pivoted", bias=False, device="meta", dtype=dtype)
        layer.down.weight = torch.nn.Parameter(downs[i])
        layer.weight = torch.nn.Parameter(ups[i, r:])
        pivots = torch.arange(0, n, n // r, dtype=torch.int32, device=device)[:r]
        layer.register_buffer("pivots", pivots)
        layers.append(layer)
    p = r - CORRECTIVE

    def four(i: int) -> torch.Tensor:
        d, u = downs[i % pairs], ups[i % pairs]
        return two(x, d[:p], u[:, :p]) + two(x, d[p:], u[:, p:])

    bytes_of = dtype.itemsize
    return {
        "calr": (lambda i: layers[i % pairs](x), r * (n + k - r) * bytes_of),
        "dense": (lambda i: linear(x, weights[i % copies]), n * k * bytes_of),
        "two": (lambda i: two(x, downs[i % pairs], ups[i % pairs]), r * (n + k) * bytes_of),
        "four": (four, r * (n + k) * bytes_of),
        "compiled": (
            lambda i: compiled(x, downs[i % pairs], ups[i % pairs]),
            r * (n + k) * bytes_of,
        ),
    }


@torch.no_grad()
def measure(
    runs: dict[str, tuple[Run, int]], seconds: float, device: str, burst: int
) -> dict[str, list]:
    """Time every contender by turns of `burst` calls until the time is up, five turns or more."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run, _ in runs.values():
        run(0), run(1)
    started, call = time.perf_counter(), 0
    while call < 5 or (time.perf_counter() - started < seconds and call < 400):
        for turn, (run, _) in enumerate(runs.values()):
            first = burst * (len(runs) * call + turn)  # nobody reads what another has just read
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for i in range(first, first + burst):
                run(i)
            if device == "cuda":
                torch.cuda.synchronize()
            list(times.values())[turn].append((time.perf_counter() - start) / burst)
        call += 1
    return times


def streaming(threads: int, device: str) -> float:
    """Measure the bytes per second of reading memory: a matrix-vector product of 256 MiB."""
    torch.set_num_threads(threads)
    a, x = torch.randn(16384, 4096, device=device), torch.randn(4096, device=device)
    best = min(measure({"read": (lambda i: a @ x, 0)}, 1.0, device, 1)["read"])
    return a.numel() * 4 / best


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="two layers, one and 16 rows")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each cell")
    parser.add_argument("--cycle", type=int, default=400 << 20, help="bytes of weights to go round")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    device = arguments.device
    output = arguments.output or Path(f"bench/results/kernels{'' if device == 'cpu' else '-gpu'}")
    names = list(LAYERS)[::3][:2] if arguments.quick else list(LAYERS)
    threads = [1] if device == "cuda" else sorted({1, torch.get_num_threads()})
    dtypes = [torch.bfloat16] if device == "cuda" else [torch.float32, torch.bfloat16]
    bandwidth = {count: streaming(count, device) for count in threads}
    print({f"{count} threads": f"{rate / 1e9:.1f} GB/s" for count, rate in bandwidth.items()})
    rows, compiled = [], torch.compile(two, dynamic=True)
    for count, dtype, m in itertools.product(threads, dtypes, (1, 16) if arguments.quick else ROWS):
        torch.set_num_threads(count)
        for name in names:
            n, k = LAYERS[name]
            runs = contenders(n, k, m, dtype, device, arguments.cycle, compiled)
            times = measure(runs, arguments.seconds, device, BURST if m <= 16 else 1)
            medians = {key: statistics.median(taken) for key, taken in times.items()}
            row = {
                "layer": name,
                "shape": [n, k],
                "rows": m,
                "dtype": str(dtype).removeprefix("torch."),
                "threads": count,
                "seconds": medians,
                "fastest": {key: min(taken) for key, taken in times.items()},
                "share_of_bandwidth": runs["calr"][1] / medians["calr"] / bandwidth[count],
            }
            rows.append(row)
            ratios = "  ".join(
                f"{key} {medians[key] / medians['calr']:5.2f}x" for key in medians if key != "calr"
            )
            print(
                f"{count} threads {row['dtype']:8} M={m:<3} {name:18} calr "
                f"{1e6 * medians['calr']:8.1f} us  {ratios}  "
                f"{100 * row['share_of_bandwidth']:.0f} % of streaming",
                flush=True,
            )
    described = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "streaming_bytes_per_second": bandwidth,
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(described, indent=1))
    plot(rows, output.with_suffix(".png"))


def plot(rows: list[dict], path: Path) -> None:
    """Draw the speed-up over dense against the rows of x, a panel per dtype and thread count."""
    panels = sorted({(row["threads"], row["dtype"]) for row in rows})
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (threads, dtype) in zip(axes[0], panels, strict=True):
        chosen = [r for r in rows if (r["threads"], r["dtype"]) == (threads, dtype)]
        for name in dict.fromkeys(row["layer"] for row in chosen):
            points = [r for r in chosen if r["layer"] == name]
            ratio = [p["seconds"]["dense"] / p["seconds"]["calr"] for p in points]
            axis.plot([p["rows"] for p in points], ratio, "o-", label=name)
        axis.axhline(1, color="grey", linestyle=":")
        axis.set(title=f"{dtype}, {threads} threads", xscale="log", xlabel="rows of x")
    axes[0][0].set_ylabel("dense time ÷ calr time, keep 0.5")
    axes[0][-1].legend(fontsize=6)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
