"""What quantised matrices may store together, and who gets which form."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from calr.errors import CalrError
from calr.integrations.experts import all_experts
from calr.model import Matrix, Structure, matrices, tensor_bytes, weight_of
from calr.ranks import knapsack
from calr.recipe import Recipe, Target
from calr_kernels.forms import LEAST_GROUP, Form, Levels, ScaleDtype

BEST_LEVELS: dict[int, Levels] = {  # that err least
    3: "table", 4: "table", 5: "formula", 6: "formula", 8: "uniform"
}  # fmt: skip
PRICED = 4  # bits at which a matrix is really rounded to learn what its rounding costs
# squared error of levels over that of the table at 4 bits, Gaussian groups (bench/rounding.py)
RATIOS: dict[tuple[int, Levels], float] = {
    (3, "table"): 4.35,
    (3, "uniform"): 4.89,
    (4, "table"): 1.0,
    (4, "uniform"): 1.19,
    (5, "formula"): 0.237,
    (5, "uniform"): 0.30,
    (6, "formula"): 0.0595,
    (6, "uniform"): 0.0746,
    (8, "uniform"): 0.0046,
}
# with another scale group it grows as at PRICED bits, to this power (bench/LOG.md, 2026-11-30)
POWERS = {3: 0.8, 4: 1.0, 5: 1.1, 6: 1.1, 8: 1.1}
DOUBLED = 1.15  # times the error of scale groups half as long, where weights are Gaussian
CORRECTIVE_RANKS = (0, 8, 16, 32, 64)  # of a linear layer's corrective path

Forms = dict[str, Form | None]  # by matrix; None leaves it as it is


class Price(NamedTuple):
    """What rounding a matrix to PRICED bits costs.

    losses: in the usual scale group, with each of its corrective ranks, in nats; growth: with each
    of the groups that it may have (`ByteBudget.groups`), over that.
    """

    losses: Sequence[float]
    growth: Sequence[float]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Price":
        """Make one of the tensors, by these names, that are kept of it."""
        return cls(tensors["losses"].tolist(), tensors["growth"].tolist())


@dataclass(frozen=True)
class Allowed:
    """The forms that a budget may choose, by default all that serve this package.

    levels: by the bits that there are; padded: whether a row's last scale group may be;
    embeddings: whether they and lm_head are quantised; fused: whether the layers of one input have
    one width.
    """

    levels: Mapping[int, Levels]
    scale_dtype: ScaleDtype = "float16"
    padded: bool = False
    embeddings: bool = True
    fused: bool = False
    corrective_ranks: tuple[int, ...] = CORRECTIVE_RANKS
    corrective_bits: int = 8


ANY = Allowed(BEST_LEVELS, padded=True)
HELD: dict[Target, Allowed] = {
    "gguf": Allowed({4: "table", 5: "uniform", 8: "uniform"}),  # IQ4_NL, Q5_0, Q8_0
    "compressed-tensors": Allowed(
        {4: "uniform", 8: "uniform"},
        scale_dtype="bfloat16",
        embeddings=False,
        fused=True,
        corrective_ranks=(0, 16),  # one in all layers: no adapter's factors are padded
        corrective_bits=16,
    ),
}


def fitting_group(scale_group: int, columns: int) -> int:
    """Return the scale group of rows of some columns: the next smaller that divides them, at least
    32."""
    while scale_group > LEAST_GROUP and columns % scale_group:
        scale_group -= LEAST_GROUP
    return scale_group


@dataclass(frozen=True)
class ByteBudget:
    """How many bytes a model's tensors may take.

    matrices: those that may be quantised; fixed: bytes of all others; total: bytes allowed;
    element: bytes of a number that is not quantised; parameters: of the whole model; widths:
    bits that a matrix may have, all that are allowed where none is named; scale_groups: that it may
    have, the usual one first. Raises CalrError for a width that is not allowed, and for a budget
    below what the smallest forms take.
    """

    matrices: tuple[Matrix, ...]
    fixed: int
    total: int
    element: int
    parameters: int
    scale_groups: tuple[int, ...] = (64,)
    allowed: Allowed = ANY
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a budget that no forms meet."""
        for bits in self.widths:
            if bits not in self.allowed.levels:
                there = ", ".join(map(str, self.allowed.levels))
                raise CalrError(f"widths={bits}: must be of {there} bits")
        if self.smallest > self.total:
            raise CalrError(
                f"{self.total / 1e6:.3g} MB ({self.bits:.2f} bits per parameter): is below "
                f"the {self.smallest / 1e6:.3g} MB "
                f"({8 * self.smallest / self.parameters:.2f} bits) that the smallest forms take; "
                "raise bits or size"
            )

    @property
    def smallest(self) -> int:
        """Bytes of the smallest model that the forms allow."""
        return self.fixed + sum(map(min, self.costs()))

    @property
    def bits(self) -> float:
        """The budget, per parameter of the whole model."""
        return 8 * self.total / self.parameters

    @cached_property
    def bundles(self) -> list[tuple[Matrix, ...]]:
        """The matrices, those together that have one width."""
        if not self.allowed.fused:
            return [(matrix,) for matrix in self.matrices]
        by_input = groupby(self.matrices, lambda m: m.name if m.layer is None else m.layer.group)
        return [tuple(members) for _, members in by_input]

    def choices(self) -> list[list[tuple[Form | None, ...]]]:
        """List the forms that each bundle's matrices may have, None for none."""
        widths = self.widths or tuple(self.allowed.levels)
        return [
            [
                *(forms for bits in widths for forms in self._together(members, bits)),
                (None,) * len(members),
            ]
            for members in self.bundles
        ]

    @property
    def choosable(self) -> list[Matrix]:
        """The matrices that have a choice: the others stay as they are."""
        both = zip(self.bundles, self.choices(), strict=True)
        return [matrix for members, options in both if len(options) > 1 for matrix in members]

    def form(self, bits: int, columns: int) -> Form:
        """Return a width's form in the usual scale group, without a corrective path, for rows of
        some columns."""
        allowed, (usual, *_) = self.allowed, self.groups(columns)
        return Form(bits, allowed.levels[bits], usual, scale_dtype=allowed.scale_dtype)

    def groups(self, columns: int) -> list[int]:
        """List the scale groups that rows of some columns may have, the usual one first."""
        return list(dict.fromkeys(fitting_group(group, columns) for group in self.scale_groups))

    def costs(self) -> list[list[int]]:
        """List the bytes that these take."""
        return [
            [sum(map(self.cost, members, forms)) for forms in options]
            for members, options in zip(self.bundles, self.choices(), strict=True)
        ]

    def cost(self, matrix: Matrix, form: Form | None) -> int:
        """Count the bytes of a matrix in a form."""
        if form is None:
            return matrix.parameters * self.element
        return form.bytes(matrix.out_features, matrix.in_features, self.element)

    def _together(self, members: Sequence[Matrix], bits: int) -> Iterator[tuple[Form, ...]]:
        return product(*(self._forms_of(matrix, bits) for matrix in members))

    def _forms_of(self, matrix: Matrix, bits: int) -> list[Form]:
        allowed = self.allowed
        if matrix.kind != "linear" and not allowed.embeddings:
            return []
        if not allowed.padded and matrix.in_features % LEAST_GROUP:
            return []
        form = replace(self.form(bits, matrix.in_features), corrective_bits=allowed.corrective_bits)
        ranks = [rank for rank in corrective_ranks(matrix) if rank in allowed.corrective_ranks]
        return [
            replace(form, scale_group=group, corrective_rank=rank)
            for group in self.groups(matrix.in_features)
            for rank in ranks
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

    dtype: what is stored of the tensors that are not quantised; by default their own. Raises
    CalrError for a target that has no form for the model's experts.
    """
    mixtures = [name for name, _ in all_experts(model)]
    if recipe.target is not None and mixtures:
        raise CalrError(
            f"target={recipe.target}: has one form for all experts of a block, which calr does not "
            f"write ({mixtures[0]}); leave the target out"
        )
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
    groups, widths = recipe.scale_groups, recipe.widths
    allowed = ANY if recipe.target is None else HELD[recipe.target]
    return ByteBudget(found, others, total, element, parameters, groups, allowed, widths)


def least_loss(budget: ByteBudget, prices: Mapping[str, Price], *, exact: bool = False) -> Forms:
    """Minimise the summed loss of all matrices: a multiple-choice knapsack over their forms.

    Another width than PRICED costs a fixed multiple of the matrix's price. exact: by HiGHS, else by
    Lagrangian bisection.
    """
    priced = RATIOS[PRICED, budget.allowed.levels[PRICED]]

    def loss(matrix: Matrix, form: Form | None) -> float:
        if form is None:
            return 0.0
        price, groups = prices[matrix.name], budget.groups(matrix.in_features)
        loss = price.losses[corrective_ranks(matrix).index(form.corrective_rank)]
        growth = math.pow(price.growth[groups.index(form.scale_group)], POWERS[form.bits])
        return loss * growth * RATIOS[form.bits, form.levels] / priced

    choices = budget.choices()
    values = [
        np.array([sum(map(loss, members, forms)) for forms in options])
        for members, options in zip(budget.bundles, choices, strict=True)
    ]
    at = knapsack.solve(budget.costs(), values, budget.total - budget.fixed, exact=exact)
    chosen = zip(budget.bundles, choices, at, strict=True)
    return {
        matrix.name: form
        for members, options, i in chosen
        for matrix, form in zip(members, options[i], strict=True)
    }


def even(budget: ByteBudget) -> Forms:
    """Return nearly the same width for every matrix: what a plan shows before calibration."""
    prices = {}
    for matrix in budget.matrices:
        usual, *others = budget.groups(matrix.in_features)
        growth = [1.0, *(math.pow(DOUBLED, math.log2(group / usual)) for group in others)]
        losses = [float(matrix.parameters)] * len(CORRECTIVE_RANKS)
        prices[matrix.name] = Price(losses, growth)
    return least_loss(budget, prices)


def parse_size(size: str, name: str = "size") -> int:
    """Read "90MB" or "1.5GB" (powers of ten), or a plain number of bytes.

    name: of the argument, for the CalrError that refuses another.

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
        raise CalrError(f"{name}={size!r}: must be like 90MB or 1.5GB")
    return int(count)
