"""Second moments against float64: in the interpreter, or on a GPU (--device cuda)."""

import pytest
import torch

from calr_kernels.gpu.gram import run_gram


@pytest.mark.parametrize("m", [1, 3, 40, 65])
@pytest.mark.parametrize("k", [1, 37, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_gram(m, k, dtype, draw, close):
    x = draw(m, k, dtype=dtype)
    wanted = x.double().T @ x.double()
    found = run_gram(x)
    assert found.dtype == torch.float32
    close(found, wanted)
    assert torch.equal(found, found.T)
    total = run_gram(x, found.clone())
    close(total, 2 * wanted)


def test_gram_takes_strided_rows(draw, close):
    x = draw(20, 24)
    close(run_gram(x[:, :10]), x[:, :10].double().T @ x[:, :10].double())
