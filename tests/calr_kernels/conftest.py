"""The instruction sets of the native kernel."""

import pytest

from calr_kernels.native import ISAS, library


@pytest.fixture(params=ISAS)
def isa(request, device):
    """Run with one instruction set of the native kernel."""
    if device.type != "cpu":
        if request.param == ISAS[0]:
            yield
            return
        pytest.skip("one run is enough on a GPU")
    loaded = library()
    assert loaded is not None, "the native kernel was not built"
    best = loaded.calr_isa()
    if loaded.calr_select_isa(ISAS.index(request.param)) != 0:
        pytest.skip(f"this machine has no {request.param}")
    yield
    assert loaded.calr_select_isa(best) == 0
