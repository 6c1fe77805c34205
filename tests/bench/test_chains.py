"""The chains of layers that are timed on a GPU: that each runs, and counts its bytes."""

from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
GROUPS = [((96, 32, 32), 64), ((64,), 96)]


@pytest.mark.parametrize("rows", [1, 20])
def test_every_side_runs_and_quantised_ones_are_smaller(rows, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import chains

    made = chains.sides(GROUPS, rows, "cpu")
    for side in made.values():
        side.run()
    size = {name: side.nbytes for name, side in made.items()}
    assert size["dense"] == size[chains.GROUPED] == 2 * (160 * 64 + 64 * 96)
    assert size["4 bits"] < size["4 bits, rank 16"] < size["8 bits, rank 16"] < size["dense"]
    assert size["keep 0.5, pivoted"] < size["keep 0.8, pivoted"] < size["dense"]
