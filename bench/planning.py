"""What compressing large models takes, on one GPU, modelled: memory, disk, time by phase.

    python bench/planning.py

Modelled, none of it measured: memory of the GPU and of the process by what each phase holds
(`calr.estimates`; beside runs on a CPU in docs/large-models.md), time by operations over the speed
that an H200 reached in second moments and in training (docs/gpu.md), a small part of what its
products can do. How fast a GPU rounds is not known at all. What fits leaves a fifth of a GPU free,
as `calr compress` does. The models are built without weights, from their published shapes.
"""

import argparse
import json
from pathlib import Path

from rich import print
from rich.table import Table
from shapes import SHAPES, work

from calr import Recipe
from calr.estimates import Ways
from calr.limits import OF_FREE

GPUS = {"24 GB": 24e9, "80 GB": 80e9, "141 GB": 141e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--correction_tokens", type=int, default=65_536)
    default = Path(__file__).parent / "results/planning.json"
    parser.add_argument("--output", type=Path, default=default)
    given = parser.parse_args()
    table, rows = Table("model", "largest phases", "disk", "memory", "time", *GPUS), {}
    recipe = Recipe(bits=5, correction_tokens=given.correction_tokens)
    for name, shape in SHAPES.items():
        made = work(shape, recipe, "cuda")
        phases = made.phases(Ways(checkpointed=True))
        largest = sorted(phases.items(), key=lambda item: -item[1].gpu_bytes)
        result = int(5 / 8 * made.structure.model_parameters)
        seconds = sum(phase.seconds for phase in phases.values())
        fits = {}
        for gpu, room in GPUS.items():
            beyond = [phase for phase, taken in largest if taken.gpu_bytes > OF_FREE * room]
            fits[gpu] = f"not {', '.join(beyond)}" if beyond else "fits"
        shown = [f"{phase} {taken.gpu_bytes / 1e9:.0f} GB" for phase, taken in largest[:3]]
        hours = f"{seconds / 3600:.1f} h"
        kept = made.disk(result), max(taken.peak_bytes for taken in phases.values())
        beside = [f"{count / 1e9:.0f} GB" for count in kept]
        table.add_row(name, ", ".join(shown), *beside, hours, *fits.values())
        rows[name] = {
            "phases": {phase: taken.to_dict() for phase, taken in phases.items()},
            "disk_bytes": made.disk(result),
            "fits": fits,
        }
    given.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(table)


if __name__ == "__main__":
    main()
