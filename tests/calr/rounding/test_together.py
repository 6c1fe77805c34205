"""Several matrices rounded at once are rounded as each alone."""

import pytest
import torch

from calr.rounding import most_together, order_matrices, round_matrices, round_matrix, together
from calr_kernels import Form, records

FORMS = [Form(3, "table", 32), Form(4, "table", 64), Form(5, "formula", 32), Form(8, "uniform", 64)]


def problems(device, rows=40, columns=80):
    """Weights and moments of inputs of very different sizes, one of rank 1, one of none."""
    draw = torch.Generator().manual_seed(0)
    weights = (
        torch.randn(4, rows, columns, generator=draw)
        * torch.tensor([1, 30, 1e-3, 1])[:, None, None]
    )
    x = torch.randn(4, 300, columns, generator=draw) * torch.rand(4, 1, columns, generator=draw)
    moments = x.mT @ x / 300
    moments[2] = moments[2, 0, :, None] * moments[2, 0]  # of rank 1
    moments[3] = 0
    return list(weights.to(device)), list(moments.to(device))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_is_rounded_by_its_own_moment(form, device):
    weights, moments = problems(device)
    found = round_matrices(weights, form, moments, order_matrices(moments))
    assert len(found) == len(weights)
    for weight, moment, stored in zip(weights, moments, found, strict=True):
        alone = round_matrix(weight, form, moment)
        records.check(stored, form, *weight.shape)
        assert (stored != alone.records).float().mean() < 0.02  # sums of another order
        lost = weight - records.dequantize(stored, form, weight.shape[1], torch.float32)
        plain = weight - alone.weight()
        costs = [float(((x @ moment) * x).sum()) for x in (lost, plain)]
        assert costs[0] == pytest.approx(costs[1], rel=2e-2, abs=1e-12)


def test_orders_are_those_of_each_moment(device):
    _, moments = problems(device)
    for moment, (order, factor) in zip(moments, order_matrices(moments), strict=True):
        wanted, wanted_factor = order_matrices([moment])[0]
        assert torch.equal(order, wanted)
        torch.testing.assert_close(
            factor, wanted_factor, rtol=1e-4, atol=1e-4 * float(factor.max())
        )


def test_a_cpu_rounds_one_at_a_time_and_a_gpu_as_many_as_memory_allows(monkeypatch):
    assert most_together(768, 2048, torch.device("cpu")) == 1
    gpu = torch.device("cuda")
    assert 8 <= most_together(768, 2048, gpu) < 64
    assert most_together(53_248, 16_384, gpu) == 1
    monkeypatch.setattr(together, "TOGETHER", 1)
    assert most_together(8, 8, gpu) == 1
