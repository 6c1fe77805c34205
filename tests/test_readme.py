"""The README's example runs as it stands, on a tiny model instead of a hub id."""

import re
from pathlib import Path

import pytest

from calr_kernels import LowRankLinear

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs(source, tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.S).group(1)
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in code
    monkeypatch.chdir(tmp_path)
    names = {}
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(source))
    assert "keep=0.8" in code
    small = "keep=0.8, samples=4, gradient_samples=2, window=32, correction_tokens=256"
    exec(code.replace("keep=0.8", small), names)
    layers = [m for m in names["model"].modules() if isinstance(m, LowRankLinear)]
    assert layers
    assert (tmp_path / "smaller" / "model.safetensors").exists()


@pytest.mark.parametrize("command", ["plan", "compress", "eval", "bench"])
def test_the_commands_exist(command, capsys):
    from calr.cli import main

    assert f"calr {command} " in README.read_text()
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
