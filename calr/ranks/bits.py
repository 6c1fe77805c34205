"""What quantised matrices may store together, and who gets which form."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from calr.errors import CalrError
from calr.model import Matrix, Structure, matrices, tensor_bytes, weight_of
from calr.ranks import knapsack
from calr.recipe import Recipe, Target
from calr_kernels.forms import LEAST_GROUP, Form, Levels

# levels of each width that err least, and of those that a target holds
BEST_LEVELS: dict[int, Levels] = {
    3: "table", 4: "table", 5: "formula", 6: "formula", 8: "uniform"
}  # fmt: skip
TARGET_LEVELS: dict[Target, dict[int, Levels]] = {
    "gguf": {4: "table", 5: "uniform", 8: "uniform"}  # IQ4_NL, Q5_0, Q8_0
}
PRICED = 4  # bits at which a matrix is really rounded to learn what its rounding costs
# squared error of levels over that of the table at 4 bits, Gaussian groups (bench/rounding.py)
RATIOS: dict[tuple[int, Levels], float] = {
    (3, "table"): 4.35,
    (4, "table"): 1.0,
    (5, "formula"): 0.237,
    (5, "uniform"): 0.30,
    (6, "formula"): 0.0595,
    (8, "uniform"): 0.0046,
}
CORRECTIVE_RANKS = (0, 8, 16, 32, 64)  # of a linear layer's corrective path

Forms = dict[str, Form | None]  # by matrix; None leaves it as it is


def fitting_form(bits: int, levels: Levels, scale_group: int, columns: int) -> Form:
    """Return the form of rows of some columns.

    A scale group that does not divide them becomes the next smaller that does, at least 32.
    """
    while scale_group > 32 and columns % scale_group:
        scale_group -= 32
    return Form(bits, levels, scale_group)


@dataclass(frozen=True)
class ByteBudget:
    """How many bytes a model's tensors may take.

    matrices: those that may be quantised; fixed: bytes of all others; total: bytes allowed;
    element: bytes of a number that is not quantised; parameters: of the whole model; levels: by
    the bits that are allowed; padded: whether a row's last scale group may be. Raises CalrError for
    a budget below what the smallest forms take.
    """

    matrices: tuple[Matrix, ...]
    fixed: int
    total: int
    element: int
    parameters: int
    scale_group: int = 64
    levels: Mapping[int, Levels] = field(default_factory=lambda: BEST_LEVELS)
    padded: bool = True

    def __post_init__(self) -> None:
        """Refuse a budget that no forms meet."""
        if self.smallest > self.total:
            raise CalrError(
                f"{self.total / 1e6:.3g} MB ({8 * self.total / self.parameters:.2f} bits per "
                f"parameter): is below the {self.smallest / 1e6:.3g} MB "
                f"({8 * self.smallest / self.parameters:.2f} bits) that the smallest forms take; "
                "raise bits or size"
            )

    @property
    def smallest(self) -> int:
        """Bytes of the smallest model that the forms allow."""
        return self.fixed + sum(map(min, self.costs()))

    def choices(self) -> list[list[Form | None]]:
        """List the forms that each matrix may have, None for none."""
        return [[*self._forms_of(matrix), None] for matrix in self.matrices]

    def form(self, bits: int, columns: int) -> Form:
        """Return the form of a width, without a corrective path, for rows of some columns."""
        return fitting_form(bits, self.levels[bits], self.scale_group, columns)

    def _forms_of(self, matrix: Matrix) -> list[Form]:
        if not self.padded and matrix.in_features % LEAST_GROUP:
            return []
        forms = [self.form(bits, matrix.in_features) for bits in self.levels]
        ranks = corrective_ranks(matrix)
        return [replace(form, corrective_rank=rank) for form in forms for rank in ranks]

    def costs(self) -> list[list[int]]:
        """List the bytes that these take."""
        return [
            [
                m.parameters * self.element if f is None else f.bytes(m.out_features, m.in_features)
                for f in forms
            ]
            for m, forms in zip(self.matrices, self.choices(), strict=True)
        ]


def corrective_ranks(matrix: Matrix) -> tuple[int, ...]:
    """Return the ranks that the corrective path of a matrix may have; 0 alone where it has none."""
    smaller = min(matrix.out_features, matrix.in_features)
    few = tuple(rank for rank in CORRECTIVE_RANKS if 4 * rank <= smaller)
    return few if matrix.kind == "linear" else few[:1]


def byte_budget(
    model: PreTrainedModel, structure: Structure, recipe: Recipe, dtype: torch.dtype | None = None
) -> ByteBudget | None:
    """Return what a recipe's bits or size allow a model; None under a budget of parameters.

    dtype: what is stored of the tensors that are not quantised; by default their own.
    """
    if recipe.bits is not None:
        total = math.floor(recipe.bits * structure.model_parameters / 8)
    elif recipe.size is not None:
        total = parse_size(recipe.size)
    else:
        return None
    found = tuple(matrices(model, structure))
    element = (dtype or weight_of(model, structure.layers[0].name).dtype).itemsize
    others = tensor_bytes(model, dtype) - element * sum(m.parameters for m in found)
    parameters = structure.model_parameters
    assert recipe.scale_group is not None
    group, target = recipe.scale_group, recipe.target
    levels = BEST_LEVELS if target is None else TARGET_LEVELS[target]
    return ByteBudget(found, others, total, element, parameters, group, levels, target is None)


def least_loss(
    budget: ByteBudget, prices: Mapping[str, Sequence[float]], *, exact: bool = False
) -> Forms:
    """Minimise the summed loss of all matrices: a multiple-choice knapsack over their forms.

    prices: the losses, in nats, that rounding a matrix to PRICED bits costs with each of its
    corrective ranks; another width costs a fixed multiple of that. exact: by HiGHS, else by
    Lagrangian bisection.
    """
    choices = budget.choices()
    values = [
        np.array([0.0 if f is None else _price(prices[m.name], m, f) for f in forms])
        for m, forms in zip(budget.matrices, choices, strict=True)
    ]
    at = knapsack.solve(budget.costs(), values, budget.total - budget.fixed, exact=exact)
    pairs = zip(budget.matrices, choices, at, strict=True)
    return {matrix.name: forms[i] for matrix, forms, i in pairs}


def _price(prices: Sequence[float], matrix: Matrix, form: Form) -> float:
    rank = corrective_ranks(matrix).index(form.corrective_rank)
    return prices[rank] * RATIOS[form.bits, form.levels]


def even(budget: ByteBudget) -> Forms:
    """Return nearly the same width for every matrix: what a plan shows before calibration."""
    size = len(CORRECTIVE_RANKS)
    return least_loss(budget, {m.name: [float(m.parameters)] * size for m in budget.matrices})


def parse_size(size: str) -> int:
    """Read "90MB" or "1.5GB" (powers of ten), or a plain number of bytes.

    >>> parse_size("90MB"), parse_size("1.5 GB")
    (90000000, 1500000000)
    """
    text, unit = size.strip().upper(), 1.0
    for suffix, scale in (("KB", 1e3), ("MB", 1e6), ("GB", 1e9), ("B", 1.0)):
        if text.endswith(suffix):
            text, unit = text.removesuffix(suffix), scale
            break
    try:
        count = float(text) * unit
    except ValueError:
        count = math.nan
    if not 0 < count < math.inf:
        raise CalrError(f"size={size!r}: must be like 90MB or 1.5GB")
    return int(count)
