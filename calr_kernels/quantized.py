"""The quantised linear operation as users call it: checked arguments, custom operator.

`torch.ops.calr.quantized_linear` has a fake kernel and gradients with respect to x, the bias and a
corrective path of floating factors: integers and scales are frozen. `torch.ops.calr.dequantize` is
what torch.compile sees of an embedding.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from calr_kernels import eligible, gpu, native, records
from calr_kernels.arguments import as_rows
from calr_kernels.forms import CORRECTIVE, Form, Levels
from calr_kernels.layout import Records

if gpu.AVAILABLE:
    from calr_kernels.gpu import linears
    from calr_kernels.gpu.dequantize import run_dequantize

NAME, DEQUANTIZE = "calr::quantized_linear", "calr::dequantize"
torch.library.define(
    DEQUANTIZE,
    "(Tensor weight, int bits, str levels, int scale_group, int columns, ScalarType dtype) "
    "-> Tensor",
)
torch.library.define(
    NAME,
    "(Tensor x, Tensor weight, int bits, str levels, int scale_group, Tensor? bias, "
    "Tensor? corrective_down, Tensor? corrective_up) -> Tensor",
)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    form: Form,
    bias: Tensor | None = None,
    corrective_down: Tensor | None = None,
    corrective_up: Tensor | None = None,
) -> Tensor:
    """Apply `y = ŵ x + upᵀ (down x) + bias`, ŵ the weights of records, rounded once to x's dtype.

    x [..., K] of a floating dtype, weight [N, groups, record] uint8 of a form, bias [N] of x's
    dtype, corrective_down [c, K] and corrective_up [c, N] of x's dtype, or both records of
    `forms.CORRECTIVE`, uint8 -> y [..., N] in x's dtype. Raises ValueError naming the argument
    whose shape, dtype or device does not fit.
    """
    check(x, weight, form, bias, corrective_down, corrective_up)
    tensors = (bias, corrective_down, corrective_up)
    if not eligible.watched() and not eligible.needs_gradients(x, *tensors):
        return _forward(x, weight, form, *tensors)
    result: Tensor = torch.ops.calr.quantized_linear(
        x, weight, form.bits, form.levels, form.scale_group, *tensors
    )
    return result


def check(
    x: Tensor,
    weight: Tensor,
    form: Form,
    bias: Tensor | None = None,
    corrective_down: Tensor | None = None,
    corrective_up: Tensor | None = None,
) -> None:
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
    if (corrective_down is None) != (corrective_up is None):
        raise ValueError("corrective_down and corrective_up: give both or neither")
    factors = {"corrective_down": corrective_down, "corrective_up": corrective_up}
    for (name, factor), columns in zip(factors.items(), (x.shape[-1], rows), strict=True):
        if factor is None or corrective_down is None:
            continue
        rank, shape = corrective_down.shape[0], tuple(factor.shape)
        packed = factor.dtype == torch.uint8
        if shape != (CORRECTIVE.shape(rank, columns) if packed else (rank, columns)) or (
            factor.dtype not in (torch.uint8, x.dtype) or factor.dtype != corrective_down.dtype
        ):
            raise ValueError(
                f"{name} {list(shape)} {factor.dtype}: must be [{rank}, {columns}] {x.dtype}, as "
                "the other factor, or the records of that"
            )
    for name, tensor in ({"weight": weight, "bias": bias} | factors).items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, but x on {x.device}")


def _checked(
    x: Tensor, weight: Tensor, bits: int, levels: Levels, scale_group: int, *tensors: Tensor | None
) -> Tensor:
    form = Form(bits, levels, scale_group)
    check(x, weight, form, *tensors)
    return _forward(x, weight, form, *tensors)


def _forward(
    x: Tensor,
    weight: Tensor,
    form: Form,
    bias: Tensor | None = None,
    corrective_down: Tensor | None = None,
    corrective_up: Tensor | None = None,
) -> Tensor:
    """Choose the backend: the Triton kernels, the native kernel for few rows, or torch's product
    with numbers."""
    layer = Records(weight, form, x.shape[-1], bias, corrective_down, corrective_up)
    if eligible.triton_records(x, layer):
        return linears.quantized_linear(x, layer)
    if eligible.native_quantized(x, weight, bias):
        y = native.quantized_linear(x, weight, form, bias)
    else:
        y = product(x, dequantize(weight, form, x.shape[-1], x.dtype), bias)
    if corrective_down is None or corrective_up is None:
        return y
    t = linear(x, factor_numbers(corrective_down, x.shape[-1], x.dtype))
    return (y + t @ factor_numbers(corrective_up, y.shape[-1], x.dtype)).to(y.dtype)


def factor_numbers(factor: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return a factor [c, columns] as numbers of a dtype, be it records or numbers already."""
    if factor.dtype == torch.uint8:
        return dequantize(factor, CORRECTIVE, columns, dtype)
    return factor.to(dtype)


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
    if torch.compiler.is_compiling() and scales is None:
        found: Tensor = torch.ops.calr.dequantize(
            weight, form.bits, form.levels, form.scale_group, columns, dtype
        )
        return found
    if eligible.native_records(weight, dtype):
        return native.dequantize(weight, form, columns, dtype, scales)
    if eligible.triton_dequantizes(weight, dtype):
        return run_dequantize(weight, form, columns, dtype, scales)
    return records.dequantize(weight, form, columns, dtype, scales)


def _fake(
    x: Tensor, weight: Tensor, bits: int, levels: Levels, scale_group: int, *tensors: Tensor | None
) -> Tensor:
    check(x, weight, Form(bits, levels, scale_group), *tensors)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bits, levels, scale_group, _, down, up = inputs
    ctx.save_for_backward(x if down is not None else None, weight, down, up)
    ctx.form, ctx.columns = Form(bits, levels, scale_group), x.shape[-1]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Recompute the path's intermediate t = down x [..., c]; skip the gradients nobody needs."""
    x, weight, down, up = ctx.saved_tensors
    need_x, _, _, _, _, need_bias, need_down, need_up = ctx.needs_input_grad
    dx = db = d_down = d_up = None
    if need_x:
        dtype = eligible.product_dtype(grad)
        numbers = dequantize(weight, ctx.form, ctx.columns, grad.dtype).to(dtype)
        dx = (grad.to(dtype) @ numbers).to(grad.dtype)
    if need_bias:
        db = as_rows(grad).sum(0)
    if down is not None and (need_x or need_down):
        dt = grad @ factor_numbers(up, grad.shape[-1], grad.dtype).mT
        if dx is not None:
            dx = dx + dt @ factor_numbers(down, ctx.columns, grad.dtype)
        if need_down:
            d_down = as_rows(dt).mT @ as_rows(x)
    if need_up:
        t = linear(x, factor_numbers(down, ctx.columns, x.dtype))
        d_up = as_rows(t).mT @ as_rows(grad)
    return dx, None, None, None, None, db, d_down, d_up


def _dequantized(
    weight: Tensor, bits: int, levels: Levels, scale_group: int, columns: int, dtype: torch.dtype
) -> Tensor:
    return dequantize(weight, Form(bits, levels, scale_group), columns, dtype)


def _fake_dequantized(
    weight: Tensor, bits: int, levels: Levels, scale_group: int, columns: int, dtype: torch.dtype
) -> Tensor:
    return weight.new_empty(weight.shape[0], columns, dtype=dtype)


torch.library.impl(DEQUANTIZE, "default", _dequantized)
torch.library.register_fake(DEQUANTIZE, _fake_dequantized)
torch.library.impl(NAME, "default", _checked)
torch.library.register_fake(NAME, _fake)
torch.library.register_autograd(NAME, _backward, setup_context=_setup)
