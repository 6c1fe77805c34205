"""When a faster way may be taken: three questions, asked nowhere else.

May a weight be read past its module (`readable`, `unhooked`)? Is anybody watching the operations
(`watched`)? Does a kernel take these tensors (`native…` on a CPU, `triton…` on a GPU)? Who answers
yes promises that nothing changes but the speed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

from calr_kernels import gpu
from calr_kernels.layout import Factors, Records
from calr_kernels.native import TYPES, library

if gpu.AVAILABLE:
    from calr_kernels.gpu.arch import supported

PLAIN = (Tensor, nn.Parameter)
CAPTURING = "transformers.utils.output_capturing"
# rows of x above which torch's products are faster (bench/kernels.py, bench/decode.py --batch 16)
MAX_ROWS = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 16)
if torch.cpu.get_capabilities().get("amx_bf16"):
    MAX_ROWS[torch.bfloat16] = 8

QUANTIZED_ROWS = 16  # of x, above which weights are made numbers first (bench/quantized.py)
MOST_PACKED_GROUP = 512  # weights of a scale group whose products with integers fit 32 bits


class Replacement:
    """Base of a forward that stands before a module's own and computes the same, faster."""


def is_plain(x: Tensor) -> bool:
    """Tell whether a tensor has its numbers at its address: no subclass, not sparse, not nested."""
    return type(x) in PLAIN and x.layout is torch.strided and not x.is_nested


def readable(x: Tensor, bias: Tensor | None, *weights: Tensor | None) -> bool:
    """Tell whether weights may be read without their module: plain parameters where x is, of its
    type, with nothing that acts on operations (a wrapped x, autocast)."""
    for weight in weights:
        if (
            type(weight) is not nn.Parameter
            or weight.device != x.device
            or weight.dtype is not x.dtype
        ):
            return False
    return (
        (bias is None or (bias.dtype is x.dtype and bias.device == x.device))
        and is_plain(x)
        and not torch.is_autocast_enabled(x.device.type)
    )


def readable_records(x: Tensor, layer: Records) -> bool:
    """Tell the same of a quantised layer's tensors: plain parameters of bytes, where x is, and a
    corrective path of bytes or of x's type."""
    parts = [layer.weight, layer.corrective_down, layer.corrective_up]
    return (
        readable(x, layer.bias)
        and layer.weight.dtype is torch.uint8
        and all(
            part is None
            or (
                type(part) is nn.Parameter
                and part.dtype in (torch.uint8, x.dtype)
                and part.device == x.device
            )
            for part in parts
        )
    )


def unhooked(module: nn.Module) -> bool:
    """Tell whether a call of a module does nothing but its forward: offloading, tensor parallelism
    and adapters act by hooks, or by a forward of their own."""
    forward = module.__dict__.get("forward")
    return not (
        (module._forward_hooks and acting(module._forward_hooks))
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or not (forward is None or isinstance(forward, Replacement))
    )


def acting(hooks: Mapping[int, Any]) -> bool:
    """Tell whether any of some hooks may act now: those that transformers leaves on a model's
    modules once hidden states were asked for act in calls that ask for them alone."""
    return any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks.values())


def watched() -> bool:
    """Tell whether somebody follows the operations, and would not see a kernel called directly:
    torch.compile, torch.jit.trace, make_fx and other dispatch modes, hooks on all modules,
    forward-mode differentiation and the transforms of torch.func.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or bool(modules._has_any_global_hook())
        or transformed()
    )


def transformed() -> bool:
    """Tell whether forward-mode differentiation or a transform of torch.func is at work."""
    return bool(
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


# torch.compiler.assume_constant_result does this, but would load all of torch._dynamo here
vars(transformed)["_dynamo_marked_constant"] = True


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Tell whether autograd wants to follow these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def native(x: Tensor, layer: Factors, in_features: int | None = None) -> bool:
    """Tell whether the native kernel computes a layer of x: few rows, plain CPU tensors.

    Weights share one type; x has it too, or is float32. in_features: of what the layer gets, where
    that is not x itself. Written out, since it runs at every call.
    """
    up, down, pivots, bias = layer
    kind, first = up.dtype, up if down is None else down
    return (
        kind in TYPES
        and (x.dtype is kind or x.dtype is torch.float32)
        and x.is_cpu
        and x.dim() > 0
        and first.shape[1] == (in_features or x.shape[-1])
        and 0 < x.numel() <= MAX_ROWS[kind] * x.shape[-1]
        and is_plain(x)
        and x.data_ptr() != 0
        and not x.is_neg()
        and first.dtype is kind
        and first.shape[0] > 0
        and type(first) in PLAIN
        and first.is_cpu
        and first.is_contiguous()
        and first.data_ptr() != 0
        and not first.is_neg()
        and (
            first is up
            or (
                type(up) in PLAIN
                and up.is_cpu
                and up.is_contiguous()
                and (up.data_ptr() != 0 or up.numel() == 0)
                and not up.is_neg()
            )
        )
        and (bias is None or (bias.is_contiguous() and _at_hand(bias)))
        and (pivots is None or (pivots.is_contiguous() and pivots.data_ptr() != 0))
        and library() is not None
    )


def _at_hand(tensor: Tensor) -> bool:
    """Tell whether the numbers at a plain tensor's address are its own: storage that was not freed,
    no view that negates."""
    return (tensor.numel() == 0 or tensor.data_ptr() != 0) and not tensor.is_neg()


def native_records(records: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether the native kernel reads records, or factors, as numbers of a dtype."""
    return (
        not watched()
        and dtype in TYPES
        and records.is_cpu
        and records.numel() > 0
        and type(records) in PLAIN
        and records.is_contiguous()
        and records.data_ptr() != 0
        and library() is not None
    )


def native_quantized(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether the native kernel computes a quantised layer of x: few rows, plain tensors."""
    return (
        x.is_cpu
        and is_plain(x)
        and 0 < x.numel() <= QUANTIZED_ROWS * x.shape[-1]
        and _at_hand(x)
        and (bias is None or (bias.is_contiguous() and _at_hand(bias)))
        and native_records(weight, x.dtype)
    )


def native_packed(x: Tensor, layer: Records, in_features: int | None = None) -> bool:
    """Tell whether the native kernel computes a quantised layer of x from panels: few rows, plain
    tensors, no more columns than fit. in_features: as in `native`."""
    correctives = (layer.corrective_down, layer.corrective_up)
    kinds = {part.dtype for part in correctives if part is not None}
    return (
        (in_features or x.shape[-1]) == layer.in_features
        and layer.form.scale_group <= MOST_PACKED_GROUP
        and native_quantized(x, layer.weight, layer.bias)
        and kinds in (set(), {torch.uint8}, {x.dtype})
        and all(part is None or native_records(part, x.dtype) for part in correctives)
    )


def cpu_multiplies_bfloat16() -> bool:
    """Tell whether the CPU's bfloat16 products are faster than its float32 ones.

    CPUs with AMX are, and AMD's with AVX-512's bfloat16; an Intel CPU without AMX multiplies it at
    half the rate of float32 or less, one without any such instruction far slower.
    """
    able = torch.cpu.get_capabilities()
    amd = able.get("avx512_bf16") and "Intel" not in str(able.get("cpu_name"))
    return bool(able.get("amx_bf16") or amd)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return in what dtype torch multiplies x's numbers fastest, without losing any of them."""
    slow = x.is_cpu and (
        x.dtype is torch.float16 or (x.dtype is torch.bfloat16 and not cpu_multiplies_bfloat16())
    )
    return torch.float32 if slow else x.dtype


def native_norm(x: Tensor, weight: Tensor) -> bool:
    """Tell whether the native kernel computes an RMS norm, no slower than torch, of readable
    tensors."""
    return (
        x.is_cpu
        and x.dim() > 0
        and x.shape[-1:] == weight.shape
        and x.dtype in TYPES
        and x.numel() > 0
        and (x.dtype is not torch.float16 or x.numel() <= MAX_ROWS[x.dtype] * x.shape[-1])
        and weight.is_contiguous()
        and _at_hand(x)
        and _at_hand(weight)
        and library() is not None
    )


def native_interleave(t: Tensor, rest: Tensor, pivots: Tensor) -> bool:
    """Tell whether the native kernel puts two products' outputs in their places."""
    return (
        not watched()
        and t.is_cpu
        and t.dtype in TYPES
        and rest.dtype is t.dtype
        and pivots.dtype is torch.int32
        and pivots.is_cpu
        and pivots.shape == t.shape[-1:]
        and rest.shape[:-1] == t.shape[:-1]
        and t.numel() > 0
        and all(map(is_plain, (t, rest, pivots)))
        and all(map(_at_hand, (t, rest, pivots)))
        and not needs_gradients(t, rest)
        and library() is not None
    )


def triton(x: Tensor, *weights: Tensor) -> bool:
    """Tell whether the Triton kernels compute this: plain tensors of one type on a GPU, not
    empty."""
    return (
        x.is_cuda
        and gpu.AVAILABLE
        and supported(x.device)
        and x.dtype in TYPES
        and x.numel() > 0
        and type(x) in PLAIN
        and not x.is_neg()
        and all(
            w.dtype is x.dtype and type(w) in PLAIN and w.shape[-1] > 0 and not w.is_neg()
            for w in weights
        )
    )


def triton_records(x: Tensor, layer: Records) -> bool:
    """Tell whether the Triton kernels compute a quantised layer of x, corrective path included:
    plain tensors on a GPU, not empty, and numbers of x's type."""
    parts = (layer.weight, layer.corrective_down, layer.corrective_up)
    return (
        triton(x)
        and layer.in_features == x.shape[-1]
        and layer.weight.numel() > 0
        and all(
            part is None
            or (type(part) in PLAIN and part.dtype in (torch.uint8, x.dtype) and not part.is_neg())
            for part in parts
        )
        and (layer.bias is None or (type(layer.bias) in PLAIN and not layer.bias.is_neg()))
    )


def triton_dequantizes(records: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a Triton kernel makes records numbers of a dtype."""
    return (
        not watched()
        and records.is_cuda
        and gpu.AVAILABLE
        and supported(records.device)
        and dtype in TYPES
        and records.numel() > 0
        and type(records) in PLAIN
    )
