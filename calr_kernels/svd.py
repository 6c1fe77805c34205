"""Batched randomized SVD and truncated eigendecomposition.

A Gaussian sketch (Halko, Martinsson & Tropp, arXiv 0909.4061), power iterations with dynamic
shifts (Feng, Yu & Xie, arXiv 2404.09276), bases by CholeskyQR, and one small eigenproblem. Nearly
all work is matrix products, on the CPU and on a GPU alike; finite input never gives a NaN. Where a
sketch does not pay, an exact method is used: `sketch_pays` is the one place that knows.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALL = 256  # rows and columns below which an exact decomposition takes a few milliseconds
LEAST_DIAGONAL = 0.02  # of the Cholesky factor of normalised columns, for a single pass
ORTHOGONAL = 1e-8  # inner products of columns that need no further orthonormalisation
SAFE = 2.0**20  # magnitudes within this need no scaling
POWER_ITERS = 2  # by default
INVERSE_STEPS = 4  # towards the smallest eigenvalue, which may be overestimated a little
FIRST_RANK = 64  # first guess under a tolerance; doubled until it is met
Triplets = tuple[Tensor, Tensor, Tensor]
COMPUTE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEED = 0  # of the sketch when no generator is given


def randomized_svd(
    A: Tensor,
    rank: int | None = None,
    *,
    tol: float | None = None,
    oversample: int | None = None,
    power_iters: int | None = None,
    compute_dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Triplets:
    """Compute the leading singular triplets of A [..., m, n].

    -> U [..., m, k], S [..., k], Vh [..., k, n].

    Give rank, or tol: the smallest rank whose relative Frobenius error is at most tol (for a batch,
    the largest of these). oversample: extra sketch columns, default max(32, rank / 4). power_iters:
    default 2; the error is then within 1 % of the optimum for spectra that fall like i^-0.5 or
    faster. compute_dtype: float32 or float64 throughout, or a 16-bit type for all products but the
    last two, which bring back most of what the first ones round away. One sketch per shape is drawn
    from generator, on the CPU (seed 0 by default), and shared by the batch, so that devices agree;
    a batch gives the bits of its members one by one (on the CPU).

    Results have A's dtype (float32 for 16-bit input). Signs: in every column of U the entry of
    largest magnitude is positive. Raises ValueError for a wrong shape, rank or tolerance, and
    torch.linalg.LinAlgError for input that is not finite.

    >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> randomized_svd(A, 2)[1].tolist()
    [3.0, 2.0]
    """
    _check(A, rank, tol)
    _check_options(oversample, power_iters, compute_dtype)
    generator = generator or torch.Generator().manual_seed(SEED)
    out = A.dtype if A.dtype in (torch.float32, torch.float64) else torch.float32
    A, scale = _scaled(A.to(out), 1.0 if compute_dtype is torch.float16 else SAFE)
    options = (rank, tol, oversample, power_iters, compute_dtype, generator)
    if A.shape[-2] < A.shape[-1]:
        v, s, uh = _svd(A.mT, *options)
        u, vh = uh.mT, v.mT
    else:
        u, s, vh = _svd(A, *options)
    s = s * scale[..., 0]
    largest = u.abs().argmax(-2, keepdim=True)
    sign = u.gather(-2, largest).sign()  # [..., 1, k]
    sign = torch.where(sign == 0, 1, sign)
    return (u * sign).to(out), s.to(out), (vh * sign.mT).to(out)


def truncated_eigh(
    C: Tensor,
    rank: int,
    *,
    oversample: int | None = None,
    power_iters: int | None = None,
    compute_dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the largest eigenvalues of symmetric positive semi-definite C [..., n, n].

    -> L [..., rank], largest first, and V [..., n, rank]. Arguments, conventions and errors as in
    `randomized_svd`, compute_dtype float32 or float64; one product with C is worth two power
    half-steps of a factor of C.

    >>> L, V = truncated_eigh(torch.diag(torch.tensor([1.0, 4.0, 2.0])), 2)
    >>> L.tolist()
    [4.0, 2.0]
    """
    if C.dim() < 2 or C.shape[-1] != C.shape[-2]:
        raise ValueError(f"C {list(C.shape)}: must be square in its last two dimensions")
    _check(C, rank, None)
    _check_options(oversample, power_iters, compute_dtype)
    out = C.dtype if C.dtype in (torch.float32, torch.float64) else torch.float32
    C, scale = _scaled(C.to(out))
    n = C.shape[-1]
    sketch = _sketch_size(n, rank, oversample)
    iterations = POWER_ITERS if power_iters is None else power_iters
    work = _work_dtype(C, compute_dtype)
    generator = generator or torch.Generator().manual_seed(SEED)
    omega = _gaussian(n, sketch, C, generator).to(work)

    def one(c: Tensor) -> tuple[Tensor, Tensor]:
        c = c.to(work)
        if not sketch_pays(n, n, sketch):
            values, vectors = torch.linalg.eigh(c.double())
            values, vectors = values.flip(-1)[..., :rank], vectors.flip(-1)[..., :rank]
            return values.to(work), vectors.to(work)
        q, shift = c @ omega, torch.zeros_like(c[:, :1, :1])
        for _ in range(iterations):
            q = _well_conditioned(q)
            cq = c @ q
            least = _least_eigenvalue(q.mT @ cq)
            if least is not None:
                shift = torch.maximum(shift, least / 2)
            q = cq - shift * q
        q = orthonormalize(q)
        values, vectors = torch.linalg.eigh((q.mT @ (c @ q)).double())
        vectors = vectors.flip(-1)[..., :rank].to(work)
        return values.flip(-1)[..., :rank].to(work), q @ vectors

    values, vectors = _over_batch(C, one)
    sign = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)).sign()
    values = values.clamp(min=0) * scale[..., 0]
    return values.to(out), (vectors * torch.where(sign == 0, 1, sign)).to(out)


def sketch_pays(m: int, n: int, sketch: int) -> bool:
    """Tell whether a sketch of this many columns beats the exact eigenproblem on the smaller side.

    Measured on 2 cores, 384 to 4096 columns: they break even at a sketch of 0.5 of the smaller side
    for square matrices, 0.4 at 8:3, 0.33 at 4:1, where the Gram matrix costs as much as one pass.

    >>> sketch_pays(4096, 4096, 614), sketch_pays(4096, 4096, 2560), sketch_pays(200, 100, 8)
    (True, False, False)
    """
    small, large = min(m, n), max(m, n)
    return small >= SMALL and sketch <= (0.28 + 0.22 * small / large) * small


def error_estimate(A: Tensor, S: Tensor) -> Tensor:
    """Return the relative Frobenius error of the approximation whose singular values are S.

    A [..., m, n], S [..., k] -> [...]: sqrt(1 - sum S² / ‖A‖²), exact for U, S, Vh of
    `randomized_svd` because Vh is the projection of A; float32 resolves it down to about 3e-4.
    """
    scaled, scale = _scaled(A.double())
    total = scaled.square().sum((-2, -1))
    rest = (total - (S / scale[..., 0]).square().sum(-1)).clamp(min=0)
    return torch.where(total > 0, rest / total, 0).sqrt()


def orthonormalize(Y: Tensor) -> Tensor:
    """Return Q [b, m, l] with orthonormal columns and, where Y [b, m, l] has full rank, its span.

    CholeskyQR2 on normalised columns; where its second Gram matrix shows ill-conditioning, shifted
    CholeskyQR3 (arXiv 1809.11085, with a practical shift); where that fails too, Householder.
    """
    Y = _normalize(Y)
    q, good = _cholesky_qr(Y, shifted=False)
    if bool(good.all()):
        return q
    for index in torch.nonzero(~good).flatten().tolist():
        again, good_again = _cholesky_qr(Y[index : index + 1], shifted=True)
        if bool(good_again.all()):
            q[index] = again[0]
        else:
            q[index] = torch.linalg.qr(Y[index])[0]
    return q


def _normalize(Y: Tensor) -> Tensor:
    norms = Y.norm(dim=-2, keepdim=True)
    return Y / torch.where(norms > 0, norms, 1)


def _well_conditioned(Y: Tensor) -> Tensor:
    """Return a basis of Y's span [b, m, l] good enough for another product: one Cholesky pass.

    Its columns are orthonormal to about cond(Y)² eps; the diagonal of the factor tells when that
    is too much.
    """
    Y = _normalize(Y)
    factor, info = torch.linalg.cholesky_ex(Y.mT @ Y)
    smallest = factor.diagonal(dim1=-2, dim2=-1).amin(-1)
    if not bool(((info == 0) & (smallest > LEAST_DIAGONAL)).all()):
        return orthonormalize(Y)
    basis: Tensor = torch.linalg.solve_triangular(factor.mT, Y, upper=True, left=False)
    return basis


def _cholesky_qr(Y: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """Orthonormalise by 2 Cholesky passes, or 3 with a shifted first; tell for which it worked.

    The Gram matrix of the last pass must be near the identity: then that pass leaves only rounding.
    """
    identity = torch.eye(Y.shape[-1], dtype=Y.dtype, device=Y.device)
    good = torch.ones(Y.shape[0], dtype=torch.bool, device=Y.device)
    passes = 3 if shifted else 2
    for step in range(passes):
        gram = Y.mT @ Y
        if shifted and step == 0:
            gram = gram + 4 * Y.shape[-1] * torch.finfo(Y.dtype).eps * identity
        elif step == passes - 1:
            good &= (gram - identity).abs().amax((-2, -1)) < 0.1 / math.sqrt(Y.shape[-1])
        factor, info = torch.linalg.cholesky_ex(gram)
        good &= info == 0
        if not bool(good.any()):
            break
        Y = torch.linalg.solve_triangular(factor.mT, Y, upper=True, left=False)
    return Y, good


def _svd(
    A: Tensor,
    rank: int | None,
    tol: float | None,
    oversample: int | None,
    power_iters: int | None,
    compute_dtype: torch.dtype,
    generator: torch.Generator,
) -> Triplets:
    """Decompose tall A [..., m, n], m >= n."""
    m, n = A.shape[-2:]
    work = _work_dtype(A, compute_dtype)

    def attempt(k: int, wanted: int | None) -> Triplets:
        sketch = _sketch_size(n, k, oversample)
        if not sketch_pays(m, n, sketch):
            found: Triplets = _over_batch(A, lambda a: _exact(a, k, work))
            return found
        omega = _gaussian(n, sketch, A, generator)
        iterations = POWER_ITERS if power_iters is None else power_iters
        found = _over_batch(
            A, lambda a: _sketched(a, omega, iterations, wanted, compute_dtype, work)
        )
        return found

    if rank is not None:
        return attempt(rank, rank)
    assert tol is not None
    total = A.double().square().sum((-2, -1))[..., None]
    k = min(n, FIRST_RANK)
    while True:
        found = attempt(k, None)
        tail = _tails(A, found)
        counts = (tail > tol * tol * total).sum(-1)
        needed = int(counts.max()) + 1 if counts.numel() else 1
        if needed <= found[1].shape[-1] or found[1].shape[-1] == n:
            return _cut(found, min(needed, n))
        k = min(n, 2 * k)


def _tails(A: Tensor, usv: Triplets) -> Tensor:
    """Return ‖A - U_k S_k Vh_k‖² [..., l] float64 at every rank k up to all l triplets.

    What all of them leave is measured: ‖A‖² - Σ s² cancels below the root of the rounding.
    """
    u, s, vh = usv
    missing = A.to(u) - (u * s[..., None, :]) @ vh
    left: Tensor = torch.linalg.vector_norm(missing, dim=(-2, -1), dtype=torch.float64).square()
    sums = s.double().square().flip(-1).cumsum(-1).flip(-1)  # of s_k and all smaller ones
    rest = torch.cat([sums[..., 1:], torch.zeros_like(sums[..., :1])], -1)
    return left[..., None] + rest


def _cut(usv: Triplets, rank: int | None) -> Triplets:
    u, s, vh = usv
    return u[..., :rank], s[..., :rank], vh[..., :rank, :]


def _exact(a: Tensor, rank: int, work: torch.dtype) -> Triplets:
    """Decompose tall a [b, m, n] by the eigenproblem of its Gram matrix, in float64.

    Accurate to float32's rounding of the largest singular value; float64 wants the plain SVD.
    """
    if work == torch.float64:
        return _cut(torch.linalg.svd(a.double(), full_matrices=False), rank)
    a64 = a.double()
    v = torch.linalg.eigh(a64.mT @ a64)[1].flip(-1)[..., :rank]
    av = a64 @ v
    s = av.norm(dim=-2)
    return orthonormalize_ordered(av).to(work), s.to(work), v.mT.to(work)


def orthonormalize_ordered(Y: Tensor) -> Tensor:
    """Orthonormalise nearly orthogonal columns of falling norm, [b, m, l], keeping their signs."""
    q = _normalize(Y)
    identity = torch.eye(Y.shape[-1], dtype=Y.dtype, device=Y.device)
    if bool(((q.mT @ q - identity).abs() < ORTHOGONAL).all()):
        return q
    q = orthonormalize(Y)
    sign = (q * Y).sum(-2, keepdim=True).sign()
    return q * torch.where(sign == 0, 1, sign)


def _sketched(
    a: Tensor,
    omega: Tensor,
    iterations: int,
    wanted: int | None,
    compute_dtype: torch.dtype,
    work: torch.dtype,
) -> Triplets:
    """Decompose tall a [b, m, n] in the range of a sketch omega [n, l], into `wanted` triplets."""
    full = a.to(work)
    low = full.to(compute_dtype) if compute_dtype.itemsize == 2 else full

    def product(left: Tensor, right: Tensor) -> Tensor:
        right = right.to(left.dtype)
        if left.shape[0] == 1:  # a batch of one transposed bfloat16 matrix is 7 times slower
            return (left[0] @ right.reshape(right.shape[-2:])).to(work)[None]
        return (left @ right).to(work)

    q, shift = product(low, omega), torch.zeros_like(full[:, :1, :1])
    for remaining in reversed(range(iterations)):
        q = _well_conditioned(q)
        z = product(low.mT, q)
        scale = _largest_norm(z)
        z = z / scale  # float16 holds its product with A
        least = _least_eigenvalue(z.mT @ z)
        if least is None:
            q = product(low if remaining else full, _well_conditioned(z))
        else:
            shift = torch.maximum(shift, scale.square() * least / 2)
            q = product(low if remaining else full, z) - shift / scale * q
    q = orthonormalize(q)
    b = q.mT @ full  # [b, l, n]
    if work == torch.float64:
        u, s, vh = torch.linalg.svd(b, full_matrices=False)
        return _cut((q @ u, s, vh), wanted)
    b64 = b.double()
    rotation = torch.linalg.eigh(b64 @ b64.mT)[1].flip(-1)[..., :wanted]
    vs = b64.mT @ rotation  # columns V_i s_i
    s = vs.norm(dim=-2)
    v = orthonormalize_ordered(vs)
    return q @ rotation.to(work), s.to(work), v.mT.to(work)


def _largest_norm(Y: Tensor) -> Tensor:
    """Return the largest norm of a column of Y [b, m, l], [b, 1, 1], or 1 where all are zero."""
    norm = Y.norm(dim=-2, keepdim=True).amax(-1, keepdim=True)
    return torch.where(norm > 0, norm, 1)


def _least_eigenvalue(gram: Tensor) -> Tensor | None:
    """Estimate the smallest eigenvalues, [b, 1, 1], of positive definite matrices [b, l, l].

    By inverse iteration: not below them. None where one is so ill-conditioned that to apply a
    matrix twice without a new basis in between would lose the smallest directions to rounding.

    Half of it is the shift: A A' - s I with s at most half of what the sketch misses separates the
    wanted directions better than A A' does (arXiv 2404.09276), and the basis underestimates what it
    misses.
    """
    factor, info = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    least = 10 * torch.finfo(gram.dtype).eps ** 0.5 * diagonal.amax(-1)
    if not bool(((info == 0) & (diagonal.amin(-1) > least)).all()):
        return None
    x = gram.new_full((*gram.shape[:-1], 1), gram.shape[-1] ** -0.5)
    norm = torch.ones_like(x[:, :1])
    for _ in range(INVERSE_STEPS):
        x = torch.cholesky_solve(x, factor)
        norm = x.norm(dim=-2, keepdim=True)
        x = x / norm
    return 1 / norm


def _over_batch(A: Tensor, one: Callable[[Tensor], tuple[Tensor, ...]]) -> Any:
    """Apply a function of [b, m, n]: to the whole batch on a GPU, matrix by matrix on the CPU.

    On the CPU single products already use all cores, and a batch then gives its members' bits.
    """
    flat = A.reshape(-1, *A.shape[-2:])
    if A.device.type == "cpu" and len(flat):
        parts = [one(flat[i : i + 1]) for i in range(len(flat))]
        results = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    else:
        results = list(one(flat))
    return tuple(r.reshape(*A.shape[:-2], *r.shape[1:]) for r in results)


def _gaussian(rows: int, columns: int, like: Tensor, generator: torch.Generator) -> Tensor:
    work = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.randn(rows, columns, generator=generator, dtype=work).to(like.device)


def _sketch_size(n: int, rank: int, oversample: int | None) -> int:
    return min(n, rank + (max(32, rank // 4) if oversample is None else oversample))


def _work_dtype(A: Tensor, compute_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in (A.dtype, compute_dtype) else torch.float32


def _scaled(A: Tensor, safe: float = SAFE) -> tuple[Tensor, Tensor]:
    """Divide every matrix whose squares could overflow or vanish by its largest magnitude.

    A [..., m, n] -> A / scale and scale [..., 1, 1]; magnitudes within safe of 1 stay (float16
    products want them all scaled). Raises LinAlgError where A is not finite.
    """
    least, most = torch.aminmax(A.flatten(-2), dim=-1)
    largest = torch.maximum(most, -least)[..., None, None]
    if not bool(torch.isfinite(largest).all()):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            "A holds NaN or infinity"
        )
    fine = (largest == 0) | ((largest > 1 / safe) & (largest < safe))
    scale = torch.where(fine, 1, largest)
    return (A if bool(fine.all()) else A / scale), scale


def _check(A: Tensor, rank: int | None, tol: float | None) -> None:
    if A.dim() < 2 or not A.is_floating_point() or 0 in A.shape[-2:]:
        raise ValueError(f"A {list(A.shape)} {A.dtype}: must be floating [..., m, n], m, n >= 1")
    if (rank is None) == (tol is None):
        raise ValueError("give either rank or tol")
    if rank is not None and not 1 <= rank <= min(A.shape[-2:]):
        raise ValueError(f"rank {rank} of A {list(A.shape)}: must be in [1, {min(A.shape[-2:])}]")
    if tol is not None and not 0 < tol < 1:
        raise ValueError(f"tol {tol}: a relative error, must be in (0, 1)")


def _check_options(
    oversample: int | None, power_iters: int | None, compute_dtype: torch.dtype
) -> None:
    for name, value in (("oversample", oversample), ("power_iters", power_iters)):
        if value is not None and value < 0:
            raise ValueError(f"{name} {value}: must not be negative")
    if compute_dtype not in COMPUTE:
        raise ValueError(f"compute_dtype {compute_dtype}: must be one of {COMPUTE}")
