"""Fixtures and the --device option."""

import os
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

if not torch.cuda.is_available():  # before any kernel is defined
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
