"""Triton kernels against the float64 reference: in the interpreter, or on a GPU (--device cuda)."""

import pytest
import torch
from torch import Tensor

from calr_kernels import reference
from calr_kernels.gpu import launches
from calr_kernels.gpu.plans import Plan, Tiles

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PLANS = {
    "products": Plan("products", (Tiles(16, 16, 32), Tiles(16, 32, 16)), 0.0),
    "split": Plan("products", (Tiles(16, 16, 16, split=3), Tiles(16, 16, 16, split=2)), 0.0),
    "rank_split": Plan("rank_split", (Tiles(16, 16, 32),), 0.0, 16),
    "on_chip": Plan("on_chip", (Tiles(16, 16, 32),), 0.0, 64),
}
SHAPES = [(1, 1, 37, 53), (3, 8, 64, 48), (17, 40, 96, 41), (65, 8, 37, 24), (2, 41, 48, 41)]


def layer(
    m: int, r: int, k: int, n: int, pivoted: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Inputs and factors of a layer, values of order 1: x, down, up, pivots or None, bias."""
    generator = torch.Generator().manual_seed(m + r + k + n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    pivots = None
    if pivoted:
        pivots = torch.randperm(n, generator=generator)[:r].sort()[0].int().to(device)
    rows = n - r if pivoted else n
    return draw(m, k), draw(r, k) / k**0.5, draw(rows, r) / r**0.5, pivots, draw(n)


def expected(x: Tensor, down: Tensor, up: Tensor, pivots: Tensor | None, bias: Tensor | None):
    """The float64 result, the intermediate rounded to x's dtype once."""
    t = (x.double() @ down.double().T).to(x.dtype).double()
    rank = down.shape[0]
    identity = torch.eye(rank, dtype=torch.float64, device=x.device)
    bias = None if bias is None else bias.double()
    if pivots is None:
        return reference.lowrank_linear(t, identity, up.double(), bias)
    return reference.pivoted_linear(t, identity, up.double(), pivots, bias)


def close(y: Tensor, wanted: Tensor, tolerance: float) -> None:
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("pivoted", [False, True], ids=["two_factor", "pivoted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", PLANS)
def test_matches_the_reference(kind, shape, pivoted, dtype, device):
    if kind == "rank_split" and shape[0] > 16:
        pytest.skip("rank_split takes at most 16 rows")
    x, down, up, pivots, bias = layer(*shape, pivoted, dtype, device)
    for b in (None, bias):
        y = launches.lowrank_linear(x, down, up, pivots, b, plan=PLANS[kind])
        assert y.dtype == dtype
        close(y, expected(x, down, up, pivots, b), TOLERANCE[dtype])
        again = launches.lowrank_linear(x, down, up, pivots, b, plan=PLANS[kind])
        assert torch.equal(y, again)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("pivoted", [False, True], ids=["two_factor", "pivoted"])
def test_rounds_the_intermediate_to_bfloat16_once(kind, pivoted, device):
    """In float32 tensors that hold bfloat16 values: the interpreter cannot compute in bfloat16."""
    exact = layer(5, 24, 40, 56, pivoted, torch.bfloat16, device)
    wide = [t if t is None or t.dtype == torch.int32 else t.float() for t in exact]
    y = launches.lowrank_linear(*wide, plan=PLANS[kind], emulate_bf16=True)
    assert torch.equal(y, y.bfloat16().float())
    wanted = expected(*exact)
    close(y, wanted, TOLERANCE[torch.bfloat16])
    assert float((y - wanted.bfloat16().float()).abs().gt(0).float().mean()) < 0.1


@pytest.mark.parametrize("kind", PLANS)
def test_takes_views(kind, device):
    """Strided rows of x, and factors transposed as the backward pass hands them over."""
    x, down, up, _, _ = layer(6, 24, 40, 32, False, torch.float32, device)
    wanted = expected(x, down, up, None, None)
    strided = torch.cat([x, x], 1)[:, :40]
    flipped = down.T.contiguous().T, up.T.contiguous().T
    y = launches.lowrank_linear(strided, *flipped, None, None, plan=PLANS[kind])
    close(y, wanted, 2e-6)
    columns = x.T.contiguous().T  # stride 1 along the rows only
    close(launches.lowrank_linear(columns, *flipped, None, None, plan=PLANS[kind]), wanted, 2e-6)


def test_the_corrective_path_is_more_rank(device):
    x, down, up, _, bias = layer(3, 24, 40, 56, False, torch.float32, device)
    _, a, b, _, _ = layer(4, 8, 40, 56, False, torch.float32, device)
    y = launches.lowrank_linear(
        x, torch.cat([down, a]), torch.cat([up, b], 1), None, bias, plan=PLANS["rank_split"]
    )
    close(y, reference.lowrank_linear(*(t.double() for t in (x, down, up, bias, a, b))), 2e-6)


@pytest.mark.parametrize("m", [1, 3, 40, 65])
@pytest.mark.parametrize("k", [1, 37, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_gram(m, k, dtype, device):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(k)).to(device, dtype)
    wanted = x.double().T @ x.double()
    found = launches.gram(x)
    assert found.dtype == torch.float32
    close(found, wanted, 2e-6)
    assert torch.equal(found, found.T)
    total = launches.gram(x, found.clone())
    close(total, 2 * wanted, 2e-6)


def test_gram_takes_strided_rows(device):
    x = torch.randn(20, 24, generator=torch.Generator().manual_seed(0)).to(device)
    close(launches.gram(x[:, :10]), x[:, :10].double().T @ x[:, :10].double(), 2e-6)
