"""Low-rank layers against float64: in the interpreter, or on a GPU (--device cuda)."""

import pytest
import torch
from torch import Tensor

from calr_kernels import reference
from calr_kernels.gpu import linears
from calr_kernels.gpu.interleave import places, run_interleave

SHAPES = [  # rows, rank, columns, outputs
    (1, 1, 37, 53), (1, 40, 2600, 41), (2, 24, 1100, 48), (3, 8, 64, 48), (4, 41, 600, 41),
    (5, 40, 96, 41), (65, 8, 37, 24),
]  # fmt: skip


@pytest.fixture
def layer(draw, device):
    """Inputs and factors of a layer: x, down, up, pivots or None, bias."""

    def made(m: int, r: int, k: int, n: int, pivoted: bool, dtype: torch.dtype) -> list:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
        pivots = order[:r].sort()[0].int().to(device) if pivoted else None
        rows = n - r if pivoted else n
        down = draw(r, k, dtype=dtype) / k**0.5
        return [draw(m, k, dtype=dtype), down, draw(rows, r, dtype=dtype) / r**0.5, pivots,
                draw(n, dtype=dtype)]  # fmt: skip

    return made


def expected(x: Tensor, down: Tensor, up: Tensor, pivots: Tensor | None, bias: Tensor | None):
    """The float64 result, the intermediate rounded to x's dtype once."""
    t = (x.double() @ down.double().T).to(x.dtype).double()
    identity = torch.eye(down.shape[0], dtype=torch.float64, device=x.device)
    bias = None if bias is None else bias.double()
    if pivots is None:
        return reference.lowrank_linear(t, identity, up.double(), bias)
    return reference.pivoted_linear(t, identity, up.double(), pivots, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("pivoted", [False, True], ids=["two_factor", "pivoted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, pivoted, dtype, layer, close):
    x, down, up, pivots, bias = layer(*shape, pivoted, dtype)
    for b in (None, bias):
        y = linears.lowrank_linear(x, down, up, pivots, b)
        assert y.dtype == dtype
        close(y, expected(x, down, up, pivots, b))
        assert torch.equal(y, linears.lowrank_linear(x, down, up, pivots, b))


@pytest.mark.parametrize("pivoted", [False, True], ids=["two_factor", "pivoted"])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_rounds_the_intermediate_to_bfloat16_once(m, pivoted, layer, close):
    """In float32 tensors that hold bfloat16 values: the interpreter cannot compute in bfloat16."""
    exact = layer(m, 24, 40, 56, pivoted, torch.bfloat16)
    wide = [t if t is None or t.dtype == torch.int32 else t.float() for t in exact]
    y = linears.lowrank_linear(*wide, emulate_bf16=True)
    assert torch.equal(y, y.bfloat16().float())
    wanted = expected(*exact)
    close(y, wanted, 1.6e-2)
    assert float((y - wanted.bfloat16().float()).abs().gt(0).float().mean()) < 0.1


@pytest.mark.parametrize("m", [3, 6])
def test_takes_views(m, layer, close):
    """Strided rows of x, x of more dimensions, and factors transposed as the backward pass does."""
    x, down, up, _, _ = layer(m, 24, 40, 32, False, torch.float32)
    wanted = expected(x, down, up, None, None)
    strided = torch.cat([x, x], 1)[:, :40]
    close(linears.lowrank_linear(strided, down, up, None, None), wanted)
    columns = x.T.contiguous().T  # stride 1 along the rows only
    flipped = down.T.contiguous().T, up.T.contiguous().T
    close(linears.lowrank_linear(columns, *flipped, None, None), wanted)
    close(linears.lowrank_linear(x.view(m // 3, 3, 40), down, up, None, None).flatten(0, 1), wanted)


def test_sees_weights_and_pivots_that_were_written_to(layer, close):
    """What is kept beside a tensor goes out of date with it; a launch reads weights as they are."""
    x, down, up, pivots, bias = layer(2, 9, 40, 21, True, torch.float32)
    linears.lowrank_linear(x, down, up, pivots, bias)
    pivots.copy_(torch.arange(12, 21))
    down.mul_(2)
    close(linears.lowrank_linear(x, down, up, pivots, bias), expected(x, down, up, pivots, bias))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "r", "n"), [(1, 1, 1), (3, 5, 2100), (70, 40, 41)])
def test_interleave(m, r, n, bias, draw, device):
    t, rest, b = draw(m, r), draw(m, n - r), draw(n)
    pivots = torch.randperm(n, generator=torch.Generator().manual_seed(n))[:r].sort()[0]
    pivots = pivots.int().to(device)
    wanted = reference.interleave(t, rest, pivots)
    found = run_interleave(t, rest, pivots, b if bias else None)
    assert torch.equal(found, wanted + b if bias else wanted)
    others, source = places(pivots, n)
    assert torch.equal(torch.cat([pivots, others])[source.long()].cpu(), torch.arange(n).int())
