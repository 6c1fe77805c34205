"""Shapes of large models, and models of them with random weights on the disk.

Random weights cost what real ones cost; the quality of a result says nothing.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import psutil
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from calr import Recipe
from calr.estimates import Ways, Work
from calr.integrations.experts import take_apart
from calr.limits import OF_FREE
from calr.model import analyse
from calr.testing import byte_tokenizer

POSITIONS = 4096  # the tokenizer, of bytes, may be small


@dataclass(frozen=True)
class Shape:
    """A model's shapes. inner: of each expert, where there are any. tied: lm_head, too."""

    kind: str
    width: int
    inner: int
    blocks: int
    heads: int
    key_value_heads: int
    head: int
    vocabulary: int
    experts: int = 0
    tied: bool = False

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Out_features and in_features of a block's matrices, by their names on the disk."""
        found = {
            "self_attn.q_proj": (self.heads * self.head, self.width),
            "self_attn.k_proj": (self.key_value_heads * self.head, self.width),
            "self_attn.v_proj": (self.key_value_heads * self.head, self.width),
            "self_attn.o_proj": (self.width, self.heads * self.head),
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
        if self.kind != "llama":
            found |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), self.head)
        return found

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration in transformers."""
        known: dict[str, Any] = {
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": POSITIONS,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": self.tied,
            "dtype": "bfloat16",
        }
        if self.experts:
            known |= {
                "num_experts": self.experts,
                "num_experts_per_tok": min(8, self.experts),
                "moe_intermediate_size": self.inner,
                "norm_topk_prob": True,
            }
        name = {"llama": "Llama", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}[self.kind]
        return AutoConfig.for_model(self.kind, architectures=[f"{name}ForCausalLM"], **known)

    def tensors(self, part: int) -> dict[str, torch.Tensor]:
        """Draw block `part` - 1, or, as part 0, what is around the blocks."""
        draw = torch.Generator().manual_seed(part)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.bfloat16).mul_(0.02)

        if part == 0:
            around = ["model.embed_tokens"] + ([] if self.tied else ["lm_head"])
            found = {f"{name}.weight": normal(self.vocabulary, self.width) for name in around}
            return found | {"model.norm.weight": torch.ones(self.width, dtype=torch.bfloat16)}
        name = f"model.layers.{part - 1}"
        found = {f"{name}.{layer}.weight": normal(*shape) for layer, shape in self.layers.items()}
        for norm, size in self.norms.items():
            found[f"{name}.{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
        return found

    def of_blocks(self, blocks: int) -> "Shape":
        """Return the shapes of a model of that many blocks."""
        return dataclasses.replace(self, blocks=blocks)


SHAPES = {
    "3B": Shape("llama", 3072, 8192, 28, 24, 8, 128, 128_256, tied=True),  # Llama-3.2-3B
    "8B": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128_256),
    "30B-A3B": Shape("qwen3_moe", 2048, 768, 48, 32, 4, 128, 151_936, experts=128),
    "32B": Shape("qwen3", 5120, 25600, 64, 64, 8, 128, 151_936),
    "70B": Shape("llama", 8192, 28672, 80, 64, 8, 128, 128_256),
    "405B": Shape("llama", 16384, 53248, 126, 128, 8, 128, 128_256),
}


def write_safetensors(directory: Path, shape: Shape) -> None:
    """Write a model, a file for each block."""
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
    """Write a Llama in GGUF files of a quantised type; tokens beyond the bytes are fillers."""
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
    writer.add_vocab_size(shape.vocabulary)
    tokens = sorted(byte_tokenizer().get_vocab().items(), key=lambda entry: entry[1])
    known = [*(token for token, _ in tokens), "ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(known + [f"<{i}>" for i in range(shape.vocabulary - len(known))])
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


def work(shape: Shape, recipe: Recipe, device: str) -> Work:
    """Describe the work on a model of some shapes, with text that is given."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(shape.config, dtype=torch.bfloat16).eval()
        take_apart(model)
    where = torch.device(device)
    return Work.of(model, analyse(model), recipe, torch.bfloat16, sampled=False, device=where)


def largest(device: str, disk: Path, recipe: Recipe) -> tuple[str, Shape]:
    """Return the largest model that memory, a GPU and a disk have room for, by the estimates."""
    found, free = None, shutil.disk_usage(disk).free
    for name, shape in SHAPES.items():
        made = work(shape, recipe, device)
        phases, size = (
            made.phases(Ways(checkpointed=True)).values(),
            made.structure.model_parameters,
        )
        fits = max(p.peak_bytes for p in phases) <= psutil.virtual_memory().total
        fits &= made.free is None or max(p.gpu_bytes for p in phases) <= OF_FREE * made.free
        if fits and 2 * size + made.disk(int(recipe.bits or 5) * size // 8) <= free:
            found = name, shape
    if found is None:
        raise SystemExit(f"{device}: not even {next(iter(SHAPES))} fits, in memory or on the disk")
    return found
