"""What is made of a tensor once, for as long as the tensor lives unchanged."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Made = TypeVar("Made")
_KEPT: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor: {what: (its state then, made)}


def kept(tensor: Tensor, make: Callable[..., Made], *arguments: Any) -> Made:
    """Return make(tensor, *arguments), made anew where the tensor was written to or moved.

    Inference tensors do not count who writes to them: what is made of them is not kept.
    """
    if tensor.is_inference():
        return make(tensor, *arguments)
    held = _KEPT.get(tensor)
    if held is None:
        held = _KEPT[tensor] = {}
    what, state = (make, *arguments), (tensor.data_ptr(), tensor._version)
    if what not in held or held[what][0] != state:
        held[what] = (state, make(tensor, *arguments))
    found: Made = held[what][1]
    return found
