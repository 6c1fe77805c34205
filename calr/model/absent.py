"""Parameters whose values are in files, read when they are used: a model larger than memory."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[], Tensor]  # returns values, on the CPU
METADATA = {"__get__", "__set__", "__hash__", "detach", "requires_grad_", "untyped_storage"}
METADATA |= {"dim", "element_size", "is_complex", "is_floating_point", "numel", "size"}
METADATA |= {"storage_offset"}  # what may be asked of a tensor without its numbers


class Absent(nn.Parameter):
    """Stands for a parameter in a file: of its shape, dtype and device, no numbers in memory.

    Whoever computes with it gets a RuntimeError.
    """

    read: Read

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer questions about a tensor, and refuse to compute with it."""
        if func.__name__ not in METADATA:
            raise RuntimeError(f"{func.__name__} of a parameter whose values are in a file")
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @staticmethod
    def of(like: Tensor, read: Read, device: torch.device | str) -> "Absent":
        """Stand for values that read() gives, like a tensor that may be on the meta device."""
        one = torch.empty((), dtype=like.dtype, device=device)
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
    return tensor.read().to(tensor.device, tensor.dtype)


def absent(module: nn.Module) -> bool:
    """Tell whether a parameter of a module is absent."""
    return any(isinstance(p, Absent) for p in module.parameters())


@contextmanager
def resident(*modules: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Have the parameters of modules in memory, frozen; shared ones once.

    dtype: what floating ones are meanwhile, those in memory as copies; None: their own. Modules
    that read what they lack when they are called do not meanwhile.
    """
    places, read = _places(modules, dtype), dict[int, nn.Parameter]()
    every = [m for root in modules for m in root.modules()]
    reading = [(vars(m), f) for m in every if type(f := vars(m).get("forward")) is _Reading]
    try:
        _fill(places, read, requires_grad=False, dtype=dtype)
        for own, forward in reading:
            if forward.beneath is None:
                del own["forward"]
            else:
                own["forward"] = forward.beneath
        yield
    finally:
        for own, forward in reading:
            if own.get("forward") is forward.beneath:
                own["forward"] = forward
        for module, name, p in places:
            if module._parameters.get(name) is read.get(id(p), p):
                module._parameters[name] = p


def become_resident(model: nn.Module) -> None:
    """Read the absent parameters of a model for good."""
    _fill(_places([model]), {}, requires_grad=True)


def _places(
    modules: Iterable[nn.Module], dtype: torch.dtype | None = None
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """List where parameters of modules are absent, or of another type."""
    return [
        (module, name, p)
        for module in {id(m): m for root in modules for m in root.modules()}.values()
        for name, p in module._parameters.items()
        if p is not None and (isinstance(p, Absent) or _other(p, dtype))
    ]


def _fill(
    places: list[tuple[nn.Module, str, nn.Parameter]],
    read: dict[int, nn.Parameter],
    *,
    requires_grad: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Put values into places, the same where the same was there; read: by what stood there."""
    for module, name, p in places:
        if id(p) not in read:
            values = present(p).to(dtype) if _other(p, dtype) else present(p)
            read[id(p)] = nn.Parameter(values, requires_grad=requires_grad)
        module._parameters[name] = read[id(p)]


def _other(p: nn.Parameter, dtype: torch.dtype | None) -> bool:
    return dtype is not None and p.is_floating_point() and p.dtype != dtype


class _Reading:
    """A module's forward that has the module's absent parameters in memory while it runs."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._forward = module, module.forward
        self.beneath = vars(module).get("forward")  # None: the class's
        functools.update_wrapper(self, module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with resident(self._module):
            return self._forward(*args, **kwargs)


def read_when_called(module: nn.Module) -> None:
    """Have a module's absent parameters, and those inside of it, in memory while it runs.

    What autograd keeps for the backward pass stays in memory for it.
    """
    module.forward = _Reading(module)
