"""What is made of a tensor once, for as long as the tensor lives unchanged."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Made = TypeVar("Made")
_KEPT: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor: its state, and what was made of it
_READ: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor: its state when a launch last read it


def kept(tensor: Tensor, make: Callable[..., Made], *arguments: Any) -> Made:
    """Return make(tensor, *arguments), made anew where the tensor was written to or moved.

    Writes through `.data` are not seen. Inference tensors do not count who writes to them: what is
    made of them is not kept. Raises RuntimeError where it would have to be made while a CUDA graph
    is captured.
    """
    if tensor.is_inference():
        return make(tensor, *arguments)
    state = tensor.data_ptr(), tensor._version
    found = _KEPT.get(tensor)
    if found is None or found[0] != state:
        found = _KEPT[tensor] = (state, {})
    what = (make, *arguments)
    if what not in found[1]:
        found[1][what] = _made(tensor, make, *arguments)
    result: Made = found[1][what]
    return result


def _made(tensor: Tensor, make: Callable[..., Made], *arguments: Any) -> Made:
    """Make it once for all streams: another may ask next."""
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a layer runs for the first time since its weights were made or changed while a CUDA "
            "graph is captured: run it once before, or call calr_kernels.warmup(model)"
        )
    with torch.inference_mode(False), torch.no_grad():
        result = make(tensor, *arguments)
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return result


def settle(*tensors: Tensor) -> None:
    """See to it that what wrote tensors has ended before a launch that overlaps the one before it.

    Such a launch reads them without waiting. Where one is new or was written to since the last
    launch that read it, an operation is put in between that waits for all before it as usual.
    """
    whole = [tensor if tensor._base is None else tensor._base for tensor in tensors]
    fresh = [t for t in whole if t.is_inference() or _READ.get(t) != (t.data_ptr(), t._version)]
    if fresh:
        fresh[0].new_zeros(1)
    for tensor in fresh:
        if not tensor.is_inference():
            _READ[tensor] = (tensor.data_ptr(), tensor._version)
