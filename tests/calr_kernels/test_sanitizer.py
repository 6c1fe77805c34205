"""The native kernel under the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCES = [TESTS / "sanitize.cpp", *TESTS.parents[1].glob("calr_kernels/csrc/*.cpp")]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_access_outside_a_buffer(tmp_path):
    program = tmp_path / "sanitize"
    flags = ["-std=c++17", "-O1", "-g", "-fno-math-errno", "-fno-trapping-math"]
    sanitizers = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    together = tmp_path / "together.cpp"  # one file compiles in a third of the time of seven
    together.write_text("".join(f'#include "{source}"\n' for source in SOURCES))
    subprocess.run(["g++", *flags, *sanitizers, together, "-o", program], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
