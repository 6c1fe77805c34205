"""The quantised linear operation as users call it: checked arguments, custom operator.

`torch.ops.calr.quantized_linear` has a fake kernel and a gradient with respect to x and the bias:
integers and scales are frozen.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from calr_kernels import eligible, gpu, native, records
from calr_kernels.forms import Form, Levels
from calr_kernels.layout import Records

if gpu.AVAILABLE:
    from calr_kernels.gpu import linears
    from calr_kernels.gpu.dequantize import run_dequantize

NAME = "calr::quantized_linear"
torch.library.define(
    NAME, "(Tensor x, Tensor weight, int bits, str levels, int scale_group, Tensor? bias) -> Tensor"
)


def quantized_linear(x: Tensor, weight: Tensor, form: Form, bias: Tensor | None = None) -> Tensor:
    """Apply `y = ŵ x + bias`, ŵ the weights of records, each rounded once to x's dtype.

    x [..., K] of a floating dtype, weight [N, groups, record] uint8 of a form, bias [N] of x's
    dtype -> y [..., N] in x's dtype. Raises ValueError naming the argument whose shape, dtype or
    device does not fit.
    """
    check(x, weight, form, bias)
    if not eligible.watched() and not eligible.needs_gradients(x, bias):
        return _forward(x, weight, form, bias)
    result: Tensor = torch.ops.calr.quantized_linear(
        x, weight, form.bits, form.levels, form.scale_group, bias
    )
    return result


def check(x: Tensor, weight: Tensor, form: Form, bias: Tensor | None) -> None:
    """Raise ValueError naming the first argument that does not fit the others."""
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"x {list(x.shape)} {x.dtype}: must be [..., K] of a floating dtype")
    rows = weight.shape[0] if weight.dim() else 0
    wanted = form.shape(rows, x.shape[-1])
    if weight.dtype != torch.uint8 or tuple(weight.shape) != wanted:
        raise ValueError(
            f"weight {list(weight.shape)} {weight.dtype}: must be {list(wanted)} torch.uint8, the "
            f"records of {form} for x {list(x.shape)}"
        )
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype):
        raise ValueError(f"bias {list(bias.shape)} {bias.dtype}: must be [{rows}] {x.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, but x on {x.device}")


def _checked(
    x: Tensor, weight: Tensor, bits: int, levels: Levels, scale_group: int, bias: Tensor | None
) -> Tensor:
    form = Form(bits, levels, scale_group)
    check(x, weight, form, bias)
    return _forward(x, weight, form, bias)


def _forward(x: Tensor, weight: Tensor, form: Form, bias: Tensor | None) -> Tensor:
    """Choose the backend: the Triton kernels, the native kernel for few rows, or torch's product
    with numbers."""
    layer = Records(weight, form, x.shape[-1], bias)
    if eligible.triton_records(x, layer):
        return linears.quantized_linear(x, layer)
    if eligible.native_quantized(x, weight, bias):
        return native.quantized_linear(x, weight, form, bias)
    return product(x, dequantize(weight, form, x.shape[-1], x.dtype), bias)


def product(x: Tensor, numbers: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x [..., K] by numbers [N, K] in the dtype in which the machine does it best."""
    dtype = eligible.product_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return linear(x.to(dtype), numbers.to(dtype), bias).to(x.dtype)


def dequantize(
    weight: Tensor, form: Form, columns: int, dtype: torch.dtype, scales: Tensor | None = None
) -> Tensor:
    """Return the weights [N, columns] of records: level · scale in float32, rounded to a dtype.

    scales [N, groups]: in place of the records' own.
    """
    if eligible.native_records(weight, dtype):
        return native.dequantize(weight, form, columns, dtype, scales)
    if eligible.triton_dequantizes(weight, dtype):
        return run_dequantize(weight, form, columns, dtype, scales)
    return records.dequantize(weight, form, columns, dtype, scales)


def _fake(
    x: Tensor, weight: Tensor, bits: int, levels: Levels, scale_group: int, bias: Tensor | None
) -> Tensor:
    check(x, weight, Form(bits, levels, scale_group), bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bits, levels, scale_group, _ = inputs
    ctx.save_for_backward(weight)
    ctx.form, ctx.columns = Form(bits, levels, scale_group), x.shape[-1]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (weight,) = ctx.saved_tensors
    dx = db = None
    if ctx.needs_input_grad[0]:
        dtype = eligible.product_dtype(grad)
        numbers = dequantize(weight, ctx.form, ctx.columns, grad.dtype).to(dtype)
        dx = (grad.to(dtype) @ numbers).to(grad.dtype)
    if ctx.needs_input_grad[5]:
        db = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
    return dx, None, None, None, None, db


torch.library.impl(NAME, "default", _checked)
torch.library.register_fake(NAME, _fake)
torch.library.register_autograd(NAME, _backward, setup_context=_setup)
