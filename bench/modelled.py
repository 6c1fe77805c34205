"""How long a block's linear layers should take for one row on an H200: modelled, not measured.

    python bench/modelled.py

Needs no GPU: the launches that the layers of bench/chains.py make are recorded and compiled ahead
of time. A launch is taken to last 1.1 µs and the longer of two: reading its bytes at 1 / 1.2 of the
rate of a copy; its main loop's instructions, counted in the compiled code, at one a lane and cycle.
The 1.1 and the 1.2 fit, to within -4 and +13 %, what eight chains of short kernels took on an H200
on 27 November 2026: two matrix-vector products of pivoted layers at keep 0.5 and 0.8, 75.5 and
118.0 µs in the 8B shape, 32.4 and 42.2 in the 1B; 8 bits with 8-bit activations, without and with a
corrective path of rank 16, 63.6, 73.7, 25.4 and 32.3. The base is the grouped dense chain as it was
measured there. bench/chains.py measures the same cells on a GPU.
"""

import torch
from chains import FORMS, KEEPS, MODELS, lowrank, quantized
from torch import nn

from calr_kernels import QuantizedLinear
from calr_kernels.gpu import linears
from calr_kernels.gpu.arch import ARCHS
from calr_kernels.tools.aot import VECTOR, Launch, compile_launch, recording

LAUNCH, SLOWER, RATE = 1.1e-6, 1.2, 4.27e12  # s; reading; bytes/s of a copy on an H200
LANES = 132 * 128 * 1.7e9  # instructions of a lane, a second
GROUPED = {"8B": 120.3e-6, "1B": 51.4e-6}  # s, measured
WARP = 32  # threads


def launches(layer: nn.Module, k: int) -> list[Launch]:
    """Return what a layer on the meta device launches for one row."""
    x = torch.empty(1, k, dtype=torch.bfloat16, device="meta")
    with recording(ARCHS["sm_90"]) as found:
        if isinstance(layer, QuantizedLinear):
            linears.quantized_linear(x, layer.records())
        else:
            factors = layer.factors()
            linears.lowrank_linear(x, factors.down, factors.up, factors.pivots, None)
    return [launch for launch in found if launch.name in VECTOR]  # what a model once made is kept


def instructions(made: Launch, compiled: dict[Launch, int]) -> float:
    """Count the instructions of the main loop for one weight."""
    if made not in compiled:
        compiled[made] = compile_launch(made, ARCHS["sm_90"])["loop"]
    constants = dict(made.constants)
    weights = constants["BLOCK_N"] * (
        constants["BLOCK_K"]
        if made.name == "gemv"
        else constants["STEP"] * constants["WORDS"] * constants["FIELDS"]
    )
    return compiled[made] * WARP * dict(made.options)["num_warps"] / weights


def stored(layer: nn.Module) -> int:
    """Count the bytes of a layer's tensors."""
    return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))


def seconds(layer: nn.Module, n: int, k: int, compiled: dict[Launch, int]) -> float:
    """Model a layer's time for one row."""
    made = launches(layer, k)
    nbytes = stored(layer)
    if isinstance(layer, QuantizedLinear):
        work = n * k * instructions(made[-1], compiled)  # the corrective path's is a hundredth
    else:
        work = nbytes / 2 * max(instructions(launch, compiled) for launch in made)
    return LAUNCH * len(made) + max(SLOWER * nbytes / RATE, work / LANES)


def main() -> None:
    """Print the table."""
    compiled: dict[Launch, int] = {}
    print("| model | one row, modelled | MB a block | µs a block | times grouped dense |")
    print("|---|---|---|---|---|")
    for model, groups in MODELS.items():
        shapes = [(n, k) for ns, k in groups for n in ns]
        kinds = {
            f"keep {keep}, pivoted": [lowrank(n, k, keep, "pivoted", "meta") for n, k in shapes]
            for keep in KEEPS
        } | {
            name: [quantized(n, k, form, "meta") for n, k in shapes] for name, form in FORMS.items()
        }
        for name, layers in kinds.items():
            total = sum(
                seconds(layer, n, k, compiled) for layer, (n, k) in zip(layers, shapes, strict=True)
            )
            size = sum(map(stored, layers)) / 1e6
            ratio = GROUPED[model] / total
            print(f"| {model} | {name} | {size:.0f} | {1e6 * total:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    with torch.no_grad():
        main()
