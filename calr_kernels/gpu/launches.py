"""Launching the Triton kernels on an NVIDIA or AMD GPU, or in Triton's interpreter on the CPU.

Shapes are trusted: `calr_kernels.ops` checks them, and `calr_kernels.eligible` the rest.
"""

import contextlib
import dataclasses
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from calr_kernels import reference
from calr_kernels.gpu import plans
from calr_kernels.gpu.gram import gram as gram_kernel
from calr_kernels.gpu.on_chip import on_chip
from calr_kernels.gpu.plans import Arch, Plan, Tiles
from calr_kernels.gpu.product import KEEP, OTHERS, PIVOTS
from calr_kernels.gpu.product import product as product_kernel
from calr_kernels.gpu.rank_split import rank_split


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel: the one place, where the ahead-of-time compiler stands in."""
    kernel[grid](*arguments, **constants)


def lowrank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    pivots: Tensor | None,
    bias: Tensor | None,
    *,
    plan: Plan | None = None,
    emulate_bf16: bool = False,
) -> Tensor:
    """Compute what `calr_kernels.lowrank_linear` and `pivoted_linear` do; pivots must ascend.

    plan: how, by default the chooser's. emulate_bf16: float32 tensors that hold bfloat16 values are
    rounded as bfloat16 would be (the interpreter cannot compute in bfloat16).
    """
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    m, k, r = rows.shape[0], rows.shape[1], down.shape[0]
    if plan is None:
        plan = plans.plan(
            plans.bucket(m),
            up.shape[0],
            k,
            r,
            x.itemsize,
            device_arch(x.device),
            pivots is not None,
        )
    if plan.kind == "library":
        if pivots is None:
            return reference.lowrank_linear(x, down, up, bias)
        return reference.pivoted_linear(x, down, up, pivots, bias)
    n = up.shape[0] + (0 if pivots is None else r)
    y = x.new_empty(*x.shape[:-1], n)
    run = _products if plan.kind == "products" else _one_launch
    with _on(x.device):
        run(rows, down, up, pivots, bias, y.view(-1, n), plan, emulate_bf16)
    return y


def gram(x: Tensor, out: Tensor | None = None, *, arch: Arch | None = None) -> Tensor:
    """Compute xᵀ x (+ out) in float32: x [M, K] -> [K, K]; adds in place when out is given."""
    arch = arch or device_arch(x.device)
    x = x if x.stride(-1) == 1 else x.contiguous()
    m, k = x.shape
    result = torch.empty(k, k, dtype=torch.float32, device=x.device) if out is None else out
    block, depth, stages = gram_tiles(k, x.itemsize, arch)
    side = triton.cdiv(k, block)
    with _on(x.device):
        launch(
            gram_kernel, (side, side), x, result, m, k, x.stride(0),
            ADD=out is not None, BLOCK=block, BLOCK_M=depth,
            **options(8 if block == 128 else 4, stages),
        )  # fmt: skip
    return result


def gram_tiles(k: int, itemsize: int, arch: Arch) -> tuple[int, int, int]:
    """Choose (side of an output tile, rows a step, stages): small tiles where there are few."""
    block = 128 if (k / 128) ** 2 / 2 >= arch.processors and itemsize == 2 else 64
    return block, 64 if itemsize == 2 else 32, 2 if arch.backend == "hip" else 3


@cache
def device_arch(device: torch.device) -> Arch:
    """Return the model of a device: the newest known architecture not newer than it, or the oldest,
    with the processors and the shared memory that it has; of AMD's, always the one known."""
    if device.type != "cuda":  # the interpreter
        return plans.ARCHS["sm_90"]
    if torch.version.hip:
        return plans.ARCHS["gfx942"]
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted(
        (a for a in plans.ARCHS.values() if a.backend == "cuda"), key=lambda a: int(a.version)
    )
    older = [a for a in known if int(a.version) <= 10 * major + minor]
    found = older[-1] if older else known[0]
    properties = torch.cuda.get_device_properties(device)
    # consumer GPUs have less shared memory than the best of their generation; torch may not say
    shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    return dataclasses.replace(
        found,
        name=f"{found.name}/{properties.name.replace(' ', '_')}",
        processors=properties.multi_processor_count,
        shared=min(found.shared, shared),
    )


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, so make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _products(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    pivots: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    plan: Plan,
    emulate_bf16: bool,
) -> None:
    """Run the two products; in the pivoted layout both write their outputs in place."""
    first, second = plan.tiles
    t = x.new_empty(x.shape[0], down.shape[0])
    if pivots is None:
        product(x, down, t, None, None, None, first, emulate_bf16)
    else:
        product(x, down, t, y, bias, pivots, first, emulate_bf16)
    if up.shape[0]:
        product(t, up, y, None, bias, pivots, second, emulate_bf16)


def product(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    placed: Tensor | None,
    bias: Tensor | None,
    pivots: Tensor | None,
    tile: Tiles,
    emulate_bf16: bool = False,
) -> None:
    """Run one product, y = x wᵀ [M, N]; see the kernel for placed, bias and pivots."""
    m, k, n = x.shape[0], x.shape[1], w.shape[0]
    chunk = triton.cdiv(triton.cdiv(k, tile.split), tile.block_k) * tile.block_k
    split = triton.cdiv(k, chunk)
    programs = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    scratch, counters = _shared(split, m, n, programs, y) if split > 1 else (y, y)
    unit = _unit(k, x.stride(0), w.stride(0))
    place = KEEP if pivots is None else OTHERS
    launch(
        product_kernel, (programs, split),
        x, w, y, y if placed is None else placed, y if bias is None else bias,
        y if pivots is None else pivots, scratch, counters,
        m, n, k // unit, 0 if pivots is None else pivots.shape[0], chunk,
        x.stride(0) // unit, w.stride(0) // unit, w.stride(1), y.stride(0),
        y.stride(0) if placed is None else placed.stride(0),
        PLACE=place.value if placed is None else PIVOTS.value, HAS_BIAS=bias is not None,
        SPLIT=split, STEPS=0 if pivots is None else pivots.shape[0].bit_length(),
        EMULATE_BF16=emulate_bf16, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, GROUP=8, UNIT=unit, **options(tile.warps, tile.stages),
    )  # fmt: skip


def _one_launch(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    pivots: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    plan: Plan,
    emulate_bf16: bool,
) -> None:
    """Run rank_split or on_chip."""
    (tile,), (m, k), r, n = plan.tiles, x.shape, down.shape[0], up.shape[0]
    unit = _unit(k, x.stride(0), down.stride(0), up.stride(0))
    optional = (y if bias is None else bias, y if pivots is None else pivots)
    sizes = (
        m, n, k // unit, r, x.stride(0) // unit, down.stride(0) // unit, down.stride(1),
        up.stride(0) // unit, up.stride(1), y.stride(0),
    )  # fmt: skip
    constants = {
        "PIVOTED": pivots is not None, "HAS_BIAS": bias is not None, "STEPS": r.bit_length(),
        "EMULATE_BF16": emulate_bf16, "BLOCK_M": tile.block_m, "BLOCK_R": plan.rank_block,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "UNIT": unit,
        **options(tile.warps, tile.stages),
    }  # fmt: skip
    if plan.kind == "on_chip":
        grid = (triton.cdiv(m, tile.block_m),)
        launch(on_chip, grid, x, down, up, y, *optional, *sizes, **constants)
        return
    slices = triton.cdiv(r, plan.rank_block)
    scratch, counters = _shared(slices, m, n, triton.cdiv(n, tile.block_n), y)
    launch(
        rank_split, (slices,), x, down, up, y, *optional, scratch, counters, *sizes,
        **constants,
    )  # fmt: skip


def options(warps: int, stages: int) -> dict[str, Any]:
    """Return the options of a launch. Triton 3.10 no longer fuses multiply-adds unless asked to."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _unit(*sizes: int) -> int:
    return 8 if all(size % 8 == 0 for size in sizes) else 1


def _shared(parts: int, m: int, n: int, tickets: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate partial sums, and tickets at zero: kept ones would outlive a CUDA graph's pool."""
    scratch = torch.empty(parts * m * n, dtype=torch.float32, device=like.device)
    return scratch, torch.zeros(tickets, dtype=torch.int32, device=like.device)
