"""The chooser: plain Python, the same on every machine."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calr_kernels.gpu import plans
from calr_kernels.gpu.plans import ARCHS, Tiles
from calr_kernels.tools import tune

SIZES = st.integers(8, 16384)


@given(
    m=st.integers(1, 20000), rows=SIZES, k=SIZES, share=st.floats(0.01, 1.0),
    itemsize=st.sampled_from([2, 4]), arch=st.sampled_from(sorted(ARCHS)), pivoted=st.booleans(),
)  # fmt: skip
def test_every_plan_fits_the_machine_and_obeys_the_roofline(
    m, rows, k, share, itemsize, arch, pivoted
):
    model, r = ARCHS[arch], max(1, round(share * min(rows, k)))
    plan = plans.plan(plans.bucket(m), rows, k, r, itemsize, model, pivoted)
    if m <= plans.bucket(m):  # larger batches are planned for as the largest bucket
        assert plan.seconds >= plans.roofline_seconds(m, rows, k, r, itemsize, model, pivoted)
    if plan.kind == "products":
        for tile in plan.tiles:
            sides = tile.block_m + tile.block_n
            assert tile.stages * sides * tile.block_k * itemsize <= model.shared
    if m <= 64:
        assert plan.kind in ("products", "rank_split")
    if plan.kind == "rank_split":
        assert m <= plans.MOST_ROWS_SPLIT


@pytest.mark.parametrize(
    ("arch", "n", "k", "itemsize", "spilled"),
    [
        ("sm_90", 2456, 12288, 2, (64, 128)),
        ("sm_100", 1304, 8192, 2, (64, 128)),
        ("sm_90", 1024, 4096, 4, (64, 32)),
    ],
)
def test_tiles_that_spilled_when_compiled_are_not_chosen(arch, n, k, itemsize, spilled):
    chosen, _ = plans.product_tiles(64, n, k, itemsize, ARCHS[arch])
    assert chosen.split == 1 or (chosen.block_m, chosen.block_n) != spilled


def test_a_matrix_that_is_all_pivots_costs_one_product():
    for arch in ARCHS.values():
        plan = plans.plan(1, 0, 64, 32, 2, arch, True)
        assert plan.seconds > 0


@given(m=st.integers(1, 4096), rows=SIZES, k=SIZES, itemsize=st.sampled_from([2, 4]))
def test_programs_on_amd_share_no_output_tile(m, rows, k, itemsize):
    plan = plans.plan(plans.bucket(m), rows, k, min(rows, k), itemsize, ARCHS["gfx942"], False)
    assert plan.kind != "rank_split"
    assert all(tile.split == 1 for tile in plan.tiles)


@given(m=st.integers(1, 16384))
def test_buckets_hold_their_rows(m):
    assert m <= plans.bucket(m)
    assert plans.bucket(plans.bucket(m)) == plans.bucket(m)


def test_a_measured_table_overrides_the_model(tmp_path, monkeypatch):
    table = tmp_path / "tuned.json"
    measured = {"block_m": 16, "block_n": 32, "block_k": 64, "split": 2, "warps": 2, "stages": 5}
    table.write_text(json.dumps({"sm_90 16 576 1536 2": measured}))
    monkeypatch.setenv(plans.TUNED, str(table))
    plans.tuned.cache_clear()
    plans.product_tiles.cache_clear()
    try:
        assert plans.product_tiles(16, 576, 1536, 2, ARCHS["sm_90"])[0] == Tiles(**measured)
        assert plans.product_tiles(16, 576, 1536, 2, ARCHS["sm_80"])[0] != Tiles(**measured)
        table.write_text("[1]")
        plans.tuned.cache_clear()
        with pytest.raises(ValueError, match=r"tuned\.json: not a table"):
            plans.tuned()
    finally:
        monkeypatch.undo()
        plans.tuned.cache_clear()
        plans.product_tiles.cache_clear()


def test_tuning_writes_a_table_that_the_chooser_reads(tmp_path, monkeypatch, device):
    """The clock prefers the last that it is shown, which is not the model's choice."""
    calls = []

    def seconds(run):
        run()
        calls.append(run)
        return 1.0 / len(calls)

    table = tune.tune([(4, 40, 96)], device, torch.float32, seconds)
    assert len(calls) == tune.TRIED
    arch = plans.ARCHS[next(iter(table)).split()[0]]
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(table))
    monkeypatch.setenv(plans.TUNED, str(path))
    plans.tuned.cache_clear()
    plans.product_tiles.cache_clear()
    try:
        chosen = plans.product_tiles(4, 40, 96, 4, arch)[0]
        assert chosen == Tiles(**next(iter(table.values())))
    finally:
        monkeypatch.undo()
        plans.tuned.cache_clear()
        plans.product_tiles.cache_clear()
    assert plans.product_tiles(4, 40, 96, 4, arch)[0] != chosen
