"""Whether modules are still what they were when their tensors were looked up."""

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """Modules as they are: classes, forwards, parts, hooks, and where their tensors lie.

    Asked at every token of a model with hundreds of them, so that all is flat lists.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._types = list(map(type, self._modules))
        self._hooks = [vars(module)[name] for module in modules for name in HOOKS]
        self._slots: list[tuple[dict[str, Any], str, Any]] = []
        self._tensors: list[Tensor] = []
        for module in modules:
            own = vars(module)
            self._slots.append((own, "forward", own.get("forward")))
            for parts in (module._modules, module._parameters, module._buffers):
                self._slots += [(parts, name, part) for name, part in parts.items()]
                self._tensors += [part for part in parts.values() if isinstance(part, Tensor)]
        self._state = list(map(_state, self._tensors))

    def hooked(self) -> bool:
        """Tell whether any of the modules has a hook."""
        return any(map(len, self._hooks))

    def unchanged(self) -> bool:
        """Tell whether all is as it was, hooks apart."""
        return (
            all(map(operator.is_, map(type, self._modules), self._types))
            and all(parts.get(name) is part for parts, name, part in self._slots)
            and list(map(_state, self._tensors)) == self._state
        )


def _state(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor lies, and how often it was written to, where torch counts that."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
