"""Quantised matrices whose scales are trained."""

import pytest
import torch
from torch import nn

from calr_kernels import Form, native, records, scaled

FORMS = [
    Form(3, "table", 32), Form(4, "table", 64), Form(5, "formula", 96), Form(6, "formula", 128),
    Form(8, "uniform", 64),
]  # fmt: skip
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def matrix(form, rows, columns, device):
    """Draw records and scales beside theirs, one of which is 0 and stays so."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(1 << form.bits, (rows, columns), generator=draw).to(torch.uint8)
    own = torch.randn(rows, form.groups(columns), generator=draw) / 100
    own[1, 0] = 0
    return records.pack(codes, own, form).to(device), (own * 1.1 + 1e-6).to(device)


def draw(*shape, device="cpu", dtype=torch.float32):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return numbers.to(device, dtype)


def plain(weight, scales, form, columns):
    """Make the numbers as a function of the scales, float64, that autograd can follow."""
    ones = records.rescaled(weight, torch.ones_like(records.scales_of(weight)))
    levels = records.dequantize(ones, form, columns, torch.float64)
    stored = scaled.stored_scales(weight, scales.detach(), form).double()
    followed = stored + (scales - scales.detach()) * (records.scales_of(weight) != 0)
    return levels * followed.repeat_interleave(form.scale_group, 1)[:, :columns]


@pytest.mark.parametrize("part", [scaled.PART, 300])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_values_and_gradients_are_those_of_a_dense_layer(form, dtype, part, device, monkeypatch):
    monkeypatch.setattr(scaled, "PART", part)
    weight, scales = matrix(form, 33, 200, device)
    x = draw(2, 5, 200, device=device, dtype=dtype)
    bias = draw(33, device=device, dtype=dtype)
    toward = draw(2, 5, 33, device=device, dtype=dtype)
    ours = [t.clone().requires_grad_() for t in (x, scales, bias)]
    y = scaled.scaled_linear(ours[0], weight, ours[1], form, ours[2])
    assert y.dtype == dtype
    y.backward(toward)
    theirs = [t.double().requires_grad_() for t in (x, scales, bias)]
    wanted = nn.functional.linear(theirs[0], plain(weight, theirs[1], form, 200), theirs[2])
    wanted.backward(toward.double())
    pairs = [(y, wanted)] + [(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)]
    for found, value in pairs:
        error = (found.double() - value).detach().abs().max() / value.detach().abs().max()
        assert float(error) < TOLERANCE[dtype]
    assert float(ours[1].grad[1, 0]) == 0


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_and_their_gradients_are_those_of_a_dense_embedding(form, device):
    weight, scales = matrix(form, 9, 100, device)
    ids = torch.tensor([4, 1, 4, 8], device=device)
    ours, theirs = scales.clone().requires_grad_(), scales.double().requires_grad_()
    found = scaled.scaled_rows(ids, weight, ours, form, 100)
    wanted = plain(weight, theirs, form, 100)[ids]
    torch.testing.assert_close(found, wanted.float())
    toward = draw(4, 100, device=device)
    found.backward(toward)
    wanted.backward(toward.double())
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-5, atol=1e-3)


def test_trained_scales_keep_their_signs_and_are_what_is_stored():
    form = Form(4, "table", 32)
    weight, _ = matrix(form, 3, 64, "cpu")
    before = records.scales_of(weight).float()
    moved = before * 1.5
    moved[0, 0], moved[0, 1], moved[1, 0] = -before[0, 0], float("inf"), 0.3
    now = scaled.stored_scales(weight, moved, form)
    kept = torch.tensor([[True, True], [True, False], [False, False]])
    assert torch.equal(now[kept].float(), before[kept])
    assert torch.equal(now[~kept], moved[~kept].half())
    x = draw(4, 64)
    again = records.rescaled(weight, now)
    records.check(again, form, 3, 64)
    found = scaled.scaled_linear(x, weight, moved, form)
    numbers = records.dequantize(again, form, 64, torch.float32)
    assert torch.equal(found, nn.functional.linear(x, numbers))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.bits} {form.levels}")
def test_small_scales_are_trained_too(form):
    """Two of them multiplied would be 0 in float16."""
    codes, own = (
        torch.zeros(2, form.scale_group, dtype=torch.uint8),
        torch.tensor([[5e-5], [-5e-5]]),
    )
    weight = records.pack(codes, own, form)
    found = scaled.stored_scales(weight, own * 1.5, form)
    torch.testing.assert_close(found.float(), own * 1.5, rtol=2e-3, atol=0)


def test_autocast_is_followed():
    form = Form(4, "table", 32)
    weight, scales = matrix(form, 3, 64, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        y = scaled.scaled_linear(draw(4, 64), weight, scales, form, torch.zeros(3))
    assert y.dtype == torch.bfloat16


def test_nothing_as_large_as_the_numbers_is_kept_for_the_backward_pass():
    form = Form(4, "table", 64)
    weight, scales = matrix(form, 64, 640, "cpu")
    kept = []

    def pack(tensor):
        kept.append(tensor.nbytes)
        return tensor

    x = draw(2, 640).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scaled.scaled_linear(x, weight, scales.requires_grad_(), form)
    assert sum(kept) == x.nbytes + weight.nbytes + scales.nbytes


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("columns", [32, 100, 576])
def test_the_native_kernel_finds_the_same(form, columns):
    weight, scales = matrix(form, 37, columns, "cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = native.dequantize(weight, form, columns, dtype, scales)
        assert torch.equal(found, records.dequantize(weight, form, columns, dtype, scales))
        gradients = draw(37, columns, dtype=dtype)
        sums = native.scale_gradients(weight, gradients, form)
        wanted = records.scale_gradients(weight, gradients.double(), form)
        torch.testing.assert_close(sums, wanted, rtol=1e-4, atol=1e-2)
