"""What sketching methods share: when a sketch pays, how large it is, scaling, batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALL = 256  # rows and columns below which an exact decomposition takes a few milliseconds
SAFE = 2.0**20  # magnitudes within this need no scaling


def sketch_pays(m: int, n: int, sketch: int) -> bool:
    """Tell whether a sketch of this many columns beats the exact eigenproblem on the smaller side.

    Measured on 2 cores, 384 to 4096 columns: they break even at a sketch of 0.5 of the smaller side
    for square matrices, 0.4 at 8:3, 0.33 at 4:1, where the Gram matrix costs as much as one pass.

    >>> sketch_pays(4096, 4096, 614), sketch_pays(4096, 4096, 2560), sketch_pays(200, 100, 8)
    (True, False, False)
    """
    small, large = min(m, n), max(m, n)
    return small >= SMALL and sketch <= (0.28 + 0.22 * small / large) * small


def sketch_size(n: int, rank: int, oversample: int | None) -> int:
    return min(n, rank + (max(32, rank // 4) if oversample is None else oversample))


def gaussian(rows: int, columns: int, like: Tensor, generator: torch.Generator) -> Tensor:
    work = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.randn(rows, columns, generator=generator, dtype=work).to(like.device)


def work_dtype(A: Tensor, compute_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in (A.dtype, compute_dtype) else torch.float32


def scaled(A: Tensor, safe: float = SAFE) -> tuple[Tensor, Tensor]:
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


def over_batch(A: Tensor, one: Callable[[Tensor], tuple[Tensor, ...]]) -> Any:
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
