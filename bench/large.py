"""Memory and time of compressing models larger than one would load: synthetic Llamas, in parts.

    python bench/large.py --blocks 7 14 28 --work /tmp/large
    python bench/large.py --blocks 8 --gguf Q8_0 --parts 2 --work /tmp/large

Writes a Llama of Llama-3.2-3B's shapes (vocabulary of 128,256, tied; 28 blocks: 3.2 billion
parameters, 6.4 GB in bfloat16) with random weights, one block in memory at a time; compresses it in
a process of its own, whose peak of resident memory the system counts; prints a table and writes
JSON. Random weights cost what real ones cost; the quality of the result says nothing.
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import torch
from rich import print
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig

from calr.testing import byte_tokenizer

WIDTH, INNER, HEADS, KEY_VALUE_HEADS, HEAD, VOCABULARY = 3072, 8192, 24, 8, 128, 128_256
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD, WIDTH),
    "self_attn.k_proj": (KEY_VALUE_HEADS * HEAD, WIDTH),
    "self_attn.v_proj": (KEY_VALUE_HEADS * HEAD, WIDTH),
    "self_attn.o_proj": (WIDTH, HEADS * HEAD),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
COMPRESS = (
    "--bits 5 --calibration builtin --samples 16 --gradient_samples 4 --window 256 --eval_windows 0"
)


def config(blocks: int) -> LlamaConfig:
    """Describe the model; positions end early, so that its tokenizer may be small."""
    return LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def tensors(part: int) -> dict[str, torch.Tensor]:
    """Draw block `part` - 1, or, as part 0, what is around the blocks."""
    draw = torch.Generator().manual_seed(part)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.bfloat16).mul_(0.02)

    if part == 0:
        return {
            "model.embed_tokens.weight": normal(VOCABULARY, WIDTH),
            "model.norm.weight": torch.ones(WIDTH, dtype=torch.bfloat16),
        }
    name = f"model.layers.{part - 1}"
    found = {f"{name}.{layer}.weight": normal(*shape) for layer, shape in SHAPES.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        found[f"{name}.{norm}.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
    return found


def write_safetensors(directory: Path, blocks: int) -> None:
    """Write the model, a file for each block."""
    directory.mkdir(parents=True)
    files, total = {}, 0
    for part in range(blocks + 1):
        file, made = f"model-{part + 1:05d}-of-{blocks + 1:05d}.safetensors", tensors(part)
        save_file(made, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(made, file)
        total += sum(tensor.nbytes for tensor in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    byte_tokenizer().save_pretrained(directory)
    config(blocks).save_pretrained(directory)  # last: it is a model now


def write_gguf(directory: Path, blocks: int, kind: str, parts: int) -> None:
    """Write the model in GGUF files of a quantised type; tokens beyond the bytes are fillers."""
    directory.mkdir(parents=True)
    per_part = 0 if parts == 1 else -(-(9 * blocks + 2) // parts)
    place, described = directory / f"{kind}.gguf", config(blocks)
    writer = gguf.GGUFWriter(place, "llama", split_max_tensors=per_part)
    writer.add_context_length(described.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(described.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    tokens = sorted(byte_tokenizer().get_vocab().items(), key=lambda entry: entry[1])
    known = [*(token for token, _ in tokens), "ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(known + [f"<{i}>" for i in range(VOCABULARY - len(known))])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
    for part in range(blocks + 1):
        for name, tensor in tensors(part).items():
            stem, _, own = name.rpartition(".")
            data = tensor.float().numpy()
            quantised = gguf.GGMLQuantizationType[kind if data.ndim == 2 else "F32"]
            data = gguf.quants.quantize(data, quantised)
            writer.add_tensor(f"{names.get_name(stem)}.{own}", data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[7, 14, 28])
    parser.add_argument("--gguf", help="a type, such as Q8_0, of the source; else safetensors")
    parser.add_argument("--parts", type=int, default=1, help="files of a GGUF model")
    parser.add_argument("--correction_tokens", default="0")
    parser.add_argument("--work", type=Path, required=True, help="where models are written, kept")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/large.json")
    given = parser.parse_args()
    known = json.loads(given.output.read_text()) if given.output.exists() else {}
    for blocks in given.blocks:
        kind = given.gguf or "bfloat16"
        kind += f" in {given.parts} parts" if given.parts > 1 else ""
        name = f"{blocks} blocks, {kind}, {given.correction_tokens} tokens of correction"
        model = given.work / f"{blocks}-{kind}".replace(" ", "-")
        if not model.exists():
            if given.gguf:
                write_gguf(model, blocks, given.gguf, given.parts)
            else:
                write_safetensors(model, blocks)
        source = sum(file.stat().st_size for file in model.glob("*-of-*.safetensors"))
        source = source or sum(file.stat().st_size for file in model.glob("*.gguf"))
        options = ["--correction_tokens", given.correction_tokens]
        output = Path(f"{model}-{given.correction_tokens}")
        found = compressed(model, output, options, output.with_suffix(".log"))
        known[name] = {"source_bytes": source} | found
        given.output.write_text(json.dumps(known, indent=2) + "\n")
    table = Table("model", "source", "result", "peak memory", "time")
    for name, row in known.items():
        sizes = (f"{row[key] / 1e9:.2f} GB" for key in ("source_bytes", "bytes", "peak_bytes"))
        table.add_row(name, *sizes, f"{row['seconds'] / 60:.1f} min")
    print(table)


if __name__ == "__main__":
    main()
