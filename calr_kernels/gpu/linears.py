"""Which kernels a layer runs on, on a GPU, by the rows of its input.

Up to 4 rows the weights are what takes time, and matrix-vector kernels read them once. With more,
the vendor's products of low-rank factors were faster than every kernel of ours that was measured,
and are used. Quantised weights of 16-bit inputs go to the matrix units in registers up to 64 rows;
otherwise they are made numbers before the vendor's product. Shapes are trusted: `calr_kernels.ops`
and `.quantized` check them, and `calr_kernels.eligible` the rest.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from calr_kernels.forms import CORRECTIVE
from calr_kernels.gpu import gemv, quantized_gemv, quantized_product
from calr_kernels.gpu.dequantize import run_dequantize
from calr_kernels.gpu.interleave import places, run_interleave
from calr_kernels.gpu.kept import kept
from calr_kernels.gpu.packing import pack
from calr_kernels.layout import Records

BUFFER = 1 << 27  # bytes of quantised weights that are numbers at a time


def lowrank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    pivots: Tensor | None,
    bias: Tensor | None,
    *,
    emulate_bf16: bool = False,
) -> Tensor:
    """Compute what `calr_kernels.lowrank_linear` and `pivoted_linear` do; pivots must ascend.

    emulate_bf16: kernels of ours round float32 tensors that hold bfloat16 values as bfloat16 would
    be (the interpreter cannot compute in bfloat16).
    """
    rows = _rows(x)
    r, n = down.shape[0], up.shape[0] + (0 if pivots is None else down.shape[0])
    whole = down.is_contiguous() and up.is_contiguous()
    if len(rows) > gemv.MOST_ROWS or not whole:
        t = linear(rows, down)
        if pivots is None:
            y = linear(t, up, bias)
        else:
            y = run_interleave(t, linear(t, up), pivots, bias)
        return y.view(*x.shape[:-1], n)
    y, t = x.new_empty(len(rows), n), x.new_empty(len(rows), r)
    if pivots is None:
        gemv.run_gemv(rows, down, t, emulate_bf16=emulate_bf16)
        gemv.run_gemv(t, up, y, bias=bias, emulate_bf16=emulate_bf16)
    else:
        others, _ = kept(pivots, places, n)
        gemv.run_gemv(rows, down, y, t=t, goal=pivots, bias=bias, emulate_bf16=emulate_bf16)
        if n > r:
            gemv.run_gemv(t, up, y, goal=others, bias=bias, emulate_bf16=emulate_bf16)
    return y.view(*x.shape[:-1], n)


def quantized_linear(x: Tensor, layer: Records, *, emulate_bf16: bool = False) -> Tensor:
    """Compute what `calr_kernels.nn.QuantizedLinear` does, its corrective path included.

    In kernels of ours the sum of both paths rounds to x's dtype once. Under autocast it runs in
    that dtype, and returns x's. emulate_bf16: see above.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        parts = (layer.bias, layer.corrective_down, layer.corrective_up)
        tensors = (p if p is None or p.dtype is torch.uint8 else p.to(kind) for p in parts)
        with torch.autocast(x.device.type, enabled=False):
            own = Records(layer.weight, layer.form, layer.in_features, *tensors)
            return quantized_linear(x.to(kind), own).to(x.dtype)
    rows, n = _rows(x), layer.out_features
    bias = None if layer.bias is None else layer.bias.contiguous()
    t, up = None, None
    if layer.corrective_down is not None and layer.corrective_up is not None:
        down = _numbers(layer.corrective_down, layer.in_features, x.dtype)
        up = _numbers(layer.corrective_up, n, x.dtype)
        t = _intermediate(rows, down, emulate_bf16)
    few = len(rows) <= quantized_gemv.MOST_ROWS
    # float32 is the vendor's: for Blackwell, Triton makes TF32 of products asked for in full
    exact = x.dtype is torch.float32 and not emulate_bf16
    many = len(rows) > quantized_product.MOST_ROWS or (exact and not few)
    if many or layer.weight.is_inference():  # whose packed copy would be made anew every time
        y = _streamed(rows, layer._replace(bias=bias))
        if t is not None and up is not None:
            y = torch.addmm(y, t, up)
        return y.view(*x.shape[:-1], n)
    y = x.new_empty(len(rows), n)
    form = layer.form
    weight = kept(layer.weight, pack, form.bits, form.levels, form.scale_group, layer.in_features)
    run = quantized_gemv.run_quantized_gemv if few else quantized_product.run_quantized_product
    run(rows, weight, y, t=t, up=up, bias=bias, emulate_bf16=emulate_bf16)
    return y.view(*x.shape[:-1], n)


def _rows(x: Tensor) -> Tensor:
    """View [..., K] as [M, K] of unit column stride."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _intermediate(rows: Tensor, down: Tensor, emulate_bf16: bool) -> Tensor:
    """Return down x [M, c] of a corrective path."""
    if len(rows) > gemv.MOST_ROWS:
        return linear(rows, down)
    t = rows.new_empty(len(rows), len(down))
    gemv.run_gemv(rows, down, t, emulate_bf16=emulate_bf16)
    return t


def _numbers(factor: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return a factor [c, columns] of a corrective path as numbers."""
    if factor.dtype == torch.uint8:
        return kept(factor, run_dequantize, CORRECTIVE, columns, dtype)
    return factor.contiguous()


def _streamed(rows: Tensor, layer: Records) -> Tensor:
    """Return x ŵᵀ + bias [M, N], ŵ in numbers a part at a time."""
    size = max(1, BUFFER // (layer.in_features * rows.itemsize))
    y = None
    for first in range(0, layer.out_features, size):
        here = slice(first, first + size)
        weights = run_dequantize(layer.weight[here], layer.form, layer.in_features, rows.dtype)
        part = linear(rows, weights, None if layer.bias is None else layer.bias[here])
        if size >= layer.out_features:
            return part
        y = rows.new_empty(len(rows), layer.out_features) if y is None else y
        y[:, here] = part
    assert y is not None
    return y
