"""Every method against brute force in float64."""

import pytest
import torch

from calr.errors import CalrError
from calr.methods import Moments, names, resolve
from calr.methods.calr import Config as CalrMethod
from calr.methods.calr import decompose as two_sided

SHAPES = [(12, 12), (20, 9), (9, 20), (1, 7), (7, 1)]  # tall, wide, rank 1
CASES = ["regular", "singular", "constant", "zero_input", "zero_weight", "low_rank_weight"]


def problem(n, k, case="regular", seed=0):
    """A weight, its input moment G and its output gradients' moment G_y, float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w = draw(n, k)
    x = draw(4 * k, k) * torch.linspace(0.1, 2, k, dtype=torch.float64)
    g = draw(4 * n, n) * torch.linspace(0.5, 1.5, n, dtype=torch.float64)
    if case == "singular":  # fewer tokens than inputs and outputs
        x, g = x[: max(1, k // 2)], g[: max(1, n // 2)]
    if case == "constant":
        x = torch.ones(5, k, dtype=torch.float64)
    if case == "zero_input":
        x = x * 0
    if case == "zero_weight":
        w = w * 0
    if case == "low_rank_weight":
        w = w[:, :1] @ w[:1]
    return w, x.T @ x / len(x), g.T @ g / len(g)


def moments(w, g_x, g_y):
    n, k = w.shape
    output = g_y if n <= k else w.T @ g_y @ w
    return Moments(g_x, float(g_y.diagonal().mean()), output)


def output_error(w, g_x, low):
    return float(torch.trace((w - low) @ g_x @ (w - low).T))


def loss_increase(w, g_x, g_y, low):
    return float(torch.trace(g_y @ (w - low) @ g_x @ (w - low).T)) / 2


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("method", names())
def test_errors_are_those_of_the_factors(method, n, k, case):
    w, g_x, g_y = problem(n, k, case)
    result = resolve(method, {}).decompose(w, moments(w, g_x, g_y))
    errors = result.errors
    assert errors.shape == (min(n, k) + 1,)
    assert errors.dtype == torch.float64
    assert torch.isfinite(errors).all()
    assert (errors.diff() <= 1e-12 * errors[0].clamp(min=1e-30)).all()
    scale = float(errors[0]) + 1e-12
    for rank in range(1, min(n, k) + 1):
        try:
            up, down = result.factors(rank)
        except CalrError:
            assert method == "erc_svd"
            assert rank == 1
            continue
        assert up.shape == (n, rank)
        assert down.shape == (rank, k)
        low = up.double() @ down.double()
        assert torch.isfinite(low).all()
        if result.unit == "loss":
            found = loss_increase(w, g_x, g_y, low)
            # the damping of G_y is in the errors, not in this measure
            assert found <= float(errors[rank]) + 1e-6 * scale
            assert found >= float(errors[rank]) - 1e-3 * scale
        elif method == "erc_svd":
            assert output_error(w, g_x, low) <= float(errors[rank]) + 1e-6 * scale
        else:
            assert output_error(w, g_x, low) == pytest.approx(float(errors[rank]), abs=1e-6 * scale)


@pytest.mark.parametrize(("n", "k"), [(12, 12), (20, 9), (9, 20)])
def test_svd_llm_equals_the_cholesky_whitened_svd(n, k):
    w, g_x, g_y = problem(n, k)
    result = resolve("svd_llm", {}).decompose(w, moments(w, g_x, g_y))
    root = torch.linalg.cholesky(g_x)
    u, s, vh = torch.linalg.svd(w @ root, full_matrices=False)
    for rank in (1, 4, 8):
        up, down = result.factors(rank)
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root)
        torch.testing.assert_close(up.double() @ down.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n", "k"), [(12, 12), (20, 9), (9, 20)])
def test_svd_equals_the_truncated_svd(n, k):
    w, g_x, g_y = problem(n, k)
    result = resolve("svd", {}).decompose(w, moments(w, g_x, g_y))
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    up, down = result.factors(5)
    torch.testing.assert_close(
        up.double() @ down.double(), (u[:, :5] * s[:5]) @ vh[:5], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("n", "k"), [(12, 12), (20, 9), (9, 20)])
def test_calr_equals_the_two_sided_formula_with_inverses(n, k):
    w, g_x, g_y = problem(n, k)
    result = two_sided(w, moments(w, g_x, g_y), CalrMethod(damping=0))
    left, right = torch.linalg.cholesky(g_y), torch.linalg.cholesky(g_x)
    u, s, vh = torch.linalg.svd(left.T @ w @ right, full_matrices=False)
    for rank in (1, 4, 8):
        up, down = result.factors(rank)
        core = (u[:, :rank] * s[:rank]) @ vh[:rank]
        expected = torch.linalg.inv(left.T) @ core @ torch.linalg.inv(right)
        torch.testing.assert_close(up.double() @ down.double(), expected, rtol=1e-4, atol=1e-4)
        assert float(result.errors[rank]) == pytest.approx(float((s[rank:] ** 2).sum()) / 2)


def test_erc_svd_adds_the_plain_svd_of_what_the_whitened_one_left():
    w, g_x, g_y = problem(40, 50)
    result = resolve("erc_svd", {"beta": 0.1}).decompose(w, moments(w, g_x, g_y))
    rank, residual_rank = 12, 2  # 0.1 * 40 * 50 / 90 = 2.2
    up, down = (
        resolve("svd_llm", {}).decompose(w, moments(w, g_x, g_y)).factors(rank - residual_rank)
    )
    primary = up.double() @ down.double()
    u, s, vh = torch.linalg.svd(w - primary, full_matrices=False)
    expected = primary + (u[:, :residual_rank] * s[:residual_rank]) @ vh[:residual_rank]
    up, down = result.factors(rank)
    torch.testing.assert_close(up.double() @ down.double(), expected, rtol=1e-4, atol=1e-5)


def test_exactly_low_rank_weights_are_found_exactly():
    w, g_x, g_y = problem(12, 9, "low_rank_weight")
    for method in ("svd", "svd_llm", "calr"):
        result = resolve(method, {}).decompose(w, moments(w, g_x, g_y))
        up, down = result.factors(1)
        torch.testing.assert_close(up.double() @ down.double(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("magic", {}, "unknown; choose one of calr, erc_svd, svd, svd_llm"),
        ("erc_svd", {"gamma": 1.0}, "erc_svd has no option 'gamma'; it knows \\['beta'\\]"),
        ("erc_svd", {"beta": 2.0}, "beta=2.0"),
        ("calr", {"damping": -1.0}, "damping=-1.0"),
    ],
)
def test_bad_methods_are_refused(name, options, message):
    with pytest.raises(CalrError, match=message):
        resolve(name, options)


def test_calr_without_gradients_says_so():
    w, g_x, _ = problem(4, 4)
    with pytest.raises(CalrError, match="needs gradient statistics"):
        resolve("calr", {}).decompose(w, Moments(g_x))
