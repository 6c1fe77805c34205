"""What the operations ask of their arguments: shapes, dtypes, devices, memory."""

import torch
from torch import Tensor


def check(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    pivots: Tensor | None,
    bias: Tensor | None,
    prefix: str = "",
) -> None:
    """Raise ValueError naming the first argument that does not fit the others; TypeError for one
    that is no tensor."""
    given: dict[str, object] = {"x": x, "down": down, "up": up, "pivots": pivots, "bias": bias}
    for name, value in given.items():
        optional = name in ("pivots", "bias")
        if not (isinstance(value, Tensor) or (value is None and optional)):
            raise TypeError(f"{name}: is {type(value).__name__}, must be a tensor")
    if x.is_nested or x.layout is not torch.strided:
        raise ValueError("x: is nested or sparse, must be a dense tensor")
    if down.dim() != 2 or up.dim() != 2 or x.dim() < 1:
        raise ValueError(
            f"x {list(x.shape)}, {prefix}down {list(down.shape)}, {prefix}up {list(up.shape)}: "
            "must be [..., K], [r, K] and [rows, r]"
        )
    rank, k = down.shape
    n = up.shape[0] + (0 if pivots is None else rank)
    for name, found, wanted in (
        ("x", x.shape[-1], k),
        (f"{prefix}up", up.shape[1], rank),
        ("bias", None if bias is None else tuple(bias.shape), (n,)),
        ("pivots", None if pivots is None else tuple(pivots.shape), (rank,)),
    ):
        if found is not None and found != wanted:
            raise ValueError(
                f"{name}: has size {found} where {prefix}down {list(down.shape)} and {prefix}up "
                f"{list(up.shape)} need {wanted}"
            )
    if pivots is not None and pivots.dtype != torch.int32:
        raise ValueError(f"pivots: {pivots.dtype}, must be torch.int32")
    mixed = x.dtype == torch.float32 and x.device.type == "cpu"
    for name, tensor in (("down", down), ("up", up), ("bias", bias), ("pivots", pivots)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{prefix}{name}: is on {tensor.device}, but x on {x.device}")
        wanted_dtype = down.dtype if name == "up" else x.dtype
        if name != "pivots" and tensor.dtype != wanted_dtype:
            small = tensor.dtype in (torch.bfloat16, torch.float16)
            if not (mixed and small and name == "down"):
                raise ValueError(f"{prefix}{name}: is {tensor.dtype}, but must be {wanted_dtype}")
    if not x.is_floating_point():
        raise ValueError(f"x: is {x.dtype}, must be a floating dtype")


def overlap(a: Tensor, b: Tensor) -> bool:
    """Tell whether the addresses between the first and the last number of two tensors meet."""
    if a.numel() == 0 or b.numel() == 0 or a.device.type == "meta":
        return False
    (a_first, a_end), (b_first, b_end) = map(_addresses, (a, b))
    return a_first < b_end and b_first < a_end


def _addresses(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def as_rows(tensor: Tensor) -> Tensor:
    """View [..., K] as [M, K], also where K is 0."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
