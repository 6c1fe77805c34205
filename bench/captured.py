"""A decoder on a GPU, whole: prefill, and decoding through `generate` by a captured step.

    python bench/captured.py [--shape 8B] [--blocks 8] [--prompt 2048] [--new_tokens 128]

Models of Llama's class and of Llama-3-8B's or Llama-3.2-1B's shapes with as many blocks as asked,
random weights in bfloat16: dense, pivoted at keep 0.5 and 0.8, quantised with corrective paths of
rank 16 in 8 bits. Embeddings and lm_head of quantised ones are quantised, too. Each has a static
cache, so that on a GPU transformers compiles and captures the step of one token; they take turns in
one process. Prints medians in tokens per second, and over dense; writes captured.json in
bench/results.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from chains import FORMS, KEEPS
from decode import at_keep, in_form
from shapes import SHAPES, Shape
from texts import write_json
from transformers import AutoModelForCausalLM

from calr.benchmark import bench

OUTPUT = Path("bench/results/captured.json")
MADE = {"8B": SHAPES["8B"], "1B": Shape("llama", 2048, 8192, 16, 32, 8, 64, 128_256, tied=True)}
CHOSEN = ("8 bits, rank 16", "5 bits, rank 16", "4 bits, rank 16", "4 bits")


def dense(shape: Shape, device: str) -> Any:
    """Make a model of random weights."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config, dtype=torch.bfloat16).eval()
    model.generation_config.cache_implementation = "static"
    return model


def sides(shape: Shape, device: str) -> dict[str, Any]:
    """Make the models."""
    found = {"dense": dense(shape, device)}
    for keep in KEEPS:
        found[f"keep {keep}"] = dense(shape, device)
        at_keep(found[f"keep {keep}"], keep)
    for name in CHOSEN:
        found[name] = dense(shape, device)
        in_form(found[name], FORMS[name])
    return found


@torch.no_grad()
def main() -> None:
    """Time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=MADE, default="8B")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    torch.manual_seed(0)
    made = sides(MADE[given.shape].of_blocks(given.blocks), given.device)
    sizes = {"prompt": given.prompt, "new_tokens": given.new_tokens, "rounds": given.rounds}
    rows = bench(made, **sizes)
    print("| | GB | decode, tokens/s | over dense | prefill, tokens/s | over dense |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        speeds = [f"{row['weight_bytes'] / 1e9:.2f}"]
        for kind in ("decode", "prefill"):
            of, base = (r[f"{kind}_tokens_per_second"]["median"] for r in (row, rows[0]))
            speeds += [f"{of:.1f}", f"{of / base:.2f}"]
        print(f"| {row['model']} | {' | '.join(speeds)} |")
    write_json(
        given.output, {"shape": given.shape, "blocks": given.blocks} | sizes | {"rows": rows}
    )


if __name__ == "__main__":
    main()
