"""What compressing large models takes, on one GPU, modelled: memory, disk, time by phase.

    python bench/planning.py

Modelled, none of it measured: memory by what each phase holds (`calr.estimates`; beside runs on a
CPU in docs/large-models.md), time by operations over the speed that an H200 reached in second
moments and in training (docs/gpu.md), a small part of what its products can do. How fast a GPU
rounds is not known at all. The models are built without weights, from their published shapes.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from rich import print
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from calr import Recipe
from calr.estimates import Ways, Work
from calr.integrations.experts import take_apart
from calr.model import analyse

SPEED = 12e12  # operations per second: second moments reached 19e12, the training 7e12
GPUS = {"24 GB": 24e9, "80 GB": 80e9, "141 GB": 141e9}
MODELS = {  # kind, hidden, inner, blocks, heads, key-value heads, head, vocabulary
    "8B": ("llama", 4096, 14336, 32, 32, 8, 128, 128_256),
    "30B-A3B": ("qwen3_moe", 2048, 6144, 48, 32, 4, 128, 151_936),
    "32B": ("qwen3", 5120, 25600, 64, 64, 8, 128, 151_936),
    "70B": ("llama", 8192, 28672, 80, 64, 8, 128, 128_256),
    "405B": ("llama", 16384, 53248, 126, 128, 8, 128, 128_256),
}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FIELDS += ("num_key_value_heads", "head_dim", "vocab_size")


def work(name: str, correction_tokens: int) -> Work:
    """Describe the work at the default 5 bits, with text that is given."""
    kind, *shapes = MODELS[name]
    more = EXPERTS if kind == "qwen3_moe" else {}
    config = AutoConfig.for_model(kind, **dict(zip(FIELDS, shapes, strict=True)), **more)
    config.tie_word_embeddings = False
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        take_apart(model)
    recipe = Recipe(bits=5, correction_tokens=correction_tokens)
    made = Work.of(model, analyse(model), recipe, torch.bfloat16, sampled=False)
    return replace(made, speed=lambda dtype: SPEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--correction_tokens", type=int, default=65_536)
    default = Path(__file__).parent / "results/planning.json"
    parser.add_argument("--output", type=Path, default=default)
    given = parser.parse_args()
    table, rows = Table("model", "largest phases", "disk", "time", *GPUS, title="modelled"), {}
    for name in MODELS:
        made = work(name, given.correction_tokens)
        phases = made.phases(Ways(checkpointed=True))
        largest = sorted(phases.items(), key=lambda item: -item[1].peak_bytes)
        result = int(5 / 8 * made.structure.model_parameters)
        seconds = sum(phase.seconds for phase in phases.values())
        fits = {}
        for gpu, room in GPUS.items():
            beyond = [phase for phase, taken in largest if taken.peak_bytes > room]
            fits[gpu] = f"not {', '.join(beyond)}" if beyond else "fits"
        shown = [f"{phase} {taken.peak_bytes / 1e9:.0f} GB" for phase, taken in largest[:3]]
        hours = f"{seconds / 3600:.1f} h"
        table.add_row(
            name, ", ".join(shown), f"{made.disk(result) / 1e9:.0f} GB", hours, *fits.values()
        )
        rows[name] = {
            "phases": {
                phase: {"seconds": round(taken.seconds), "peak_bytes": taken.peak_bytes}
                for phase, taken in phases.items()
            },
            "disk_bytes": made.disk(result),
            "fits": fits,
        }
    given.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(table)


if __name__ == "__main__":
    main()
