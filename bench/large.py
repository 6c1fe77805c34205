"""Memory and time of compressing models larger than one would load, of synthetic weights.

    python bench/large.py --blocks 7 14 28 --work /tmp/large
    python bench/large.py --blocks 8 --gguf Q8_0 --parts 2 --work /tmp/large
    python bench/large.py --like 30B-A3B --blocks 2 --work /tmp/large
    python bench/large.py --largest --device cuda --work /tmp/large

Writes a model of the shapes of one of bench/shapes.py, by default Llama-3.2-3B's (28 blocks: 3.2
billion parameters, 6.4 GB in bfloat16), with as many blocks as asked, one at a time; compresses it
in a process of its own, whose peak of resident memory the system counts; prints what phases took
beside what was modelled, and a table, and writes JSON.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich import print
from rich.table import Table
from shapes import SHAPES, Shape, largest, write_gguf, write_safetensors

from calr import Recipe
from calr.tables import print_phases

COMPRESS = (
    "--bits 5 --calibration builtin --samples 16 --gradient_samples 4 --window 256 --eval_windows 0"
)


def compressed(model: Path, output: Path, options: list[str], log: Path) -> dict[str, Any]:
    """Compress a model in a process of its own; return what that took."""
    command = [sys.executable, "-m", "calr", "compress", str(model), str(output)]
    command += [*shlex.split(COMPRESS), *options, "--overwrite", "--json"]
    started = time.monotonic()
    printed = log.with_suffix(".json")
    with log.open("w") as errors, printed.open("w") as out:
        files = ((1, out), (2, errors))
        to = [(os.POSIX_SPAWN_DUP2, file.fileno(), stream) for stream, file in files]
        pid = os.posix_spawn(command[0], command, os.environ, file_actions=to)
        _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}: failed; see {log}")
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    return {
        "seconds": round(time.monotonic() - started, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        "bytes": size,
        "phases": json.loads(printed.read_text())["phases"],
    }


def chosen(given: argparse.Namespace) -> list[tuple[str, Shape]]:
    """List the models that are asked for."""
    if not given.largest:
        shape = SHAPES[given.like]
        return [(given.like, shape.of_blocks(n)) for n in given.blocks or [shape.blocks]]
    recipe = Recipe(bits=5, correction_tokens=int(given.correction_tokens))
    return [largest(given.device, given.work, recipe)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--like", choices=SHAPES, default="3B")
    parser.add_argument("--blocks", type=int, nargs="+", help="by default all")
    parser.add_argument("--largest", action="store_true", help="of those shapes, that fits")
    parser.add_argument("--gguf", help="a type, such as Q8_0, of the source; else safetensors")
    parser.add_argument("--parts", type=int, default=1, help="files of a GGUF model")
    parser.add_argument("--correction_tokens", default="0")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, required=True, help="where models are written, kept")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/large.json")
    given = parser.parse_args()
    if given.gguf and SHAPES[given.like].kind != "llama":
        sys.exit(f"--gguf: writes Llamas alone, not {given.like}")
    given.work.mkdir(parents=True, exist_ok=True)
    known = json.loads(given.output.read_text()) if given.output.exists() else {}
    for like, shape in chosen(given):
        kind = given.gguf or "bfloat16"
        kind += f" in {given.parts} parts" if given.parts > 1 else ""
        name = f"{like}, {shape.blocks} blocks, {kind}"
        model = given.work / name.replace(",", "").replace(" ", "-")
        if not model.exists():
            unfinished = model.with_name(f"{model.name}-unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            if given.gguf:
                write_gguf(unfinished, shape, given.gguf, given.parts)
            else:
                write_safetensors(unfinished, shape)
            unfinished.rename(model)
        source = sum(file.stat().st_size for file in model.glob("*-of-*.safetensors"))
        source = source or sum(file.stat().st_size for file in model.glob("*.gguf"))
        options = ["--correction_tokens", given.correction_tokens, "--device", given.device]
        output = Path(f"{model}-{given.correction_tokens}")
        found = compressed(model, output, options, output.with_suffix(".log"))
        name += f", {given.correction_tokens} tokens of correction, {given.device}"
        known[name] = {"source_bytes": source} | found
        given.output.write_text(json.dumps(known, indent=2) + "\n")
        print(name)
        print_phases(found["phases"])
    table = Table("model", "source", "result", "peak memory", "time")
    for name, row in known.items():
        sizes = (f"{row[key] / 1e9:.2f} GB" for key in ("source_bytes", "bytes", "peak_bytes"))
        table.add_row(name, *sizes, f"{row['seconds'] / 60:.1f} min")
    print(table)


if __name__ == "__main__":
    main()
