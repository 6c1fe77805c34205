"""Rounding: known answers, and every step better than what it replaces."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calr.rounding import Rounded, gptq, matrix, round_matrix, truncate
from calr.rounding.damping import damped_cholesky
from calr.rounding.scales import refit, search
from calr_kernels import Form, records

FORMS = [
    Form(3, "table", 32),
    Form(4, "uniform", 32),
    Form(4, "table", 64),
    Form(5, "formula", 64),
    Form(6, "formula", 32),
    Form(8, "uniform", 64),
]


def test_a_moment_that_is_not_finite_is_refused():
    moment = torch.eye(4, dtype=torch.float64)
    moment[1, 2] = moment[2, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        damped_cholesky(moment, 0.01)


def problem(rows=40, columns=96, seed=0):
    """A weight and the second moment of correlated inputs of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    x = torch.randn(400, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    x = x * torch.rand(columns, generator=draw) * 3
    return weight, x.mT @ x / len(x)


def error(weight, rounded, moment):
    lost = weight - rounded.weight()
    return float(((lost @ moment) * lost).sum())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_matrix_on_the_grid_comes_back_exactly(form):
    """Of any rounding the first thing to ask: round(levels · scales) is itself."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(1 << form.bits, (6, 128), generator=draw).to(torch.uint8)
    codes[:, :: form.scale_group] = 0  # the outermost level occurs in every group
    codes[:, 1 :: form.scale_group] = (1 << form.bits) - 1
    scales = torch.rand(6, form.groups(128), generator=draw) / 100 + 1e-3
    weight = records.dequantize(records.pack(codes, scales, form), form, 128, torch.float32)
    _, moment = problem(columns=128)
    assert torch.equal(round_matrix(weight, form).weight(), weight)
    assert torch.equal(round_matrix(weight, form, moment).weight(), weight)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_step_errs_less(form):
    weight, moment = problem()
    nearest = round_matrix(weight, form)
    scales = search(weight, moment.diagonal(), form)
    codes = gptq.choose(weight, scales, gptq.ordered(moment), form)
    chosen = Rounded.of(form, codes, scales)
    fitted = Rounded.of(form, codes, refit(weight, codes, moment, scales, form))
    assert error(weight, chosen, moment) < 0.75 * error(weight, nearest, moment)
    assert error(weight, fitted, moment) <= error(weight, chosen, moment) * (1 + 1e-3)


def test_non_uniform_levels_err_less():
    weight, moment = problem()
    uniform, table = (round_matrix(weight, Form(4, x, 32), moment) for x in ("uniform", "table"))
    assert error(weight, table, moment) < 0.9 * error(weight, uniform, moment)


def test_a_wider_integer_errs_less():
    weight, moment = problem()
    by_bits = [error(weight, round_matrix(weight, f, moment), moment) for f in FORMS[2:]]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[-1] < by_bits[0] / 50


def test_the_refit_is_the_least_squares_solution():
    weight, moment = problem(rows=3)
    form = Form(4, "table", 32)
    scales = search(weight, moment.diagonal(), form)
    codes = gptq.choose(weight, scales, gptq.ordered(moment), form)
    fitted = refit(weight, codes, moment, scales, form)
    levels = torch.tensor(form.values, dtype=torch.float64)[codes.long()]
    root = torch.linalg.cholesky(moment.double() + 1e-9 * torch.eye(96).double())
    for row in range(3):
        spread = torch.zeros(96, 3, dtype=torch.float64)
        for group in range(3):
            spread[group * 32 : group * 32 + 32, group] = levels[row, group * 32 : group * 32 + 32]
        wanted = torch.linalg.lstsq(root.mT @ spread, root.mT @ weight[row].double()).solution
        torch.testing.assert_close(fitted[row].double(), wanted, rtol=2e-3, atol=0)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 130),
    st.sampled_from(FORMS),
    st.sampled_from([0, 1, 1e-9, 1e6]),
)
def test_awkward_matrices_round_to_something_finite(rows, columns, form, size):
    draw = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=draw) * size
    moment = torch.zeros(columns, columns)  # nothing was ever seen
    for found in (round_matrix(weight, form), round_matrix(weight, form, moment)):
        records.check(found.records, form, rows, columns)
        assert (found.weight() - weight).norm() <= weight.norm()


def test_a_column_that_is_always_zero_and_a_singular_moment():
    weight, moment = problem()
    moment[:, 5] = moment[5] = 0
    one = moment[0][:, None] * moment[0] / moment[0].norm()  # of rank 1
    for m in (moment, one):
        assert torch.isfinite(round_matrix(weight, FORMS[2], m).weight()).all()


def test_a_low_rank_error_is_found_whatever_it_is_weighed_by():
    """rows and moment change what is best, but not that nothing of rank 3 is left."""
    _, moment = problem()
    draw = torch.Generator().manual_seed(1)
    error = torch.randn(40, 3, generator=draw) @ torch.randn(3, 96, generator=draw)
    rows = torch.rand(40, generator=draw)
    rows[5] = 0  # outputs that the loss does not see
    up, down, gains = truncate(error, rows, moment + torch.eye(96), 3)
    assert (up.shape, down.shape) == ((40, 3), (3, 96))
    torch.testing.assert_close(up @ down, error, rtol=0, atol=1e-3)
    lost = (rows * ((error @ (moment + torch.eye(96))) * error).sum(1)).sum() / 2
    assert float(gains.sum()) == pytest.approx(float(lost), rel=1e-4)


def test_the_truncation_lowers_the_loss_by_what_it_says_and_no_other_by_more():
    error, moment = problem(seed=2)
    moment = moment + 0.01 * torch.eye(96)
    rows = torch.rand(40, generator=torch.Generator().manual_seed(3)) + 0.1

    def loss(x):
        return float((rows * ((x @ moment) * x).sum(1)).sum() / 2)

    up, down, gains = truncate(error, rows, moment, 8)
    assert loss(error - up @ down) == pytest.approx(loss(error) - float(gains.sum()), rel=1e-3)
    u, values, vh = torch.linalg.svd(error, full_matrices=False)
    plain = (u[:, :8] * values[:8]) @ vh[:8]
    assert loss(error - up @ down) < loss(error - plain)


@pytest.mark.parametrize(
    "kind", ["one token", "silent inputs", "nothing", "no gradient", "rounded away"]
)
def test_statistics_of_too_little_text_are_harmless(kind):
    weight, moment = problem()
    rows, x = torch.rand(40), torch.randn(96, generator=torch.Generator().manual_seed(4))
    moment = {"one token": torch.outer(x, x), "nothing": torch.zeros(96, 96)}.get(kind, moment)
    if kind == "silent inputs":
        moment[10:40], moment[:, 10:40] = 0, 0
    if kind == "rounded away":  # an eigenvalue that rounding has made negative
        moment = torch.outer(x, x) - 1e-3 * float(x.square().mean()) * torch.eye(96)
    if kind == "no gradient":
        rows = torch.zeros(40)
    lost = weight - round_matrix(weight, Form(3, "table", 32), moment).weight()
    for tensor in truncate(lost, rows, moment, 8):
        assert torch.isfinite(tensor).all()


def test_scales_are_fitted_by_least_squares():
    """Each row's scales against numpy's solution of the same problem, a short last group too."""
    weight, moment = problem(rows=5, columns=80)
    form = Form(4, "table", 32)
    scales = search(weight, moment.diagonal(), form)
    codes = gptq.choose(weight, scales, gptq.ordered(moment), form)
    fitted = refit(weight, codes, moment, scales, form)
    root = np.linalg.cholesky(moment.double().numpy())  # w G wᵀ = |w root|²
    levels = torch.tensor(form.values, dtype=torch.float64)[codes.int()]
    for row in range(len(weight)):
        groups = [levels[row].clone() for _ in range(3)]
        for i, group in enumerate(groups):
            group[: 32 * i] = 0
            group[32 * (i + 1) :] = 0
        system = torch.stack(groups).numpy() @ root
        target = weight[row].double().numpy() @ root
        wanted = np.linalg.lstsq(system.T, target, rcond=None)[0]
        assert fitted[row].numpy() == pytest.approx(wanted, rel=2e-3)  # of float16 numbers


def test_rows_rounded_in_parts_are_rounded_alike(monkeypatch):
    weight, moment = problem(rows=40)
    whole = round_matrix(weight, FORMS[2], moment)
    monkeypatch.setattr(matrix, "PART", 7 * 96)
    parts = round_matrix(weight, FORMS[2], moment)
    assert (whole.records != parts.records).sum() <= 4  # sums of another order
    assert error(weight, parts, moment) == pytest.approx(error(weight, whole, moment), rel=1e-2)


@pytest.mark.parametrize("columns", [1, 63, 128, 129, 700])
def test_the_factor_is_that_of_the_inverse(columns):
    _, moment = problem(columns=columns)
    order, factor = gptq.ordered(moment)
    assert torch.equal(factor, factor.triu())
    damped = moment.double()[order][:, order]
    damped += gptq.DAMPING * damped.diagonal().mean() * torch.eye(columns)
    found = factor.double().mT @ factor.double() @ damped
    torch.testing.assert_close(found, torch.eye(columns).double(), rtol=0, atol=1e-3)
