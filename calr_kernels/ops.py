"""The operations as users call them: checked arguments, custom operator, choice of backend.

`torch.ops.calr.lowrank_linear` has a fake kernel and gradients, so it works under torch.compile and
autograd. Outside of both the backend is called directly: dispatch costs as much as a small layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from calr_kernels import eligible, gpu, native, reference
from calr_kernels.arguments import as_rows, check, overlap
from calr_kernels.layout import Factors

if gpu.AVAILABLE:
    from calr_kernels.gpu import linears
    from calr_kernels.gpu.gram import run_gram

NAME = "calr::lowrank_linear"
GRAM_SIDE = 256  # columns of a second moment that a CPU computes at once
torch.library.define(
    NAME, "(Tensor x, Tensor down, Tensor up, Tensor? pivots, Tensor? bias) -> Tensor"
)


def lowrank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    corrective_down: Tensor | None = None,
    corrective_up: Tensor | None = None,
) -> Tensor:
    """Apply `y = up (down x) + corrective_up (corrective_down x) + bias`.

    x [..., K], down [r, K], up [N, r], bias [N], corrective_down [c, K], corrective_up [N, c]
    -> y [..., N] in x's dtype: bfloat16, float16, float32 or float64. Factors share x's dtype, or
    may be 16-bit under float32 x on the CPU. Accumulation is in float32 (float64 for float64); the
    rank-r intermediate rounds to x's dtype once. Deterministic. Raises ValueError naming the
    argument whose shape, dtype or device does not fit. The corrective path is for whoever keeps it
    apart from the primary one; calr appends it to the rank.

    >>> x, down, up = torch.ones(2, 3), torch.ones(1, 3), torch.ones(4, 1)
    >>> lowrank_linear(x, down, up)[0].tolist()
    [3.0, 3.0, 3.0, 3.0]
    """
    check(x, down, up, None, bias)
    if corrective_down is None and corrective_up is None:
        return apply(x, down, up, None, bias)
    if corrective_down is None or corrective_up is None:
        raise ValueError("corrective_down and corrective_up: give both or neither")
    check(x, corrective_down, corrective_up, None, bias, "corrective_")
    if corrective_up.shape[0] != up.shape[0]:
        raise ValueError(f"corrective_up: has {corrective_up.shape[0]} rows, up {up.shape[0]}")
    tensors = (x, down, up, bias, corrective_down, corrective_up)
    if (
        not eligible.needs_gradients(*tensors)
        and not eligible.watched()
        and corrective_down.dtype is down.dtype
        and eligible.native(x, Factors(up, down, bias=bias))
        and eligible.native(x, Factors(corrective_up, corrective_down))
    ):
        return native.lowrank_linear(x, down, up, None, bias, corrective_down, corrective_up)
    return apply(x, down, up, None, bias) + apply(x, corrective_down, corrective_up, None, None)


def grouped_linear(
    x: Tensor,
    down: Tensor,
    ups: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    pivots: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Apply several low-rank layers to one input; few rows on a CPU are one native call.

    x [..., K], down [sum of r_i, K], ups[i] [N_i, r_i] ([N_i - r_i, r_i] with pivots[i] [r_i]),
    biases[i] [N_i] -> one y [..., N_i] each. Types, accuracy and errors as in `lowrank_linear` and
    `pivoted_linear`. For whoever writes a model around the kernels; calr's own modules run alone.

    >>> x, down, ups = torch.ones(1, 3), torch.ones(3, 3), [torch.ones(2, 1), torch.ones(4, 2)]
    >>> [y.tolist() for y in grouped_linear(x, down, ups)]
    [[[3.0, 3.0]], [[6.0, 6.0, 6.0, 6.0]]]
    """
    biases = biases or [None] * len(ups)
    pivots = pivots or [None] * len(ups)
    if not 0 < len(ups) == len(biases) == len(pivots):
        raise ValueError(
            f"{len(ups)} ups, {len(biases)} biases, {len(pivots)} pivots: give as many, and any"
        )
    ranks = [up.shape[-1] if up.dim() else 0 for up in ups]
    if down.dim() != 2 or sum(ranks) != down.shape[0]:
        raise ValueError(f"down {list(down.shape)}: must have {sum(ranks)} rows, the ups' ranks")
    downs = down.split(ranks)
    layers = list(zip(downs, ups, pivots, biases, strict=True))
    for layer in layers:
        check(x, *layer)
    tensors = [tensor for layer in layers for tensor in layer]
    factors = [Factors(u, d, _contiguous(p), _contiguous(b)) for d, u, p, b in layers]
    if (
        not eligible.needs_gradients(x, *tensors)
        and not eligible.watched()
        and x.dtype is down.dtype
        and all(eligible.native(x, layer) for layer in factors)
    ):
        return tuple(native.Bound().linears(x, factors))
    return tuple(apply(x, *layer) for layer in layers)


def pivoted_linear(
    x: Tensor, down: Tensor, up: Tensor, pivots: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Apply a rank-r matrix stored as r of its rows and the coefficients of the others.

    x [..., K], down [r, K], up [N - r, r], pivots [r] int32, bias [N] -> y [..., N]. y[..., pivots]
    are `down x`, the other outputs, in ascending order, `up (down x)`. Types, accuracy and errors
    as in `lowrank_linear`; pivots must be distinct rows and, on a GPU, ascending: nothing is read
    back from there to check it.

    >>> x, down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0]])
    >>> pivoted_linear(x, down, up, pivots=torch.tensor([1], dtype=torch.int32)).tolist()
    [[6.0, 3.0]]
    """
    check(x, down, up, pivots, bias)
    return apply(x, down, up, pivots, bias)


@torch.no_grad()
def gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute the second moment's sum xᵀ x (+ out, in place) in float32.

    x [M, K] bfloat16, float16 or float32, out symmetric -> [K, K] float32; no gradients. Raises
    ValueError for other shapes, dtypes or devices, and where out lies in x's memory.

    >>> gram(torch.tensor([[1.0, 2.0]])).tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """
    if x.dim() != 2 or x.dtype not in native.TYPES:
        raise ValueError(f"x {list(x.shape)} {x.dtype}: must be [M, K] of at most 32 bits")
    side = x.shape[1]
    if out is not None and (
        out.shape != (side, side)
        or out.dtype != torch.float32
        or out.device != x.device
        or not out.is_contiguous()
    ):
        raise ValueError(
            f"out {list(out.shape)} {out.dtype} on {out.device}: must be contiguous "
            f"[{side}, {side}] float32 on {x.device}"
        )
    if out is not None and overlap(x, out):
        raise ValueError("out: lies in the memory of x, which it would overwrite")
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return gram(x, out)
    if eligible.triton(x) and x.dtype is not torch.float32:  # which Triton may multiply in TF32
        return run_gram(x, out)
    wide = x.float()
    if x.is_cpu and len(x) >= GRAM_SIDE:  # with fewer rows the mirror image is dearer
        return _half_gram(wide, wide.new_zeros(side, side) if out is None else out)
    return wide.mT @ wide if out is None else out.addmm_(wide.mT, wide)


def _half_gram(x: Tensor, out: Tensor) -> Tensor:
    """Add xᵀ x to out, GRAM_SIDE columns at a time: what lies below them is what lies beside."""
    for start in range(0, x.shape[1], GRAM_SIDE):
        own, end = out[start : start + GRAM_SIDE, start:], start + GRAM_SIDE
        own.addmm_(x[:, start:end].mT, x[:, start:])
        out[end:, start:end].copy_(own[:, GRAM_SIDE:].mT)
    return out


def apply(
    x: Tensor, down: Tensor, up: Tensor, pivots: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Run a low-rank layer on arguments that fit: directly where nothing needs the dispatcher.

    Tracers, forward-mode differentiation and torch.func get plain PyTorch.
    """
    if torch.compiler.is_compiling():
        if eligible.transformed():
            return _plain(x, down, up, pivots, bias)
    elif eligible.watched():
        return _plain(x, down, up, pivots, bias)
    elif not eligible.needs_gradients(x, down, up, bias):
        return _forward(x, down, up, pivots, bias)
    result: Tensor = torch.ops.calr.lowrank_linear(x, down, up, pivots, bias)
    return result


def assemble(t: Tensor, rest: Tensor, pivots: Tensor | None, bias: Tensor | None) -> Tensor:
    """Make a layer's outputs from its two products: t = down x [..., r] and rest = up t.

    Without pivots the outputs are rest; with them t goes to the pivots, rest to the other places.
    Raises ValueError when there are not as many pivots as columns of t.
    """
    traced = torch._C._get_tracing_state() is not None  # where sizes are tensors
    if pivots is not None and not traced and pivots.shape != t.shape[-1:]:
        raise ValueError(f"pivots: has size {tuple(pivots.shape)}, must be {tuple(t.shape[-1:])}")
    if pivots is None:
        y = rest
    elif eligible.native_interleave(t, rest, pivots):
        y = native.interleave(t.contiguous(), rest.contiguous(), pivots.contiguous())
    else:
        y = reference.interleave(t, rest, pivots)
    return y if bias is None else y + bias.to(y.dtype)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward(
    x: Tensor, down: Tensor, up: Tensor, pivots: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Choose the backend: the Triton kernels, the native kernel, or torch's own products."""
    if torch.is_autocast_enabled(x.device.type):  # types are those of the arguments
        with torch.autocast(x.device.type, enabled=False):
            return _forward(x, down, up, pivots, bias)
    pivots, bias = _contiguous(pivots), _contiguous(bias)
    if eligible.triton(x, down, up):
        return linears.lowrank_linear(x, down, up, pivots, bias)
    if eligible.native(x, Factors(up, down, pivots, bias)):
        return native.lowrank_linear(x, down, up, pivots, bias)
    return _plain(x, down, up, pivots, bias)


def _plain(
    x: Tensor, down: Tensor, up: Tensor, pivots: Tensor | None, bias: Tensor | None
) -> Tensor:
    down, up = down.to(x.dtype), up.to(x.dtype)
    if pivots is None:
        return reference.lowrank_linear(x, down, up, bias)
    t = linear(x, down)
    return assemble(t, linear(t, up), pivots, bias)


def _checked(
    x: Tensor, down: Tensor, up: Tensor, pivots: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The operator itself: anyone may call it, and backends trust shapes."""
    check(x, down, up, pivots, bias)
    return _forward(x, down, up, pivots, bias)


def _fake(
    x: Tensor, down: Tensor, up: Tensor, pivots: Tensor | None, bias: Tensor | None
) -> Tensor:
    check(x, down, up, pivots, bias)
    n = up.shape[0] + (0 if pivots is None else down.shape[0])
    return x.new_empty(*x.shape[:-1], n)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, down, up, pivots, _ = inputs
    ctx.save_for_backward(x, down, up, pivots)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Recompute the rank-r intermediate; skip the gradients that nobody needs.

    With frozen two factors dx is the forward with their roles exchanged, and runs its kernels.
    """
    x, down, up, pivots = ctx.saved_tensors
    need_x, need_down, need_up, _, need_bias = ctx.needs_input_grad
    wide_down, wide_up = down.to(x.dtype), up.to(x.dtype)
    if pivots is None and not (need_down or need_up):
        dx = apply(grad, wide_up.mT, wide_down.mT, None, None) if need_x else None
        return dx, None, None, None, _bias_gradient(grad) if need_bias else None
    direct, rest = None, grad  # gradients of t as an output, and of up t
    if pivots is not None:
        source = reference.pivot_source(pivots, grad.shape[-1])
        stored = torch.empty_like(grad).index_copy(-1, source, grad)
        direct, rest = stored.split([down.shape[0], up.shape[0]], dim=-1)
    dt = rest @ wide_up  # [..., r]
    if direct is not None:
        dt = dt + direct
    rows = as_rows(x)
    dx = dt @ wide_down if need_x else None
    d_down = (as_rows(dt).mT @ rows).to(down.dtype) if need_down else None
    d_up = None
    if need_up:
        t = rows @ wide_down.mT
        d_up = (as_rows(rest).mT @ t).to(up.dtype)
    return dx, d_down, d_up, None, _bias_gradient(grad) if need_bias else None


def _bias_gradient(grad: Tensor) -> Tensor:
    return as_rows(grad).sum(0)


torch.library.impl(NAME, "default", _checked)
torch.library.register_fake(NAME, _fake)
torch.library.register_autograd(NAME, _backward, setup_context=_setup)
