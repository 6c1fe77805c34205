"""Quantised matrices whose scales are trained, their integers frozen.

Weights are numbers a part at a time, in the forward pass and again in the backward pass: a model in
training takes what its records and scales take, and no more.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from calr_kernels import eligible, native, records
from calr_kernels.forms import Form
from calr_kernels.quantized import dequantize

PART = 1 << 23  # weights that are numbers at once


def scaled_linear(
    x: Tensor, weight: Tensor, scales: Tensor, form: Form, bias: Tensor | None = None
) -> Tensor:
    """Apply `y = ŵ x + bias`, ŵ the levels of records times scales as `stored_scales` rounds them.

    x [..., K], weight [N, groups, record] uint8 of a form, scales [N, groups], bias [N] -> y
    [..., N], in x's dtype or that of autocast. Gradients with respect to x, scales (as if they were
    not rounded) and bias.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y: Tensor = cast(Any, _Linear).apply(x, weight, scales, form)
    return y if bias is None else y + bias.to(y.dtype)


def scaled_rows(ids: Tensor, weight: Tensor, scales: Tensor, form: Form, columns: int) -> Tensor:
    """Look up rows ids [n] of records and scales, as in `scaled_linear`: [n, columns] float32."""
    found: Tensor = cast(Any, _Rows).apply(weight[ids], scales[ids], form, columns)
    return found


def stored_scales(weight: Tensor, scales: Tensor, form: Form) -> Tensor:
    """Return the scales [N, groups] float16 that are stored of trained ones.

    Each keeps the sign of the records' own; where it would not, or is not finite, it is that again.
    """
    now, before = records.storable(scales, form), records.scales_of(weight)
    return torch.where(torch.isfinite(now) & (now.sign() * before.sign() > 0), now, before)


def scale_gradients(weight: Tensor, gradients: Tensor, form: Form) -> Tensor:
    """Return a loss's gradient at scales [N, groups], 0 where one is 0, from that at weights."""
    if eligible.native_records(weight, gradients.dtype):
        found = native.scale_gradients(weight, gradients, form)
    else:
        found = records.scale_gradients(weight, gradients, form)
    return found * (records.scales_of(weight) != 0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor, form: Form) -> Tensor:
        ctx.save_for_backward(x, weight, scales)
        ctx.form, ctx.dtype = form, eligible.product_dtype(x)
        flat = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        y = x.new_empty(len(flat), len(weight))
        for part in _parts(weight, form):
            y[:, part] = linear(flat, _numbers(ctx, x, weight[part], scales[part]))
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        flat, grad = (t.reshape(-1, t.shape[-1]).to(ctx.dtype) for t in (x, grad))
        dx = torch.zeros(flat.shape, device=x.device) if ctx.needs_input_grad[0] else None
        ds = torch.empty_like(scales) if ctx.needs_input_grad[2] else None
        for part in _parts(weight, ctx.form):
            if dx is not None:  # summed in float32
                dx += grad[:, part] @ _numbers(ctx, x, weight[part], scales[part])
            if ds is not None:
                ds[part] = scale_gradients(weight[part], grad[:, part].mT @ flat, ctx.form)
        return None if dx is None else dx.to(x.dtype).view_as(x), None, ds, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor, form: Form, columns: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.form, now = form, stored_scales(weight, scales, form)
        return dequantize(weight, form, columns, torch.float32, now)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return None, scale_gradients(weight, grad, ctx.form), None, None


def _numbers(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Return weights [n, K] as x's numbers, in the dtype of products."""
    now = stored_scales(weight, scales, ctx.form)
    return dequantize(weight, ctx.form, x.shape[-1], x.dtype, now).to(ctx.dtype)


def _parts(weight: Tensor, form: Form) -> list[slice]:
    """Cut the rows of records into parts of at most PART weights."""
    rows = max(1, PART // (weight.shape[1] * form.scale_group))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]
