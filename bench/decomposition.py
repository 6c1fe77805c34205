"""Decomposing all layers of a model: one eigenproblem on the smaller side against full SVDs.

    python bench/decomposition.py --model MODEL

Both sides decompose every linear layer at the rank of keep 0.8, calibration excluded, taking turns
layer by layer. The full SVD is SVD-LLM's: Cholesky factor L of the input moments in float64, SVD of
W L in float32, factors U S^½ and S^½ Vᵀ L⁻¹. Writes bench/results/decomposition.json.
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path

import torch
from torch import Tensor

from calr import methods
from calr.methods import Moments
from calr.model import analyse, load
from calr.statistics import Statistics
from calr.storage import Store
from calr.text import calibration_windows
from calr_kernels.layout import rank_at

KEEP = 0.8


def full_svd(weight: Tensor, moments: Moments, rank: int) -> None:
    """Truncate as SVD-LLM does, with a damped Cholesky factor: undamped it fails."""
    g = moments.input.double()
    damped = g + 1e-6 * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
    root = torch.linalg.cholesky(damped)
    u, s, vh = torch.linalg.svd((weight.double() @ root).float(), full_matrices=False)
    half = s[:rank].sqrt()
    (u[:, :rank] * half).contiguous()
    torch.linalg.solve_triangular(
        root, (half[:, None] * vh[:rank]).double(), upper=False, left=False
    )


def ours(name: str):
    """Decompose by one of our methods: the error at every rank, and the factors at one."""
    method = methods.resolve(name, {})

    def run(weight: Tensor, moments: Moments, rank: int) -> None:
        method.decompose(weight, moments).factors(rank)

    return run


def sides() -> dict:
    """Name what is compared."""
    return {"calr": ours("calr"), "svd_llm": ours("svd_llm"), "full SVD": full_svd}


def peak(name: str, shapes: list[tuple[int, int]], queue) -> None:
    """Measure, in a fresh process, by how many bytes one side raises the peak of memory."""
    inputs = []
    for n, k in shapes:
        side = min(n, k)
        moments = Moments(torch.eye(k), 1.0, torch.eye(side))
        inputs.append((torch.randn(n, k), moments, side // 2))
    run = sides()[name]
    torch.linalg.eigh(torch.eye(8, dtype=torch.float64))  # the libraries' own memory
    before = high_water()
    for arguments in inputs:
        run(*arguments)
    queue.put(high_water() - before)


def high_water() -> int:
    """Return the most memory that this process has held, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Collect statistics, decompose every layer by turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, default=Path("bench/results/decomposition.json"))
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    structure = analyse(model)
    ids = calibration_windows("builtin", tokenizer, model, samples=16, window=512, seed=0)
    statistics = Statistics(model, structure, ids, Store(), gradient_ids=ids[:4], outputs=True)
    seconds = dict.fromkeys(sides(), 0.0)
    for layer in structure.layers:
        weight = model.get_submodule(layer.name).weight.detach()
        moments = statistics.moments(layer)
        rank = int(rank_at("pivoted", *weight.shape, KEEP))
        for name, run in sides().items():
            start = time.perf_counter()
            run(weight, moments, rank)
            seconds[name] += time.perf_counter() - start
    shapes = sorted({(layer.out_features, layer.in_features) for layer in structure.layers})
    context, memory = multiprocessing.get_context("spawn"), {}
    for name in sides():
        queue = context.Queue()
        child = context.Process(target=peak, args=(name, shapes, queue))
        child.start()
        memory[name] = queue.get()
        child.join()
    rows = [
        {
            "name": name,
            "seconds": seconds[name],
            "speedup_over_full_svd": seconds["full SVD"] / seconds[name],
            "peak_bytes": memory[name],
        }
        for name in seconds
    ]
    for row in rows:
        print(
            f"{row['name']:10} {row['seconds']:7.2f} s, "
            f"{row['speedup_over_full_svd']:.2f} x full SVD, "
            f"peak {row['peak_bytes'] / 2**20:.0f} MiB above the weights"
        )
    described = {"layers": len(structure.layers), "threads": torch.get_num_threads(), "rows": rows}
    arguments.output.write_text(json.dumps(described, indent=1))


if __name__ == "__main__":
    main()
