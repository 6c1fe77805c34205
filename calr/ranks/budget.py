"""What layers may store together, and what each choice of a rank costs of it."""

import math
from dataclasses import dataclass, replace

from calr.errors import CalrError
from calr.methods import resolve
from calr.model import Structure
from calr.recipe import Recipe
from calr_kernels.layout import Layout, parameters

Ranks = dict[str, int | None]  # by layer; None leaves it dense


@dataclass(frozen=True)
class Shape:
    """A linear layer to allocate for: weight [out_features, in_features], ranks from least_rank."""

    name: str
    out_features: int
    in_features: int
    least_rank: int = 1

    @property
    def dense(self) -> int:
        """Parameters of the dense weight."""
        return self.out_features * self.in_features

    def cost(self, layout: Layout, rank: int | None) -> int:
        """Count the parameters at a rank, or dense for None."""
        if rank is None:
            return self.dense
        return parameters(layout, self.out_features, self.in_features, rank)

    def ranks(self, layout: Layout, step: int) -> list[int | None]:
        """List the ranks worth having, ascending, then None for dense.

        Multiples of step, not below least_rank, that take less space than the dense weight: pivots
        are as large as two numbers of 16 bits.

        >>> Shape("q", 32, 32).ranks("pivoted", 8)
        [8, 16, 24, None]
        """
        found: list[int | None] = []
        first = -(-self.least_rank // step) * step
        for rank in range(first, min(self.out_features, self.in_features) + 1, step):
            pivots = 2 * rank if layout == "pivoted" else 0
            if self.cost(layout, rank) + pivots >= self.dense:
                break
            found.append(rank)
        return [*found, None]


@dataclass(frozen=True)
class Budget:
    """How many parameters some layers may keep together.

    shapes: the layers that may be truncated. keep: the fraction that stays of their parameters and
    of `fixed` others, those of layers that stay dense. layout and step: how a rank is stored, and
    what it is a multiple of. Raises CalrError when even the smallest ranks keep more.
    """

    shapes: tuple[Shape, ...]
    keep: float
    layout: Layout = "pivoted"
    step: int = 8
    fixed: int = 0

    def __post_init__(self) -> None:
        """Refuse a budget that no ranks meet."""
        if self.keep * self.total <= self.fixed:
            raise CalrError(
                f"keep={self.keep} is unreachable: the skipped layers alone hold "
                f"{self.fixed / self.total:.4f} of the linear parameters; skip less or raise keep"
            )
        least = self.fixed + sum(map(min, self.costs()))
        if least > self.parameters + self.fixed:
            raise CalrError(
                f"keep={self.keep:.4g} is unreachable: the smallest ranks with this rank_step and "
                f"skip keep {least / self.total:.4f}; raise keep, lower rank_step or skip less"
            )

    @classmethod
    def of(cls, structure: Structure, recipe: Recipe) -> "Budget":
        """Return what a recipe leaves to the layers of a model that it does not skip.

        Raises CalrError when it skips all of them, too.
        """
        method = resolve(recipe.method, recipe.method_options)
        shapes = tuple(
            Shape(x.name, x.out_features, x.in_features, method.least_rank(x))
            for x in structure.layers
            if not x.skipped
        )
        if not shapes:
            raise CalrError("skip: matches every linear layer, so there is nothing to compress")
        fixed = structure.linear_parameters - sum(shape.dense for shape in shapes)
        return cls(shapes, recipe.fraction, recipe.layout, recipe.rank_step, fixed)

    @property
    def total(self) -> int:
        """What `keep` is a fraction of."""
        return self.fixed + sum(shape.dense for shape in self.shapes)

    @property
    def parameters(self) -> int:
        """What the shapes may store."""
        return math.floor(self.keep * self.total + 1e-6) - self.fixed

    @property
    def share(self) -> float:
        """The fraction that the shapes alone may keep of theirs."""
        return min(1.0, (self.keep * self.total - self.fixed) / (self.total - self.fixed))

    def choices(self) -> list[list[int | None]]:
        """List the ranks that each shape may have."""
        return [shape.ranks(self.layout, self.step) for shape in self.shapes]

    def costs(self) -> list[list[int]]:
        """List what these cost."""
        return [
            [shape.cost(self.layout, rank) for rank in ranks]
            for shape, ranks in zip(self.shapes, self.choices(), strict=True)
        ]

    def named(self, at: list[int]) -> Ranks:
        """Turn the place of a choice among each shape's into ranks by name."""
        pairs = zip(self.shapes, self.choices(), at, strict=True)
        return {shape.name: ranks[i] for shape, ranks, i in pairs}

    def within(self, shapes: tuple[Shape, ...], keep: float) -> "Budget":
        """Return the budget of some shapes alone, which keep another fraction."""
        return replace(self, shapes=shapes, keep=keep, fixed=0)
