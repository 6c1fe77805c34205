"""Randomized SVD on matrices of known spectra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calr_kernels import error_estimate, randomized_svd, truncated_eigh
from calr_kernels.orthonormal import orthonormalize
from calr_kernels.sketch import sketch_pays

SPECTRA = {
    "flat": lambda i: torch.ones_like(i),
    "i^-0.25": lambda i: i**-0.25,
    "i^-0.5": lambda i: i**-0.5,
    "i^-1": lambda i: i**-1,
    "exponential": lambda i: torch.exp(-i / 20),
    "low rank": lambda i: (i <= 20).double(),
    "clustered": lambda i: 0.5 * (i <= 30).double() + 0.49 * (i <= 60).double() + 0.01,
    "rank deficient": lambda i: i**-0.5 * (i <= i.max() / 2),
    "zero": lambda i: i * 0,
    "tiny": lambda i: 1e-36 * i**-0.5,
    "huge": lambda i: 1e34 * i**-0.5,
    "condition 1e12": lambda i: 10 ** (-12 * (i - 1) / (i.max() - 1)),
}
SLOW = {"flat", "i^-0.25"}  # decay too slow for the 1 % promise
SHAPES = [(300, 400), (500, 300), (320, 320)]


def matrix(m, n, spectrum, dtype=torch.float32, seed=0):
    """A random m×n matrix with given singular values, and these."""
    generator = torch.Generator().manual_seed(seed)
    small = min(m, n)
    u, v = (
        torch.linalg.qr(torch.randn(size, small, generator=generator, dtype=torch.float64))[0]
        for size in (m, n)
    )
    s = SPECTRA[spectrum](torch.arange(1, small + 1, dtype=torch.float64))
    return ((u * s) @ v.T).to(dtype), s


def orthogonality(q):
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return float((q.mT @ q - identity).abs().max())


@pytest.mark.parametrize("rank", [1, 15, 37, 70, 250])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_error_is_within_one_percent_of_the_optimum(m, n, spectrum, rank, device):
    a, s = matrix(m, n, spectrum)
    u, found, vh = (t.cpu() for t in randomized_svd(a.to(device), rank))
    assert (u.shape, found.shape, vh.shape) == ((m, rank), (rank,), (rank, n))
    assert all(bool(torch.isfinite(t).all()) for t in (u, found, vh))
    assert orthogonality(u) <= 1e-5
    assert orthogonality(vh.mT) <= 1e-5
    assert (found.diff() <= 1e-6 * found[0]).all()
    error = (a.double() - (u.double() * found.double()) @ vh.double()).norm()
    optimum = s[rank:].square().sum().sqrt()
    factor = 1.1 if spectrum in SLOW else 1.01
    assert error <= factor * optimum + 2e-6 * s.norm()
    if spectrum not in SLOW:
        torch.testing.assert_close(found.double(), s[:rank], rtol=0.03, atol=float(1e-5 * s[0]))


def test_signs_and_repeatability(device):
    a, _ = matrix(400, 300, "i^-0.5")
    first, second = (randomized_svd(a.to(device), 30) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    u = first[0]
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    generator = torch.Generator().manual_seed(7)
    third = randomized_svd(a.to(device), 30, generator=generator)
    fourth = randomized_svd(a.to(device), 30, generator=generator)
    assert not torch.equal(third[0], fourth[0])  # the generator moves on
    torch.testing.assert_close(third[1], fourth[1], rtol=1e-2, atol=0)


def test_a_batch_is_its_members_one_by_one():
    batch = torch.stack([matrix(300, 400, name, seed=i)[0] for i, name in enumerate(SPECTRA)])
    batch = batch.reshape(3, 4, 300, 400)
    together = randomized_svd(batch, 20)
    assert together[0].shape == (3, 4, 300, 20)
    for i in range(3):
        for j in range(4):
            alone = randomized_svd(batch[i, j], 20)
            assert all(torch.equal(x[i, j], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize("spectrum", ["i^-0.5", "i^-1", "exponential", "low rank", "zero"])
@pytest.mark.parametrize("tol", [0.5, 0.1, 0.01])
def test_rank_by_tolerance_is_nearly_the_smallest(spectrum, tol):
    a, s = matrix(300, 400, spectrum)
    u, found, vh = randomized_svd(a, tol=tol)
    error = (a.double() - (u.double() * found.double()) @ vh.double()).norm()
    assert error <= tol * s.norm() * 1.001 + 1e-30
    tails = s.square().flip(0).cumsum(0).flip(0).sqrt()
    smallest = max(1, int((tails > tol * s.norm()).sum()))
    assert smallest <= len(found) <= 1.05 * smallest + 1


@pytest.mark.parametrize(
    ("dtype", "tol"),
    [(torch.float32, 3e-4), (torch.float32, 1e-5), (torch.float64, 1e-5), (torch.float64, 1e-11)],
)
@pytest.mark.parametrize(("m", "n"), [(300, 400), (100, 120)], ids=["sketched", "exact"])
def test_a_tolerance_near_the_rounding_is_kept(m, n, dtype, tol):
    s = torch.exp(-torch.arange(1.0, min(m, n) + 1, dtype=torch.float64) / 5)
    u, v = (torch.linalg.qr(torch.randn(k, len(s), dtype=torch.float64))[0] for k in (m, n))
    a = ((u * s) @ v.mT).to(dtype)
    u, found, vh = (t.double() for t in randomized_svd(a, tol=tol))
    assert (a.double() - (u * found) @ vh).norm() <= 1.001 * tol * s.norm()
    smallest = int((s.square().flip(0).cumsum(0).flip(0).sqrt() > tol * s.norm()).sum())
    assert smallest <= len(found) <= smallest + 2


@pytest.mark.parametrize("rank", [60, 100])
def test_float64_is_right_far_below_the_largest_singular_value(rank):
    i = torch.arange(300, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(k, 300, dtype=torch.float64))[0] for k in (300, 400))
    s = 10 ** (-i / 8)
    _, found, _ = randomized_svd((u * s) @ v.mT, rank)
    torch.testing.assert_close(found, s[:rank], rtol=0.01, atol=1e-14)
    assert (found.diff() <= 0).all()


def test_posterior_error_is_the_error(device):
    a, _ = matrix(400, 300, "i^-1")
    u, s, vh = (t.cpu() for t in randomized_svd(a.to(device), 40))
    error = (a - (u * s) @ vh).norm() / a.norm()
    assert float(error_estimate(a, s)) == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_power_iterations_lose_almost_nothing(dtype):
    a, s = matrix(500, 300, "i^-0.5")
    u, found, vh = randomized_svd(a, 30, compute_dtype=dtype)
    error = (a.double() - (u.double() * found.double()) @ vh.double()).norm()
    assert error <= 1.015 * s[30:].square().sum().sqrt()
    assert orthogonality(u) <= 1e-5


@pytest.mark.parametrize(
    ("dtype", "out"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_dtypes(dtype, out):
    a, s = matrix(400, 300, "exponential", dtype)
    u, found, vh = randomized_svd(a, 20)
    assert {t.dtype for t in (u, found, vh)} == {out}
    tolerance = 1e-6 if dtype == torch.float64 else 0.02
    torch.testing.assert_close(found.double(), s[:20], rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        assert orthogonality(u) <= 1e-13


@pytest.mark.parametrize("spectrum", [name for name in SPECTRA if name not in ("tiny", "huge")])
@pytest.mark.parametrize("n", [60, 400])
@pytest.mark.parametrize("rank", [1, 30, 55])
def test_truncated_eigh(n, spectrum, rank, device):
    a, s = matrix(n, n, spectrum, torch.float64)
    c = (a @ a.T).float()
    values, vectors = (t.cpu() for t in truncated_eigh(c.to(device), rank))
    assert orthogonality(vectors) <= 1e-5
    torch.testing.assert_close(
        values.double(),
        s[:rank] ** 2,
        rtol=0.1 if spectrum in SLOW else 0.03,
        atol=float(2e-6 * s[0] ** 2),
    )
    kept = torch.trace(vectors.double().T @ c.double() @ vectors.double())
    assert kept >= (0.97 if spectrum in SLOW else 0.995) * (s[:rank] ** 2).sum() - 1e-5 * s[0] ** 2


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6), st.data())
def test_any_small_shape_and_rank(m, n, seed, data):
    rank = data.draw(st.integers(1, min(m, n)))
    a = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    u, s, vh = randomized_svd(a, rank)
    expected = torch.linalg.svdvals(a.double())
    torch.testing.assert_close(s.double(), expected[:rank], rtol=1e-5, atol=1e-5)
    error = (a - (u * s) @ vh).double().norm()
    assert error <= expected[rank:].norm() + 1e-5 * expected[0]


@pytest.mark.parametrize("condition", [1e0, 1e3, 1e5, 1e7, 1e12, float("inf")])
def test_orthonormalize_whatever_the_condition(condition, device):
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(200, 40, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    s = torch.logspace(0, -torch.tensor(condition).log10().clamp(max=30), 40, dtype=torch.float64)
    y = ((u * s) @ v.T).float().to(device)[None]
    q = orthonormalize(y)
    assert orthogonality(q[0]) <= 1e-5
    if condition <= 1e5:
        assert float((y - q @ (q.mT @ y)).norm() / y.norm()) < 1e-5


def test_orthonormalize_a_zero_matrix():
    assert orthogonality(orthonormalize(torch.zeros(1, 50, 8))[0]) <= 1e-5


def test_the_picker_takes_the_exact_method_for_small_and_for_many():
    assert sketch_pays(4096, 11008, 600)
    assert not sketch_pays(100, 100, 10)
    assert not sketch_pays(4096, 4096, 4000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 4), 0), r"rank 0 of A \[3, 4\].*\[1, 3\]"),
        ((torch.ones(3, 4), 4), "rank 4"),
        ((torch.ones(3), 1), r"A \[3\]"),
        ((torch.ones(3, 4).long(), 1), "must be floating"),
        ((torch.ones(0, 4), 1), "m, n >= 1"),
        ((torch.ones(3, 4),), "either rank or tol"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        randomized_svd(*arguments)


def test_bad_tolerance_shape_and_values():
    with pytest.raises(ValueError, match=r"tol 2\.0"):
        randomized_svd(torch.ones(3, 3), tol=2.0)
    with pytest.raises(ValueError, match="must be square"):
        truncated_eigh(torch.ones(3, 4), 1)
    with pytest.raises(torch.linalg.LinAlgError, match="NaN or infinity"):
        randomized_svd(torch.full((3, 3), float("nan")), 1)


def test_truncated_eigh_in_float64_of_float32():
    a = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    values, _ = truncated_eigh(a @ a.T, 4, compute_dtype=torch.float64)
    torch.testing.assert_close(
        values, torch.linalg.eigvalsh(a @ a.T).flip(0)[:4], rtol=0.05, atol=0
    )


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_float16_products_neither_overflow_nor_vanish(scale):
    a, s = matrix(512, 512, "i^-0.5")
    found = randomized_svd(scale * 100 * a, 16, compute_dtype=torch.float16)[1]
    torch.testing.assert_close(found.double(), scale * 100 * s[:16], rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"oversample": -1}, "oversample -1"),
        ({"power_iters": -1}, "power_iters -1"),
        ({"compute_dtype": torch.int16}, "compute_dtype torch.int16"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        randomized_svd(torch.eye(4), 2, **options)
    with pytest.raises(ValueError, match=message):
        truncated_eigh(torch.eye(4), 2, **options)


def test_an_empty_batch_stays_empty():
    assert randomized_svd(torch.ones(0, 6, 4), tol=0.1)[1].shape == (0, 1)
