"""What every launch of a Triton kernel says: options, units of sizes, the device."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from calr_kernels.gpu.arch import Arch, device_arch

ALIGNED = 8  # elements: 16 bytes of a 16-bit type


def options(warps: int, stages: int = 1, overlap: bool = False) -> dict[str, Any]:
    """Return the options of a launch. Triton 3.10 no longer fuses multiply-adds unless asked to.

    overlap: the launch may begin before the one before it on the stream has ended; its kernel waits
    (constant PDL) before it reads what that one wrote.
    """
    found: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return found | {"launch_pdl": True} if overlap else found


def unit(*sizes: int) -> int:
    """Return 8 where all sizes are multiples of 8, else 1: kernels take sizes in such units, since
    the compiler sees 16-byte alignment only in factors written out or in multiples of 16."""
    return ALIGNED if all(size % ALIGNED == 0 for size in sizes) else 1


def on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, so make it the tensor's."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def arch_of(tensor: Tensor) -> Arch:
    """Return the GPU that a tensor is on."""
    return device_arch(tensor.device)
