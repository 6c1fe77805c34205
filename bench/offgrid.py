"""The same model with its weights on no grid: a source that was quantised flatters its own grid.

    python bench/offgrid.py SOURCE.gguf OUT.gguf

Writes a GGUF file in F32 that gives the same logits within rounding. Each norm's weight goes into
the linear layers behind it, lm_head is untied, the rows of v and up are multiplied by random
factors between 0.7 and 1.3 and the columns of o and down divided by them (in every query head that
reads the key-value head). Norms behind a layer that writes to the residual (Gemma's), and those of
q and k, stay as they are. `bench/frontier.py --model OUT.gguf` measures it and llama.cpp's rungs
made from it.
"""

import argparse
from pathlib import Path

import gguf
import numpy as np

from calr.export.gguf import copy_fields, finish

FOLDED = {  # a norm, and the tensors that read what it gives
    "attn_norm": ("attn_q", "attn_k", "attn_v"),
    "ffn_norm": ("ffn_gate", "ffn_up"),
}
LEAST, MOST = 0.7, 1.3  # of the random factors

Tensors = dict[str, np.ndarray]


def main() -> None:
    """Read the arguments and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    off_grid(arguments.source, arguments.output, arguments.seed)


def off_grid(source: Path, output: Path, seed: int = 0) -> None:
    """Write the equivalent of a GGUF file's model; seed: of the factors."""
    reader, draw = gguf.GGUFReader(source), np.random.default_rng(seed)
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    architecture = reader.fields["general.architecture"].contents()
    heads, groups = (
        int(reader.fields[f"{architecture}.attention.{name}"].contents())
        for name in ("head_count", "head_count_kv")
    )
    for block in sorted({name.split(".")[1] for name in tensors if name.startswith("blk.")}):
        moved(tensors, f"blk.{block}", heads // groups, groups, draw)
    output_matrix = tensors.get("output.weight", tensors["token_embd.weight"])
    tensors["output.weight"] = output_matrix * tensors["output_norm.weight"]
    tensors["output_norm.weight"] = np.ones_like(tensors["output_norm.weight"])
    writer = gguf.GGUFWriter(output, architecture)
    copy_fields(writer, reader)
    writer.add_file_type(0)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    finish(writer)


def moved(
    tensors: Tensors, block: str, repeats: int, groups: int, draw: np.random.Generator
) -> None:
    """Fold a block's norms and move random factors through its values and its hidden units.

    repeats: query heads of each of the key-value heads, of which there are groups.
    """
    for norm, readers in FOLDED.items():
        weight = tensors[f"{block}.{norm}.weight"]
        for name in readers:
            tensors[f"{block}.{name}.weight"] = tensors[f"{block}.{name}.weight"] * weight
        tensors[f"{block}.{norm}.weight"] = np.ones_like(weight)
    values = draw.uniform(LEAST, MOST, len(tensors[f"{block}.attn_v.weight"]))
    units = draw.uniform(LEAST, MOST, len(tensors[f"{block}.ffn_up.weight"]))
    read = np.repeat(values.reshape(groups, 1, -1), repeats, 1).reshape(-1)
    for writer, reader, given, taken in (
        ("attn_v", "attn_output", values, read),
        ("ffn_up", "ffn_down", units, units),
    ):
        for kind in ("weight", "bias"):
            name = f"{block}.{writer}.{kind}"
            if name in tensors:
                tensors[name] = (tensors[name].T * given).T
        tensors[f"{block}.{reader}.weight"] = tensors[f"{block}.{reader}.weight"] / taken


if __name__ == "__main__":
    main()
