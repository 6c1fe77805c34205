"""Memory and time of compressing models larger than one would load: synthetic Llamas, in parts.

    python bench/large.py --blocks 7 14 28 --work /tmp/large
    python bench/large.py --blocks 8 --gguf Q8_0 --parts 2 --work /tmp/large
    python bench/large.py --blocks 3 --experts 128 --work /tmp/large

Writes a Llama of Llama-3.2-3B's shapes (vocabulary of 128,256, tied; 28 blocks: 3.2 billion
parameters, 6.4 GB in bfloat16), or a mixture of Qwen3-30B-A3B's (3 blocks of 128 experts: 2.1
billion), with random weights, one block in memory at a time; compresses it in a process of its own,
whose peak of resident memory the system counts; prints a table and writes JSON. Random weights cost
what real ones cost; the quality of the result says nothing.
"""

import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from rich import print
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from calr.testing import byte_tokenizer

VOCABULARY = 128_256


@dataclass(frozen=True)
class Shape:
    """A model's shapes: Llama-3.2-3B's, or with experts those of Qwen3-30B-A3B."""

    blocks: int
    experts: int

    @property
    def width(self) -> int:
        """Hidden size."""
        return 2048 if self.experts else 3072

    @property
    def inner(self) -> int:
        """Intermediate size, of each expert."""
        return 768 if self.experts else 8192

    @property
    def heads(self) -> tuple[int, int, int]:
        """Heads of queries, of keys and values, and their size."""
        return (32, 4, 128) if self.experts else (24, 8, 128)

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Out_features and in_features of a block's matrices, by their names on the disk."""
        queries, keys, size = self.heads
        found = {
            "self_attn.q_proj": (queries * size, self.width),
            "self_attn.k_proj": (keys * size, self.width),
            "self_attn.v_proj": (keys * size, self.width),
            "self_attn.o_proj": (self.width, queries * size),
        }
        if self.experts:
            found["mlp.gate"] = (self.experts, self.width)
        each = [f"experts.{i}." for i in range(self.experts)] or [""]
        for expert in each:
            for name in ("gate_proj", "up_proj"):
                found[f"mlp.{expert}{name}"] = (self.inner, self.width)
            found[f"mlp.{expert}down_proj"] = (self.width, self.inner)
        return found

    @property
    def norms(self) -> dict[str, int]:
        """Sizes of a block's norms."""
        found = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), self.width)
        if self.experts:
            found |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), self.heads[2])
        return found

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration; positions end early, so that the tokenizer may be small."""
        queries, keys, size = self.heads
        known: dict[str, Any] = {
            "hidden_size": self.width,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": queries,
            "num_key_value_heads": keys,
            "head_dim": size,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        }
        if not self.experts:
            named = {"intermediate_size": self.inner, "architectures": ["LlamaForCausalLM"]}
            return LlamaConfig(**known, **named)
        return Qwen3MoeConfig(
            **known,
            moe_intermediate_size=self.inner,
            num_experts=self.experts,
            num_experts_per_tok=min(8, self.experts),
            norm_topk_prob=True,
            architectures=["Qwen3MoeForCausalLM"],
        )

    def tensors(self, part: int) -> dict[str, torch.Tensor]:
        """Draw block `part` - 1, or, as part 0, what is around the blocks."""
        draw = torch.Generator().manual_seed(part)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.bfloat16).mul_(0.02)

        if part == 0:
            return {
                "model.embed_tokens.weight": normal(VOCABULARY, self.width),
                "model.norm.weight": torch.ones(self.width, dtype=torch.bfloat16),
            }
        name = f"model.layers.{part - 1}"
        found = {f"{name}.{layer}.weight": normal(*shape) for layer, shape in self.layers.items()}
        for norm, size in self.norms.items():
            found[f"{name}.{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
        return found


COMPRESS = (
    "--bits 5 --calibration builtin --samples 16 --gradient_samples 4 --window 256 --eval_windows 0"
)


def write_safetensors(directory: Path, shape: Shape) -> None:
    """Write the model, a file for each block."""
    directory.mkdir(parents=True)
    files, total, parts = {}, 0, shape.blocks + 1
    for part in range(parts):
        file, made = f"model-{part + 1:05d}-of-{parts:05d}.safetensors", shape.tensors(part)
        save_file(made, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(made, file)
        total += sum(tensor.nbytes for tensor in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    byte_tokenizer().save_pretrained(directory)
    shape.config.save_pretrained(directory)  # last: it is a model now


def write_gguf(directory: Path, shape: Shape, kind: str, parts: int) -> None:
    """Write the model in GGUF files of a quantised type; tokens beyond the bytes are fillers."""
    directory.mkdir(parents=True)
    described, blocks = shape.config, shape.blocks
    per_part = 0 if parts == 1 else -(-(9 * blocks + 2) // parts)
    place = directory / f"{kind}.gguf"
    writer = gguf.GGUFWriter(place, "llama", split_max_tensors=per_part)
    writer.add_context_length(described.max_position_embeddings)
    writer.add_embedding_length(described.hidden_size)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(described.intermediate_size)
    writer.add_head_count(described.num_attention_heads)
    writer.add_head_count_kv(described.num_key_value_heads)
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
        for name, tensor in shape.tensors(part).items():
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
    parser.add_argument("--experts", type=int, default=0, help="of each block; 0: a dense model")
    parser.add_argument("--gguf", help="a type, such as Q8_0, of the source; else safetensors")
    parser.add_argument("--parts", type=int, default=1, help="files of a GGUF model")
    parser.add_argument("--correction_tokens", default="0")
    parser.add_argument("--work", type=Path, required=True, help="where models are written, kept")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/large.json")
    given = parser.parse_args()
    if given.gguf and given.experts:
        sys.exit("--gguf: writes dense models alone; leave --experts out")
    known = json.loads(given.output.read_text()) if given.output.exists() else {}
    for blocks in given.blocks:
        kind = given.gguf or "bfloat16"
        kind += f" in {given.parts} parts" if given.parts > 1 else ""
        shape = Shape(blocks, given.experts)
        kind = f"{given.experts} experts, {kind}" if given.experts else kind
        name = f"{blocks} blocks, {kind}, {given.correction_tokens} tokens of correction"
        model = given.work / f"{blocks}-{kind}".replace(",", "").replace(" ", "-")
        if not model.exists():
            if given.gguf:
                write_gguf(model, shape, given.gguf, given.parts)
            else:
                write_safetensors(model, shape)
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
