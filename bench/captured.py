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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chains import FORMS, KEEPS, MODELS, lowrank, quantized
from decode import random_records
from texts import write_json
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from calr.benchmark import bench
from calr_kernels import Form, QuantizedEmbedding

OUTPUT = Path("bench/results/captured.json")
CHOSEN = ("8 bits, rank 16", "5 bits, rank 16", "4 bits, rank 16", "4 bits")
HEADS = {"8B": 128, "1B": 64}  # numbers of a head
VOCABULARY = 128_256


def dense(shape: str, blocks: int, device: str) -> LlamaForCausalLM:
    """Make a model of random weights."""
    (((q, kv, _), width), _, ((inner, _), _), _) = MODELS[shape]
    head = HEADS[shape]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=q // head,
        num_key_value_heads=kv // head,
        head_dim=head,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        dtype="bfloat16",
        pad_token_id=0,
    )
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.cache_implementation = "static"
    return model


def with_layers(
    model: LlamaForCausalLM, make: Callable[[int, int], nn.Module], every: bool
) -> LlamaForCausalLM:
    """Make each linear layer of the blocks anew, of its rows and columns; every: lm_head, too."""
    inside = model if every else model.model.layers
    for name, layer in list(inside.named_modules()):
        if type(layer) is nn.Linear:
            inside.set_submodule(name, make(*layer.weight.shape))
    return model


def embedding(model: LlamaForCausalLM, form: Form) -> None:
    """Make the embedding a quantised one."""
    old = model.model.embed_tokens
    rows, columns = old.weight.shape
    new = QuantizedEmbedding(rows, columns, form, device=old.weight.device, dtype=old.weight.dtype)
    new.weight.copy_(random_records(rows, columns, form))
    model.model.embed_tokens = new


def sides(shape: str, blocks: int, device: str) -> dict[str, Any]:
    """Make the models."""
    found = {"dense": dense(shape, blocks, device)}
    for keep in KEEPS:
        make = partial(lowrank, keep=keep, layout="pivoted", device=device)
        found[f"keep {keep}"] = with_layers(dense(shape, blocks, device), make, every=False)
    for name in CHOSEN:
        make = partial(quantized, form=FORMS[name], device=device)
        found[name] = with_layers(dense(shape, blocks, device), make, every=True)
        embedding(found[name], Form(FORMS[name].bits, FORMS[name].levels, 64))
    return found


@torch.no_grad()
def main() -> None:
    """Time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=MODELS, default="8B")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    torch.manual_seed(0)
    made = sides(given.shape, given.blocks, given.device)
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
