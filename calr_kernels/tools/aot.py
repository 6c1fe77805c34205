"""Compile every Triton kernel ahead of time for named GPUs and report what came out.

    python -m calr_kernels.tools.aot --arch sm_80,sm_90,sm_100,gfx942 [--set small] [--json FILE]

Needs no GPU and no driver. The launches are those that `calr_kernels.gpu` makes for real layer
shapes; what compiles to the same code is compiled once. Exits with 1 on a spill, on a limit
exceeded, where matrix-vector products read weights in less than 16 bytes at a time, where float32
is multiplied in TF32, or where second moments get no wgmma on sm_90.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from calr_kernels.forms import Form
from calr_kernels.gpu import launch, linears
from calr_kernels.gpu.arch import ARCHS, Arch
from calr_kernels.gpu.gram import gram, run_gram
from calr_kernels.layout import LAYOUTS, Records, rank_at
from calr_kernels.tools.disassembly import read

MODELS = {  # (out_features, in_features) of the linear layers
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "Llama-3.2-1B": [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)],
    "Llama-3-8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
}
KEEPS = (0.8, 0.5)
ROWS = (1, 2, 3, 4, 16, 64, 512)
FORMS = {
    "int3": Form(3, "table", 64, corrective_rank=16),
    "int4": Form(4, "table", 32, corrective_rank=16),
    "int4 uniform": Form(4, "uniform", 64),
    "int5": Form(5, "formula", 64, corrective_rank=16),
    "int6": Form(6, "formula", 64),
    "int8": Form(8, "uniform", 32, corrective_rank=16),
}
SMALL = ("int4", "int5", "int8")
GRAMS = (576, 4096, 14336)  # in_features, for xᵀx over 8192 rows
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.int16: "*i16", torch.uint8: "*u8",
}  # fmt: skip
VECTOR = ("gemv", "quantized_gemv")  # products with few rows: 16 bytes of weights at a time


@dataclass(frozen=True)
class Case:
    """One call to compile: a layer of a form at a number of rows, for one GPU."""

    form: str  # pivoted, two_factor, a name in FORMS, or "second moments"
    m: int
    n: int
    k: int
    r: int
    dtype: str
    arch: str


@dataclass(frozen=True)
class Launch:
    """One kernel launch as recorded: all that determines its compilation."""

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def kernel(self) -> Any:
        """The function that is launched."""
        return getattr(importlib.import_module(self.module), self.name)


@contextlib.contextmanager
def recording(arch: Arch) -> Iterator[list[Launch]]:
    """Collect the launches that `calr_kernels.gpu` would make on a GPU, instead of making them."""
    found: list[Launch] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        found.append(_recorded(kernel, arguments, **constants))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(launch, "device_arch", lambda device: arch),
    ):
        yield found


def _recorded(kernel: Any, arguments: tuple[Any, ...], **constants: Any) -> Launch:
    """Describe a launch as the launcher would specialise it."""
    fixed = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, aligned = [], []
    for index, value in enumerate(arguments):
        parameter = kernel.params[index]
        if isinstance(value, Tensor):
            signature.append((parameter.name, POINTERS[value.dtype]))
            aligned.append(index)
        elif value == 1 and not parameter.do_not_specialize:
            fixed[parameter.name] = 1
        else:
            signature.append((parameter.name, "i32" if value < 2**31 else "i64"))
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(index)
    chosen = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    return Launch(
        kernel.__module__,
        kernel.__name__,
        tuple(signature),
        tuple(sorted(fixed.items())),
        tuple(aligned),
        tuple(sorted(chosen.items())),
    )


def launches_of(case: Case) -> list[Launch]:
    """Return the launches of a case."""
    dtype = getattr(torch, case.dtype)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = tensor(case.m, case.k)
    with recording(ARCHS[case.arch]) as found:
        if case.form == "second moments":
            run_gram(x)
        elif case.form in FORMS:
            form = FORMS[case.form]
            weight = tensor(*form.shape(case.n, case.k), dtype=torch.uint8)
            paths = (tensor(case.r, case.k), tensor(case.r, case.n)) if case.r else ()
            linears.quantized_linear(x, Records(weight, form, case.k, None, *paths))
        else:
            pivots = tensor(case.r, dtype=torch.int32) if case.form == "pivoted" else None
            up = tensor(case.n - (0 if pivots is None else case.r), case.r)
            linears.lowrank_linear(x, tensor(case.r, case.k), up, pivots, None)
    return found


def compile_launch(made: Launch, arch: Arch) -> dict[str, Any]:
    """Compile one launch for a GPU: registers, spilled bytes, shared memory, instructions."""
    function = made.kernel
    constants = dict(made.constants)
    signature = {name: "constexpr" for name in function.arg_names} | dict(made.signature)
    source = ASTSource(
        function,
        signature,
        constexprs={name: constants[name] for name in function.arg_names if name in constants},
        attrs={(index,): [["tt.divisibility", 16]] for index in made.aligned},
    )
    options = dict(made.options)
    compiled = triton.compile(
        source, target=GPUTarget(arch.backend, arch.version, arch.warp), options=options
    )
    found = read(compiled.asm)
    threads = options["num_warps"] * arch.warp
    return found | {"shared": compiled.metadata.shared, "threads": threads}


def faults(made: Launch, found: dict[str, Any], arch: Arch) -> list[str]:
    """List what is wrong with a compiled launch; empty when it is clean."""
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
    if made.name in VECTOR and (found["narrow_loads"] or not found["wide_loads"]):
        wrong.append("reads weights in less than 16 bytes at a time")
    if arch.backend == "cuda" and ("x", "*fp32") in made.signature and found["matrix"]:
        wrong.append("multiplies float32 in TF32")
    if arch.name == "sm_90" and made.name == gram.__name__ and not found["matrix"].get("wgmma"):
        wrong.append("has 64 rows but no wgmma")
    return wrong


def cases(small: bool, archs: list[str]) -> list[Case]:
    """List what to compile: every layer shape, or the least that reaches every kernel."""
    found = []
    for arch in archs:
        shapes = {shape for model in MODELS.values() for shape in model}
        for n, k in [(4096, 4096)] if small else sorted(shapes):
            for m in (1, 4, 16, 512) if small else ROWS:
                for layout in LAYOUTS:
                    for keep in KEEPS[1:] if small else KEEPS:
                        r = int(rank_at(layout, n, k, keep)) // 8 * 8
                        found.append(Case(layout, m, n, k, r, "bfloat16", arch))
                for name in SMALL if small else FORMS:
                    r = FORMS[name].corrective_rank
                    found.append(Case(name, m, n, k, r, "bfloat16", arch))
        found.append(Case("pivoted", 4, 4096, 4096, 1024, "float32", arch))
        found.append(Case("int4", 4, 4096, 4096, 16, "float32", arch))
        found += [
            Case("second moments", 8192, k, k, 0, "bfloat16", arch)
            for k in (GRAMS[1:2] if small else GRAMS)
        ]
    return found


def report(launched: tuple[Launch, Arch]) -> dict[str, Any]:
    """Compile a launch for a GPU and return its row."""
    made, arch = launched
    compiled = compile_launch(made, arch)
    return (
        {"arch": arch.name, "kernel": made.name, "constants": dict(made.constants)}
        | {"dtype": next(kind[1:] for _, kind in made.signature if kind.startswith("*"))}
        | compiled
        | {"faults": faults(made, compiled, arch)}
    )


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
    made = {
        (launched, ARCHS[case.arch]): None
        for case in cases(arguments.set == "small", archs)
        for launched in launches_of(case)
    }
    rows = []
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        for number, row in enumerate(pool.map(report, made), 1):
            rows.append(row)
            print(f"[{number}/{len(made)}] {describe(row)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    wrong = sum(bool(row["faults"]) for row in rows)
    print(f"{len(rows)} kernels compiled, {wrong} with faults")
    return 1 if wrong else 0


def describe(row: dict[str, Any]) -> str:
    """Format a row: a line a kernel."""
    constants = " ".join(f"{name}={int(value)}" for name, value in row["constants"].items())
    matrix = " ".join(f"{name}:{count}" for name, count in row["matrix"].items()) or "none"
    fault = "; ".join(row["faults"])
    return (
        f"{row['arch']} {row['kernel']} {row['dtype']} {constants} registers={row['registers']} "
        f"spilled={row['spilled']} shared={row['shared']} loop={row['loop']} matrix={matrix} "
        f"wide={row['wide_loads']} async={row['asynchronous']}"
        + (f"  FAULT: {fault}" if fault else "")
    )


if __name__ == "__main__":
    sys.exit(main())
