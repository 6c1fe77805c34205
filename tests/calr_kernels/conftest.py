"""The instruction sets of the native kernel."""

import pytest

from calr_kernels import cpu


@pytest.fixture(params=cpu.ISAS)
def isa(request, device):
    """Run with one instruction set of the native kernel."""
    if device.type != "cpu":
        if request.param == cpu.ISAS[0]:
            yield
            return
        pytest.skip("one run is enough on a GPU")
    library = cpu.library()
    assert library is not None, "the native kernel was not built"
    best = library.calr_isa()
    if library.calr_select_isa(cpu.ISAS.index(request.param)) != 0:
        pytest.skip(f"this machine has no {request.param}")
    yield
    assert library.calr_select_isa(best) == 0
