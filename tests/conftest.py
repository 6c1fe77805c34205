"""Fixtures and the --device option."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers.utils import logging

if not re.search(r"--device[ =]cuda", " ".join(sys.argv)):  # before any kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"

from calr.testing import byte_tokenizer, tiny_llama

logging.disable_progress_bar()
torch.set_num_threads(1)  # for tiny models a second thread only waits: six times as long if it must


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device to run the tests on: cpu, cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny dense model and its tokenizer."""
    directory = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Calibration windows for the tiny model, [8, 32]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 258, (8, 32), generator=generator)


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., None]:
    """Write a tiny model and the byte tokenizer in Q8_0, in one GGUF file, as llama.cpp would."""

    def write(
        path: Path, model: Any, architecture: gguf.MODEL_ARCH, norms: int = 0, per_part: int = 0
    ) -> None:
        """norms: what the file adds to the norms' weights. per_part: tensors in a part, 0: all."""
        tokenizer, config = byte_tokenizer(), model.config
        name = gguf.MODEL_ARCH_NAMES[architecture]
        writer = gguf.GGUFWriter(path, name, split_max_tensors=per_part)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        tokens = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*(token for token, _ in tokens), "ab", "abc"])
        writer.add_token_merges(["a b", "ab c"])  # two: older transformers take one alone for text
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        for name, tensor in model.state_dict().items():
            stem, _, kind = name.rpartition(".")
            data = (tensor + norms if "norm" in stem else tensor).numpy()
            called = f"{names.get_name(stem)}.{kind}"
            if data.ndim == 2 and data.shape[1] % 32 == 0:
                q8 = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(called, gguf.quants.quantize(data, q8), raw_dtype=q8)
            else:
                writer.add_tensor(called, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, write_gguf: Callable[..., None]) -> Path:
    """A tiny Llama and its tokenizer in Q8_0, in one GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_llama(vocab_size=260), gguf.MODEL_ARCH.LLAMA)
    return path
