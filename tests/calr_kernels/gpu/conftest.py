"""What the tests of the Triton kernels share."""

import pytest
import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture
def draw(device):
    """Draw a tensor of values of order 1, the same every time."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return drawn


@pytest.fixture
def close():
    """Compare with a float64 result: each to a share of the largest."""

    def compare(y: Tensor, wanted: Tensor, tolerance: float | None = None) -> None:
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        atol = scale * (TOLERANCE[y.dtype] if tolerance is None else tolerance)
        torch.testing.assert_close(y.double(), wanted, rtol=0, atol=atol)

    return compare
