"""Matrices in panels of 16 rows, as the kernel reads them fastest: held beside the tensors.

Whoever reads a tensor's panels shares them, and they go when the tensor goes.
"""

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from calr_kernels.forms import Form
from calr_kernels.native import pages
from calr_kernels.native.loader import TYPES, required

PANEL = 16  # rows
_PANELS: MutableMapping[Tensor, tuple[Any, Tensor]] = WeakIdKeyDictionary()
_packs = 0


def packed(records: Tensor, form: Form, columns: int) -> Tensor:
    """Return records [N, groups, record] in panels: the same bytes, rows padded to whole panels.

    csrc/panels.inl has the order. Made once for as long as the records live unchanged.
    """
    if records.is_inference():  # nobody counts who writes to it
        return _pack(records, form, columns)
    state = _state(records, form)
    held = _PANELS.get(records)
    if held is None or held[0] != state:
        held = _PANELS[records] = (state, _pack(records, form, columns))
    return held[1]


def pack(weight: Tensor) -> bool:
    """Hold a matrix of numbers [N, K] in panels, too, which `packed_numbers` finds from now on.

    Returns False where they could not be told to be out of date (inference tensors) and for what
    the kernel does not read.
    """
    global _packs
    state = _state(weight)
    fits = weight.dtype in TYPES and weight.is_cpu and weight.dim() == 2 and weight.numel() > 0
    if state is None or not fits:
        return False
    rows, columns = weight.shape
    together = 2 if weight.dtype is torch.bfloat16 else 1
    whole = pad(weight.detach(), (0, -columns % together, 0, -rows % PANEL))
    ordered = whole.view(-(-rows // PANEL), PANEL, -1, together).transpose(1, 2)
    panels = pages.empty(ordered.nbytes).view(weight.dtype).view(ordered.shape)
    _PANELS[weight] = state, panels.copy_(ordered)
    _packs += 1
    return True


def unpack(weight: Tensor) -> None:
    """Let go of a matrix's panels."""
    global _packs
    if _PANELS.pop(weight, None) is not None:
        _packs += 1


def packed_numbers(weight: Tensor) -> Tensor | None:
    """Return a matrix in panels if it was packed, and unchanged since.

    [ceil(N / 16), K, 16, 1]; of bfloat16 [ceil(N / 16), ceil(K / 2), 16, 2], padded with 0.
    """
    held = _PANELS.get(weight)
    return held[1] if held is not None and held[0] == _state(weight) else None


def packs() -> int:
    """Count how often panels of numbers came or went: what was bound may now read others."""
    return _packs


def packed_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the memory that the panels of some tensors take, beside the tensors."""
    held = (_PANELS.get(tensor) for tensor in tensors)
    return sum(found[1].nbytes for found in held if found is not None)


def _state(tensor: Tensor, form: Form | None = None) -> Any:
    """Return what changes when a tensor is written to or moved; None where nobody counts that."""
    return None if tensor.is_inference() else (tensor.data_ptr(), tensor._version, form)


def _pack(records: Tensor, form: Form, columns: int) -> Tensor:
    rows, groups, record = form.shape(records.shape[0], columns)
    blocks = -(-rows // PANEL)
    panels = pages.empty(blocks * groups * PANEL * record).view(blocks, groups, PANEL * record)
    required().calr_pack(
        records.data_ptr(),
        panels.data_ptr(),
        rows,
        columns,
        form.scale_group,
        form.bits,
        torch.get_num_threads(),
    )
    return panels
