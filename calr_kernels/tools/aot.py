"""Compile every Triton kernel ahead of time for named GPUs and report what came out.

    python -m calr_kernels.tools.aot --arch sm_80,sm_90,sm_100,gfx942 [--set small] [--json FILE]

Needs no GPU and no driver. The launches are those that `calr_kernels.gpu` makes for real layer
shapes, with the tiles that the chooser picks. Exits with 1 on a spill, on a limit exceeded, or on a
16-bit tile of 64 rows or more without wgmma on sm_90.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from calr_kernels.gpu import launches, plans
from calr_kernels.gpu.gram import gram
from calr_kernels.gpu.plans import ARCHS, Arch
from calr_kernels.layout import LAYOUTS, rank_at

MODELS = {  # (out_features, in_features) of the linear layers
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "Llama-3.2-1B": [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)],
    "Llama-3-8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "Qwen3-8B": [(4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288)],
}
KEEPS = (0.8, 0.5)
ROWS = (1, 4, 16, 64, 512, 4096)
CORRECTIVE = 64  # a separate corrective path is on_chip's case
GRAMS = (576, 4096, 14336)  # in_features, for xᵀx over 8192 rows
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
MATRIX = {  # instruction of the matrix unit: pattern in the disassembly
    "wgmma": r"\bHGMMA",
    "tcgen05": r"\bUTC\w*MMA",
    "mma": r"\bHMMA",
    "mfma": r"\bv_mfma",
}


@dataclass(frozen=True)
class Case:
    """One call to compile: a layer shape at a number of rows, for one GPU."""

    op: str
    model: str
    m: int
    n: int
    k: int
    r: int
    pivoted: bool
    dtype: str
    arch: str


@dataclass(frozen=True)
class Launch:
    """One kernel launch as recorded: all that determines its compilation."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    warps: int
    stages: int


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches that `calr_kernels.gpu` would make, instead of making them."""
    found: list[Launch] = []
    real: Any = vars(launches)["launch"]
    vars(launches)["launch"] = lambda kernel, grid, *arguments, **constants: found.append(
        _recorded(kernel, arguments, **constants)
    )
    try:
        yield found
    finally:
        vars(launches)["launch"] = real


def _recorded(
    kernel: Any, arguments: tuple[Any, ...], num_warps: int, num_stages: int, **constants: Any
) -> Launch:
    """Describe a launch as the launcher would specialise it."""
    signature, fixed, aligned = [], dict(constants), []
    for index, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, Tensor):
            signature.append((name, POINTERS[value.dtype]))
            aligned.append(index)
        elif value == 1:
            fixed[name] = 1
        else:
            signature.append((name, "i32" if value < 2**31 else "i64"))
            if value % 16 == 0:
                aligned.append(index)
    return Launch(
        kernel,
        tuple(signature),
        tuple(sorted(fixed.items())),
        tuple(aligned),
        num_warps,
        num_stages,
    )


def launches_of(case: Case) -> tuple[str, float, list[Launch]]:
    """Return how a case runs, the modelled seconds, and its launches (none: library products)."""
    arch, dtype = ARCHS[case.arch], getattr(torch, case.dtype)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with recording() as found:
        if case.op == "gram":
            launches.gram(tensor(case.m, case.k), arch=arch)
            return "gram", 0.0, found
        rows = case.n - case.r if case.pivoted else case.n
        plan = plans.plan(
            plans.bucket(case.m), rows, case.k, case.r, dtype.itemsize, arch, case.pivoted
        )
        launches.lowrank_linear(
            tensor(case.m, case.k),
            tensor(case.r, case.k),
            tensor(rows, case.r),
            tensor(case.r, dtype=torch.int32) if case.pivoted else None,
            None,
            plan=plan,
        )
    return plan.kind, plan.seconds, found


def compile_launch(launch: Launch, arch: Arch) -> dict[str, Any]:
    """Compile one launch for a GPU: registers, spilled bytes, shared memory, instructions."""
    function = launch.kernel
    constants = dict(launch.constants)
    signature = {name: "constexpr" for name in function.arg_names} | dict(launch.signature)
    source = ASTSource(
        function,
        signature,
        constexprs={name: constants[name] for name in function.arg_names if name in constants},
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget(arch.backend, arch.version, arch.warp),
        options=launches.options(launch.warps, launch.stages),
    )
    found = _amd(compiled.asm["amdgcn"]) if arch.backend == "hip" else _nvidia(compiled.asm)
    return found | {"shared": compiled.metadata.shared, "threads": launch.warps * arch.warp}


def faults(launch: Launch, found: dict[str, Any], arch: Arch) -> list[str]:
    """List what is wrong with a compiled launch; empty when it is clean."""
    constants = dict(launch.constants)
    wrong = []
    if found["spilled"]:
        wrong.append(f"spills {found['spilled']} bytes")
    if found["shared"] > arch.shared:
        wrong.append(f"needs {found['shared']} bytes of shared memory, has {arch.shared}")
    limit = 512 if arch.backend == "hip" else 255
    if found["registers"] > limit:
        wrong.append(f"needs {found['registers']} registers, has {limit}")
    if arch.backend == "cuda" and found["registers"] * found["threads"] > 65536:
        wrong.append("needs more registers than a processor has")
    tall = constants.get("BLOCK_M", 0) >= 64 and launch.kernel is not gram
    wide = ("x", "*fp32") not in launch.signature
    if arch.name == "sm_90" and tall and wide and not found["matrix"].get("wgmma"):
        wrong.append("has 64 rows but no wgmma")
    return wrong


def cases(small: bool, archs: list[str]) -> list[Case]:
    """List what to compile: every layer shape, or the least that reaches every kernel."""
    found = []
    for arch in archs:
        for model, shapes in MODELS.items():
            if small and model != "Llama-3-8B":
                continue
            for (n, k), keep, m in (
                (shape, keep, m)
                for shape in (shapes[:1] if small else shapes)
                for keep in (KEEPS[1:] if small else KEEPS)
                for m in ((1, 16, 512) if small else ROWS)
            ):
                for layout in LAYOUTS:
                    r = int(rank_at(layout, n, k, keep)) // 8 * 8
                    pivoted = layout == "pivoted"
                    found.append(Case("layer", model, m, n, k, r, pivoted, "bfloat16", arch))
        found.append(
            Case("layer", "corrective", 16384, 4096, 4096, CORRECTIVE, False, "bfloat16", arch)
        )
        found.append(Case("layer", "float32", 64, 4096, 4096, 1024, True, "float32", arch))
        found += [
            Case("gram", "second moments", 8192, k, k, 0, False, "bfloat16", arch)
            for k in (GRAMS[1:2] if small else GRAMS)
        ]
    return found


def report(case: Case) -> dict[str, Any]:
    """Compile all launches of a case and return its row."""
    arch = ARCHS[case.arch]
    kind, seconds, made = launches_of(case)
    found = [compile_launch(launch, arch) for launch in made]
    itemsize = getattr(torch, case.dtype).itemsize
    row: dict[str, Any] = dataclasses.asdict(case) | {"runs": kind, "launches": []}
    for launch, compiled in zip(made, found, strict=True):
        blocks = {name: v for name, v in launch.constants if name.startswith(("BLOCK", "SPLIT"))}
        row["launches"].append(
            {"kernel": launch.kernel.__name__, "tiles": blocks, "warps": launch.warps}
            | compiled
            | {"faults": faults(launch, compiled, arch)}
        )
    if case.op == "layer":
        rows = case.n - case.r if case.pivoted else case.n
        sizes = (case.m, rows, case.k, case.r, itemsize)
        row["bytes"] = plans.plan_bytes(*sizes, arch, case.pivoted)
        row["least_bytes"] = plans.minimum_bytes(*sizes, case.pivoted)
        row["modelled_seconds"] = seconds
        row["roofline_seconds"] = plans.roofline_seconds(*sizes, arch, case.pivoted)
    return row


def main() -> int:
    """Compile, print the table, write JSON; return 1 when something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m calr_kernels.tools.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", default=",".join(ARCHS), help="comma-separated, default all")
    parser.add_argument("--set", choices=("full", "small"), default="full", help="layer shapes")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    archs = arguments.arch.split(",")
    for name in archs:
        if name not in ARCHS:
            parser.error(f"--arch {name}: unknown; choose from {', '.join(ARCHS)}")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set; unset it to compile")
    todo = cases(arguments.set == "small", archs)
    rows = []
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        for number, row in enumerate(pool.map(report, todo), 1):
            rows.append(row)
            print(f"[{number}/{len(todo)}] {describe(row)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    wrong = sum(bool(launch["faults"]) for row in rows for launch in row["launches"])
    print(f"{sum(len(row['launches']) for row in rows)} launches compiled, {wrong} with faults")
    return 1 if wrong else 0


def describe(row: dict[str, Any]) -> str:
    """Format a row: the case, then one line per launch."""
    layout = "" if row["op"] == "gram" else " pivoted" if row["pivoted"] else " two_factor"
    head = (
        f"{row['arch']} {row['model']} {row['dtype']} {row['m']}x{row['k']}->{row['n']} "
        f"rank {row['r']}{layout}: {row['runs']}"
    )
    if "modelled_seconds" in row:
        head += (
            f", {row['bytes'] / row['least_bytes']:.2f} of the least bytes, modelled "
            f"{1e6 * row['modelled_seconds']:.1f} us, "
            f"roofline {1e6 * row['roofline_seconds']:.1f} us"
        )
    lines = [head]
    for launch in row["launches"]:
        sizes = " ".join(f"{name}={value}" for name, value in launch["tiles"].items())
        matrix = " ".join(f"{name}:{count}" for name, count in launch["matrix"].items()) or "none"
        fault = "; ".join(launch["faults"])
        lines.append(
            f"    {launch['kernel']:10} {sizes} warps={launch['warps']} "
            f"registers={launch['registers']} spilled={launch['spilled']} "
            f"shared={launch['shared']} matrix={matrix} wide={launch['wide_loads']} "
            f"async={launch['asynchronous']}" + (f"  FAULT: {fault}" if fault else "")
        )
    return "\n".join(lines)


def _nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    """Read a cubin with the tools that triton carries."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        text = _output(tools / "nvdisasm", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    assert registers and stack
    return {
        "registers": int(registers[1]),
        "spilled": int(stack[1]),
        "matrix": _matrix(text),
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\S*\.128", text)),
        "asynchronous": len(re.findall(r"\b(?:LDGSTS|UTMALDG)", text)),
    }


def _amd(text: str) -> dict[str, Any]:
    """Read the footer and the instructions of an amdgcn listing."""

    def footer(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", text)
        assert match, name
        return int(match[1])

    return {
        "registers": footer("vgpr_count"),
        "spilled": footer("private_segment_fixed_size"),
        "matrix": _matrix(text),
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", text)),
        "asynchronous": len(re.findall(r"\bbuffer_load\S* .*\blds\b", text)),
    }


def _matrix(text: str) -> dict[str, int]:
    counts = {name: len(re.findall(pattern, text)) for name, pattern in MATRIX.items()}
    return {name: count for name, count in counts.items() if count}


def _output(*command: Any) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
