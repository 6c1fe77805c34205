"""All that there is to learn from a GPU, in stages of at most eight minutes.

    python bench/gpu.py --model MODEL [--only "chains, 8B" ...] [--again]

A stage is a command of its own, with a log in demo/gpu: the kernels' tests, some of them under
compute-sanitizer where that is installed, chains of layers, single layers, a decoder with a
captured step, the compression of MODEL and its speed afterwards. What has passed is not run again
by the same command, unless --again: a machine may be lent for minutes at a time. Prints a table,
writes gpu.json in bench/results, and exits with 1 if a stage has failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import print
from rich.table import Table
from texts import write_json

WORK, OUTPUT = Path("demo/gpu"), Path("bench/results/gpu.json")
LIMIT = 480  # seconds of a stage
FEW = "corrective or bfloat16 or views or strided or interleave"  # tests for the slow sanitizers


@dataclass(frozen=True)
class Stage:
    """A command, and where it writes what it found, if not to standard output as JSON."""

    command: list[str]
    found: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def stages(model: str, device: str) -> dict[str, Stage]:
    """List what there is to run."""
    here, tests = [sys.executable], ["-m", "pytest", "--device", device]
    kernels = "tests/calr_kernels/gpu"
    others = [
        f"tests/calr_kernels/test_{n}.py" for n in ("ops", "nn", "quantized", "scaled", "svd")
    ]
    found = {
        "tests, kernels": Stage([*here, *tests, kernels]),
        "tests, operators": Stage([*here, *tests, *others]),
    }
    for tool in ("memcheck", "racecheck"):
        watched = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *here, *tests]
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found[tool] = Stage([*watched, kernels, "-k", FEW], environment=uncached)
    for name, script, options in (
        ("chains, 8B", "chains", ["--model", "8B"]),
        ("chains, 1B", "chains", ["--model", "1B"]),
        ("single layers", "kernels", ["--device", device]),
        ("decoder, 8B", "captured", ["--shape", "8B", "--device", device]),
        ("decoder, 1B", "captured", ["--shape", "1B", "--blocks", "16", "--device", device]),
    ):
        place = file_of(name, ".json")
        command = [*here, f"bench/{script}.py", *options, "--output", str(place)]
        found[name] = Stage(command, place)
    for name, budget in (("5 bits", ["--bits", "5"]), ("keep 0.8", ["--keep", "0.8"])):
        made = str(file_of(name, ""))
        options = ["--device", device, "--json"]
        command = [*here, "-m", "calr", "compress", model, made, *budget, "--overwrite", *options]
        found[f"compression, {name}"] = Stage(command)
        timed = [*here, "-m", "calr", "bench", made, "--against", model, *options]
        found[f"speed, {name}"] = Stage(timed)
    return found


def file_of(stage: str, suffix: str) -> Path:
    """Name a file of a stage."""
    return WORK / (stage.replace(", ", "-").replace(" ", "-") + suffix)


def run(name: str, stage: Stage) -> dict[str, Any]:
    """Run a stage; return its outcome, seconds, and what it found."""
    if shutil.which(stage.command[0]) is None:
        return {"outcome": f"left out: {stage.command[0]} is not installed", "seconds": 0.0}
    printed, errors, started = file_of(name, ".out"), file_of(name, ".log"), time.monotonic()
    environment, seen = os.environ | stage.environment, f"see {errors} and {printed}"
    with errors.open("w") as log, printed.open("w") as out:
        try:
            done = subprocess.run(
                stage.command, stdout=out, stderr=log, env=environment, timeout=LIMIT, check=False
            )
            outcome = "passed" if done.returncode == 0 else f"failed: {seen}"
        except subprocess.TimeoutExpired:
            outcome = f"not done in {LIMIT} s: {seen}"
    result: dict[str, Any] = {"outcome": outcome, "seconds": round(time.monotonic() - started, 1)}
    if outcome == "passed":
        place = stage.found or (printed if "--json" in stage.command else None)
        result["found"] = None if place is None else json.loads(place.read_text())
    return result


def main() -> None:
    """Run what has not passed yet, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="what is compressed: directory or GGUF file")
    parser.add_argument("--only", nargs="+", help="stages; by default all")
    parser.add_argument("--again", action="store_true", help="run those that have passed, too")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    every = stages(given.model, given.device)
    if unknown := set(given.only or ()) - set(every):
        parser.error(
            f"--only: no stage is called {', '.join(unknown)}; there are {', '.join(every)}"
        )
    known = json.loads(given.output.read_text()) if given.output.exists() else {}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    if known.get("gpu") != gpu:
        known = {"gpu": gpu, "torch": torch.__version__, "stages": {}}
    WORK.mkdir(parents=True, exist_ok=True)
    done = known["stages"]
    for name in given.only or every:
        if given.again or done.get(name, {}).get("outcome") != "passed":
            print(f"{name} ...", flush=True)
            done[name] = run(name, every[name])
            write_json(given.output, known)
    table = Table("stage", "outcome", "time", title=gpu)
    for name, result in done.items():
        table.add_row(name, result["outcome"], f"{result['seconds']:.0f} s")
    print(table)
    sys.exit(any(result["outcome"].startswith(("failed", "not done")) for result in done.values()))


if __name__ == "__main__":
    main()
