"""Decompositions of one weight matrix: one method, one file, one frozen config.

Every file here defines `Config`, a frozen dataclass of the method's options, `decompose(weight,
moments, config) -> Decomposition`, a pure function on tensors, `NEEDS`, the statistics that it
reads, and, where not every rank can be made, `least_rank(N, K, config)`; ORDERED = False where the
factors of a smaller rank are not the first terms of those of a larger. Adding a method is adding a
file.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from calr.errors import CalrError
from calr.methods.decomposition import Decomposition, Moments
from calr.model import Layer
from calr.recipe import Recipe


@dataclass(frozen=True)
class Method:
    """A method with its options bound.

    decompose(weight [N, K], moments) -> Decomposition; needs names the fields of Moments that it
    reads; ordered: factors may be cut.
    """

    decompose: Callable[[Tensor, Moments], Decomposition]
    needs: frozenset[str]
    ordered: bool
    _least_rank: Callable[[int, int], int]

    def least_rank(self, layer: Layer) -> int:
        """Return the smallest rank that it can make of a layer."""
        return self._least_rank(layer.out_features, layer.in_features)

    @property
    def needs_outputs(self) -> bool:
        """Whether it wants the second moments of the gradients at the outputs."""
        return "output" in self.needs

    def needs_gradients(self, recipe: Recipe) -> bool:
        """Whether it, or the allocation of a recipe that uses it, wants a backward pass.

        Errors of a method that needs second moments at the outputs are in units of loss already;
        those of any other are weighted by a gradient in a global allocation.
        """
        weighted = recipe.allocation == "global" and recipe.sensitivity == "gradient"
        return "gradient" in self.needs or (weighted and not self.needs_outputs)


def names() -> list[str]:
    """List the methods by name.

    >>> "erc_svd" in names()
    True
    """
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in modules if name != "decomposition")


def resolve(name: str, options: dict[str, float]) -> Method:
    """Find a method and bind its options.

    Raises CalrError for an unknown method or option, listing the known ones.
    """
    if name not in names():
        raise CalrError(f"method={name!r}: unknown; choose one of {', '.join(names())}")
    module = importlib.import_module(f"calr.methods.{name}")
    known = [field.name for field in dataclasses.fields(module.Config)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise CalrError(
            f"method_options: {name} has no option {unknown[0]!r}; it knows {known or 'none'}"
        )
    config = module.Config(**options)
    least_rank = getattr(module, "least_rank", lambda n, k, config: 1)
    return Method(
        decompose=functools.partial(module.decompose, config=config),
        needs=module.NEEDS,
        ordered=getattr(module, "ORDERED", True),
        _least_rank=functools.partial(least_rank, config=config),
    )


__all__ = ["Decomposition", "Method", "Moments", "names", "resolve"]
