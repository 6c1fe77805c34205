"""How much faster several processes calibrate and round: gloo, one thread each.

    python bench/parallel.py --model MODEL --processes 1 2 3

Compresses the model once with each number of processes, `torchrun --nproc-per-node N -m calr
compress`, with nothing beside it, and compares the phases. Text is the built-in one; no training.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich import print
from rich.table import Table

OPTIONS = "--bits 5 --calibration builtin --samples 24 --gradient_samples 12 --window 256"
PHASES = ("second moments", "gradients", "prices", "rounding")


def seconds(model: str, processes: int, place: Path) -> dict[str, float]:
    """Compress the model with so many processes; return the seconds of the phases."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(processes), "-m", "calr", "compress", model, str(place), *OPTIONS.split()]
    command += ["--correction_tokens", "0", "--eval_windows", "0", "--json"]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=one)
    found = json.loads(done.stdout)["phases"]
    return {phase: found[phase]["seconds"] for phase in PHASES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    default = Path(__file__).parent / "results/parallel.json"
    parser.add_argument("--output", type=Path, default=default)
    given = parser.parse_args()
    found = {}
    for count in given.processes:
        with TemporaryDirectory() as folder:
            found[count] = seconds(given.model, count, Path(folder) / "out")
    given.output.write_text(json.dumps(found, indent=2) + "\n")
    table = Table("processes", *PHASES, "all", "times the first's speed")
    first = sum(found[given.processes[0]].values())
    for count, taken in found.items():
        total = sum(taken.values())
        cells = [f"{taken[phase]:.1f} s" for phase in PHASES]
        table.add_row(str(count), *cells, f"{total:.1f} s", f"{first / total:.2f}")
    print(table)


if __name__ == "__main__":
    main()
