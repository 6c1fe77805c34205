"""What rounding to each form costs: squared output errors, step by step and width by width.

    python bench/rounding.py

A random Gaussian matrix under correlated inputs of very different sizes. Prints the error of each
form relative to the outputs' energy, rounded to nearest, with GPTQ, and with the scales fitted
again, and what the last is over that of 4 bits: the ratios by which `calr.ranks` prices widths.
"""

import torch

from calr.ranks.bits import BEST_LEVELS, PRICED, RATIOS
from calr.rounding import Rounded, gptq, round_matrix
from calr.rounding.scales import search
from calr_kernels import Form

N, K, TOKENS = 1536, 576, 4000


def main() -> None:
    """Round one matrix in every way and print the errors."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=draw) * 0.05
    x = torch.randn(TOKENS, K, generator=draw) @ torch.randn(K, K, generator=draw)
    x = x * torch.rand(K, generator=draw) * 3
    moment = x.mT @ x / TOKENS

    def error(rounded: Rounded) -> float:
        lost = weight - rounded.weight()
        return float(((lost @ moment) * lost).sum() / ((weight @ moment) * weight).sum())

    forms = [Form(bits, levels, 64) for bits, levels in sorted(RATIOS)]
    priced = error(round_matrix(weight, Form(PRICED, BEST_LEVELS[PRICED], 64), moment))
    print("| form | to nearest | GPTQ | fitted again | over 4 bits |")
    print("|---|---|---|---|---|")
    for form in forms:
        scales = search(weight, moment.diagonal(), form)
        chosen = Rounded.of(form, gptq.choose(weight, scales, gptq.ordered(moment), form), scales)
        nearest, fitted = round_matrix(weight, form), round_matrix(weight, form, moment)
        figures = " | ".join(f"{error(r):.2e}" for r in (nearest, chosen, fitted))
        name = f"{form.bits} bits, {form.levels}"
        print(f"| {name} | {figures} | {error(fitted) / priced:.4f} |")


if __name__ == "__main__":
    main()
