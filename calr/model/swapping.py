"""Change a model for a while: other modules in its places, hooks, evaluation mode, gradients."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

M = TypeVar("M", bound=nn.Module)


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Replace a submodule and return the one that was there."""
    old = model.get_submodule(name)
    model.set_submodule(name, module)
    return old


class Swapped(Generic[M]):
    """Puts modules into a model and, at the end of a `with` block, those back that were there.

    now: what was put, by name.
    """

    def __init__(self, model: nn.Module, modules: dict[str, M] | None = None) -> None:
        self.model, self._first = model, modules or {}
        self.now: dict[str, M] = {}
        self._before: dict[str, nn.Module] = {}

    def put(self, name: str, module: M) -> None:
        """Put a module into the place of another."""
        self._before[name] = set_submodule(self.model, name, module)
        self.now[name] = module

    def __enter__(self) -> "Swapped[M]":
        for name, module in self._first.items():
            self.put(name, module)
        return self

    def __exit__(self, *_: object) -> None:
        for name, module in self._before.items():
            set_submodule(self.model, name, module)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks, registered for what happens in the block, at its end."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode, and then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def requiring(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Have gradients for these parameters of a model alone; afterwards as before, without them."""
    required = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in required:
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in parameters:
            p.grad = None
        for p, flag in required:
            p.requires_grad_(flag)
