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


def settle(*tensors: Tensor) -> None:
    """See to it that what wrote tensors has ended before a launch that overlaps the one before it.

    Such a launch reads them without waiting. Where one is new or was written to since the last
    launch that read it, an operation is put in between that waits for all before it as usual.
    """
    marks = [kept(tensor, _unmarked) for tensor in tensors]
    if not all(marks):
        tensors[0].new_zeros(1)
        for mark in marks:
            mark["read"] = True


def _unmarked(tensor: Tensor) -> dict[str, bool]:
    return {}
