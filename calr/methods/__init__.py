"""Decompositions of one weight matrix: one method, one file, one frozen config.

Every file here defines `Config`, a frozen dataclass of the method's options, `decompose(weight,
moments, config) -> Decomposition`, a pure function on tensors, and `MOMENTS`, the statistics that
it reads. Adding a method is adding a file.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable

from calr.errors import CalrError
from calr.methods.decomposition import Decomposition, Moments

Decompose = Callable[..., Decomposition]


def names() -> list[str]:
    """List the methods by name.

    >>> "erc_svd" in names()
    True
    """
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in modules if name != "decomposition")


def resolve(name: str, options: dict[str, float]) -> tuple[Decompose, frozenset[str]]:
    """Return `decompose(weight, moments)` with its options bound, and the moments it needs.

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
    return functools.partial(module.decompose, config=config), module.MOMENTS


__all__ = ["Decomposition", "Moments", "names", "resolve"]
