"""The native kernel under the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")
SOURCES = [TESTS / "sanitize.cpp", *TESTS.parents[1].glob("calr_kernels/csrc/*.cpp")]


def run(folder, compiler, flags, before=()):
    """Compile the program and all of the kernel, and let it compare."""
    program, together = folder / "sanitize", folder / "together.cpp"
    together.write_text("".join(f'#include "{source}"\n' for source in SOURCES))  # 3 times as fast
    own = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    subprocess.run([compiler, *own, *flags, together, "-o", program], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run([*before, program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_access_outside_a_buffer(tmp_path):
    sanitizers = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    run(tmp_path, "g++", ["-O1", "-g", *sanitizers])


@pytest.mark.skipif(not all(map(shutil.which, ARM)), reason=f"needs {' and '.join(ARM)}")
def test_the_same_on_arm(tmp_path):
    run(tmp_path, ARM[0], ["-O3", "-static"], [ARM[1]])
