"""Whether modules are still what they were when their tensors were looked up."""

import itertools
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from calr_kernels import eligible

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SHARES = 32  # of all that there is to look at: one is looked at with every token
GET: Any = dict.get
VERSION = operator.attrgetter("_version")


class Watch:
    """Modules as they are: classes, forwards, numbers, parts, hooks, where their tensors lie.

    Asked at every token of a model with hundreds of them, whose objects the weights have driven out
    of the cache: it took a tenth of a token's time. So all is flat lists; hooks are looked for when
    one was registered anywhere; and while one generation goes on, what was replaced or written to
    is noticed within SHARES tokens.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._types = list(map(type, self._modules))
        self._hooks = [vars(module)[name] for module in modules for name in HOOKS]
        places: list[tuple[dict[str, Any], str]] = []
        for module in modules:
            own = vars(module)
            numbers = [name for name, value in own.items() if type(value) is float]
            places += [(own, name) for name in ("forward", *numbers)]
            for parts in (module._modules, module._parameters, module._buffers):
                places += [(parts, name) for name in parts]
        self._dicts, self._names = ([place[i] for place in places] for i in (0, 1))
        self._parts = [parts.get(name) for parts, name in places]
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._storages = [tensor.detach() for tensor in self._tensors]  # kept while they are read
        self._places = list(map(Tensor.data_ptr, self._tensors))
        self._versions = list(map(VERSION, self._counted))
        self._shares = itertools.cycle(range(SHARES))
        self._registered = -1  # hooks, anywhere, when these were looked at last

    def hooked(self) -> bool:
        """Tell whether any of the modules has a hook."""
        registered = RemovableHandle.next_id
        if registered == self._registered:
            return False
        found = any(map(eligible.acting, self._hooks))
        if not found:
            self._registered = registered
        return found

    def unchanged(self, whole: bool = True) -> bool:
        """Tell whether all is as it was, hooks apart, or a share of it."""
        own = slice(None) if whole else slice(next(self._shares), None, SHARES)
        found = map(GET, self._dicts[own], self._names[own])
        return (
            list(map(Tensor.data_ptr, self._tensors[own])) == self._places[own]
            and list(map(VERSION, self._counted[own])) == self._versions[own]
            and all(map(operator.is_, found, self._parts[own]))
            and all(map(operator.is_, map(type, self._modules[own]), self._types[own]))
        )
