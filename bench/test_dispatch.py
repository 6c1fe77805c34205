"""What a call costs when there is nothing to compute, one thread: pytest bench/test_dispatch.py."""

import pytest
import torch
from torch.nn.functional import linear

from calr_kernels import LowRankLinear
from calr_kernels.native import Bound

LAYER = LowRankLinear(16, 16, 2, "pivoted", bias=False).requires_grad_(False)
X = torch.randn(1, 16)
BOUND, FACTORS = Bound(), (LAYER.factors(),)
CALLS = {
    "F.linear": lambda: linear(X, X),
    "operation": lambda: BOUND.linears(X, FACTORS),
    "module": lambda: LAYER(X),
    "two nn.Linear": torch.nn.Sequential(torch.nn.Linear(16, 2), torch.nn.Linear(2, 16)),
}


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_dispatch(benchmark, name):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    call = CALLS[name] if name != "two nn.Linear" else lambda: CALLS[name](X)
    benchmark(call)
    torch.set_num_threads(threads)
