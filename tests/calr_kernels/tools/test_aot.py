"""Ahead-of-time compilation, in processes of its own: here kernels run in the interpreter."""

import json
import os
import subprocess
import sys

import pytest

GPUS = {"sm_80", "sm_90", "sm_100", "gfx942"}


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def aot(*arguments):
    return run("-m", "calr_kernels.tools.aot", *arguments)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "report.json"
    done = aot("--set", "small", "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 with faults" in done.stdout
    return json.loads(path.read_text())


def test_every_kernel_compiles_cleanly_for_every_gpu(rows):
    every = {
        "gemv", "interleave", "quantized_gemv", "quantized_product", "finish", "dequantize", "gram",
    }  # fmt: skip
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (k, gpu) for k in every for gpu in GPUS
    }
    assert not any(row["faults"] or row["spilled"] for row in rows)


def test_matrix_units_are_used(rows):
    tall = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for row in rows:
        if row["kernel"] in ("quantized_product", "gram") and row["dtype"] == "bf16":
            units = {tall[row["arch"]], "mma"} if row["kernel"] != "gram" else {tall[row["arch"]]}
            assert units & set(row["matrix"]), row


def test_matrix_vector_products_read_16_bytes_at_a_time(rows):
    vector = [row for row in rows if row["kernel"] in ("gemv", "quantized_gemv")]
    assert vector
    assert all(row["wide_loads"] > 0 for row in vector)


COUNT = """
from calr_kernels.tools import aot
made = [
    launch
    for r in range(1040, 2040, 8)
    for launch in aot.launches_of(aot.Case("pivoted", 1, 4096, 4096, r, "bfloat16", "sm_90"))
]
print(len(made), len(set(made)))
"""


def test_layers_of_any_rank_share_their_kernels():
    """What is compiled depends on types and rows, not on ranks: a model starts in seconds."""
    assert run("-c", COUNT).stdout.split() == ["250", "2"]


def test_an_unknown_gpu_is_named():
    done = aot("--arch", "sm_42")
    assert done.returncode == 2
    assert "--arch sm_42: unknown; choose from sm_80" in done.stderr
