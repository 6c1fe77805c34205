"""Batched randomized SVD and truncated eigendecomposition.

A Gaussian sketch (Halko, Martinsson & Tropp, arXiv 0909.4061), power iterations with dynamic
shifts (Feng, Yu & Xie, arXiv 2404.09276), bases by CholeskyQR, and one small eigenproblem. Nearly
all work is matrix products, on the CPU and on a GPU alike; finite input never gives a NaN. Where a
sketch does not pay, an exact method is used: `sketch.sketch_pays` is the one place that knows.
"""

import torch
from torch import Tensor

from calr_kernels.orthonormal import orthonormalize, orthonormalize_ordered, well_conditioned
from calr_kernels.sketch import (
    SAFE,
    gaussian,
    over_batch,
    scaled,
    sketch_pays,
    sketch_size,
    work_dtype,
)

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

    For whoever wants a few triplets of large matrices; calr itself wants every layer's whole error
    curve, and takes exact eigenproblems. Results have A's dtype (float32 for 16-bit input). Signs:
    in every column of U the entry of largest magnitude is positive. Raises ValueError for a wrong
    shape, rank or tolerance, and torch.linalg.LinAlgError for input that is not finite.

    >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> randomized_svd(A, 2)[1].tolist()
    [3.0, 2.0]
    """
    _check(A, rank, tol)
    _check_options(oversample, power_iters, compute_dtype)
    generator = generator or torch.Generator().manual_seed(SEED)
    out = A.dtype if A.dtype in (torch.float32, torch.float64) else torch.float32
    A, scale = scaled(A.to(out), 1.0 if compute_dtype is torch.float16 else SAFE)
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
    half-steps of a factor of C. For whoever wants the leading directions of a second moment.

    >>> L, V = truncated_eigh(torch.diag(torch.tensor([1.0, 4.0, 2.0])), 2)
    >>> L.tolist()
    [4.0, 2.0]
    """
    if C.dim() < 2 or C.shape[-1] != C.shape[-2]:
        raise ValueError(f"C {list(C.shape)}: must be square in its last two dimensions")
    _check(C, rank, None)
    _check_options(oversample, power_iters, compute_dtype)
    out = C.dtype if C.dtype in (torch.float32, torch.float64) else torch.float32
    C, scale = scaled(C.to(out))
    n = C.shape[-1]
    sketch = sketch_size(n, rank, oversample)
    iterations = POWER_ITERS if power_iters is None else power_iters
    work = work_dtype(C, compute_dtype)
    generator = generator or torch.Generator().manual_seed(SEED)
    omega = gaussian(n, sketch, C, generator).to(work)

    def one(c: Tensor) -> tuple[Tensor, Tensor]:
        c = c.to(work)
        if not sketch_pays(n, n, sketch):
            values, vectors = torch.linalg.eigh(c.double())
            values, vectors = values.flip(-1)[..., :rank], vectors.flip(-1)[..., :rank]
            return values.to(work), vectors.to(work)
        q, shift = c @ omega, torch.zeros_like(c[:, :1, :1])
        for _ in range(iterations):
            q = well_conditioned(q)
            cq = c @ q
            least = _least_eigenvalue(q.mT @ cq)
            if least is not None:
                shift = torch.maximum(shift, least / 2)
            q = cq - shift * q
        q = orthonormalize(q)
        values, vectors = torch.linalg.eigh((q.mT @ (c @ q)).double())
        vectors = vectors.flip(-1)[..., :rank].to(work)
        return values.flip(-1)[..., :rank].to(work), q @ vectors

    values, vectors = over_batch(C, one)
    sign = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)).sign()
    values = values.clamp(min=0) * scale[..., 0]
    return values.to(out), (vectors * torch.where(sign == 0, 1, sign)).to(out)


def error_estimate(A: Tensor, S: Tensor) -> Tensor:
    """Return the relative Frobenius error of the approximation whose singular values are S.

    A [..., m, n], S [..., k] -> [...]: sqrt(1 - sum S² / ‖A‖²), exact for U, S, Vh of
    `randomized_svd` because Vh is the projection of A; float32 resolves it down to about 3e-4.
    """
    wide, scale = scaled(A.double())
    total = wide.square().sum((-2, -1))
    rest = (total - (S / scale[..., 0]).square().sum(-1)).clamp(min=0)
    return torch.where(total > 0, rest / total, 0).sqrt()


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
    work = work_dtype(A, compute_dtype)

    def attempt(k: int, wanted: int | None) -> Triplets:
        sketch = sketch_size(n, k, oversample)
        if not sketch_pays(m, n, sketch):
            found: Triplets = over_batch(A, lambda a: _exact(a, k, work))
            return found
        omega = gaussian(n, sketch, A, generator)
        iterations = POWER_ITERS if power_iters is None else power_iters
        found = over_batch(
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
    """Decompose tall a [b, m, n] by the eigenproblem of its Gram matrix.

    On a CPU in float32 where what is left, measured, shows that this is enough, else in float64,
    which is accurate to float32's rounding of the largest singular value. Of a float64 matrix: the
    plain SVD.
    """
    if work == torch.float64:
        return _cut(torch.linalg.svd(a.double(), full_matrices=False), rank)
    if a.device.type == "cpu" and rank < a.shape[-1]:
        found, smallest = _by_gram(a, rank)
        if _enough(a, found[1], smallest):
            return found
    u, s, vh = _by_gram(a.double(), rank)[0]
    return u.to(work), s.to(work), vh.to(work)


def _by_gram(a: Tensor, rank: int) -> tuple[Triplets, Tensor]:
    """Decompose tall a [b, m, n] by its Gram matrix in a's type: triplets, other eigenvalues."""
    values, vectors = torch.linalg.eigh(a.mT @ a)
    v = vectors.flip(-1)[..., :rank]
    av = a @ v
    s = av.norm(dim=-2).cummin(-1)[0]  # equal ones rise and fall by their rounding
    return (orthonormalize_ordered(av), s, v.mT), values[..., :-rank]


def _enough(a: Tensor, s: Tensor, smallest: Tensor) -> bool:
    """Tell whether singular values s [b, k] of a [b, m, n], found in its own type, leave at most
    1 % more than the best: smallest [b, n - k], the Gram matrix's other eigenvalues, are that
    squared, wherever their rounding, about n eps of the largest, is far below it."""
    left = a.double().square().sum((-2, -1)) - s.double().square().sum(-1)
    tail = smallest.double().clamp(min=0).sum(-1)
    noise = a.shape[-1] * torch.finfo(a.dtype).eps * s.double().square().amax(-1)
    return bool(((left <= 1.01 * tail) & (tail > 100 * noise)).all())


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
        q = well_conditioned(q)
        z = product(low.mT, q)
        scale = _largest_norm(z)
        z = z / scale  # float16 holds its product with A
        least = _least_eigenvalue(z.mT @ z)
        if least is None:
            q = product(low if remaining else full, well_conditioned(z))
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
