"""Ahead-of-time compilation, in processes of its own: here kernels run in the interpreter."""

import json
import os
import subprocess
import sys

import pytest


def aot(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "calr_kernels.tools.aot", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "report.json"
    done = aot("--set", "small", "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 with faults" in done.stdout
    return json.loads(path.read_text())


def test_every_kernel_compiles_cleanly_for_every_gpu(rows):
    launches = [launch for row in rows for launch in row["launches"]]
    assert {launch["kernel"] for launch in launches} >= {"product", "rank_split", "on_chip", "gram"}
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert not any(launch["faults"] or launch["spilled"] for launch in launches)


def test_matrix_units_and_wide_loads_are_used(rows):
    unit = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for row in rows:
        for launch in row["launches"]:
            assert launch["wide_loads"] > 0, row
            if row["dtype"] == "bfloat16" and launch["tiles"].get("BLOCK_M", 64) >= 64:
                assert launch["matrix"].get(unit[row["arch"]]), row


def test_plans_move_little_more_than_the_least_and_are_not_faster_than_possible(rows):
    for row in rows:
        if row["op"] == "layer":
            assert row["modelled_seconds"] > row["roofline_seconds"]
            assert 1 <= row["bytes"] / row["least_bytes"] < 1.5


def test_an_unknown_gpu_is_named():
    done = aot("--arch", "sm_42")
    assert done.returncode == 2
    assert "--arch sm_42: unknown; choose from sm_80" in done.stderr
