"""Parameters whose values are in files, read when they are used: a model larger than memory."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[], Tensor]  # returns values, on the CPU


class Absent(nn.Parameter):
    """Stands for a parameter in a file: of its shape, dtype and device, one number in memory.

    That number is NaN (or 255, of records), so that whoever computes with it is found out.
    """

    read: Read

    @staticmethod
    def of(like: Tensor, read: Read, device: torch.device | str) -> "Absent":
        """Stand for values that read() gives, like a tensor that may be on the meta device."""
        filler = float("nan") if like.is_floating_point() else 255
        one = torch.full((), filler, dtype=like.dtype, device=device)
        made: Absent = torch.Tensor._make_subclass(Absent, one.expand(like.shape), False)
        made.read = read
        return made

    def like(self, dtype: torch.dtype) -> "Absent":
        """Stand for the same values in another dtype."""
        return Absent.of(
            torch.empty(self.shape, dtype=dtype, device="meta"), self.read, self.device
        )


def present(tensor: Tensor) -> Tensor:
    """Return a tensor's values, read where they are absent, detached."""
    if not isinstance(tensor, Absent):
        return tensor.detach()
    values = tensor.read()
    if values.shape != tensor.shape:
        raise ValueError(f"{list(values.shape)} was read in the place of {list(tensor.shape)}")
    return values.to(tensor.device, tensor.dtype)


def absent(module: nn.Module) -> bool:
    """Tell whether a parameter of a module is absent."""
    return any(isinstance(p, Absent) for p in module.parameters())


@contextmanager
def resident(*modules: nn.Module) -> Iterator[None]:
    """Have the parameters of modules in memory, frozen; shared ones once."""
    read: dict[int, nn.Parameter] = {}
    places: list[tuple[nn.Module, str, Absent]] = []
    for module in {id(m): m for root in modules for m in root.modules()}.values():
        for name, p in module._parameters.items():
            if isinstance(p, Absent):
                places.append((module, name, p))
    try:
        for module, name, p in places:
            if id(p) not in read:
                read[id(p)] = nn.Parameter(present(p), requires_grad=False)
            module._parameters[name] = read[id(p)]
        yield
    finally:
        for module, name, p in places:
            if module._parameters.get(name) is read.get(id(p), p):
                module._parameters[name] = p


def read_when_called(module: nn.Module) -> None:
    """Have a module's absent parameters, and those inside of it, in memory while it runs.

    What autograd keeps for the backward pass stays in memory for it.
    """
    forward = module.forward

    @functools.wraps(forward)
    def reading(*args: Any, **kwargs: Any) -> Any:
        with resident(module):
            return forward(*args, **kwargs)

    module.forward = reading
