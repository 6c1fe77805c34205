"""Linear layers of few rows on the native kernel.

Callers ask `calr_kernels.eligible` first: shapes, types and places are trusted here.
"""

import ctypes
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calr_kernels.layout import Factors
from calr_kernels.native.loader import TYPES, Layer, pointer, required


def lowrank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    pivots: Tensor | None,
    bias: Tensor | None,
    corrective_down: Tensor | None = None,
    corrective_up: Tensor | None = None,
) -> Tensor:
    """Compute `calr_kernels.lowrank_linear` or `pivoted_linear` of eligible tensors.

    Shapes are trusted: the public functions check them. Raises ValueError for pivots that are not
    distinct rows.
    """
    loaded = required()
    x = x.contiguous()
    k, r = x.shape[-1], down.shape[0]
    n = up.shape[0] + (0 if pivots is None else r)
    y = x.new_empty(*x.shape[:-1], n)
    status = loaded.calr_lowrank_linear(
        x.data_ptr(),
        down.data_ptr(),
        up.data_ptr(),
        pointer(pivots),
        pointer(bias),
        pointer(corrective_down),
        pointer(corrective_up),
        y.data_ptr(),
        x.numel() // k,
        k,
        n,
        r,
        0 if corrective_down is None else corrective_down.shape[0],
        TYPES[x.dtype],
        TYPES[down.dtype],
        torch.get_num_threads(),
    )
    if status:
        raise ValueError(f"pivots: must be {r} distinct rows below {n}")
    return y


class Bound:
    """Layers of one input, bound to the kernel: what a call needs is looked up once.

    Every call names the factors and binds anew when one was replaced, moved or, for pivots, written
    to (but not through `.data`, which torch does not count); other weights may change in place. All
    weights are of one type in TYPES, contiguous, on the CPU; x has few rows of that type, or of
    float32. A copy, or what is unpickled, starts unbound.
    """

    def __init__(self) -> None:
        self._binding: _Binding | None = None  # replaced whole: threads may share a layer

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copy and pickle as unbound: pointers are of this process and these tensors."""
        return Bound, ()

    def linears(self, x: Tensor, factors: Sequence[Factors]) -> list[Tensor]:
        """Apply every layer: x [..., K] -> one [..., N] each."""
        binding = self._current(factors)
        x = x.contiguous()
        k, shape = x.shape[-1], x.shape[:-1]
        ys = [x.new_empty(*shape, n) for n in binding.outputs]
        binding.linears(
            x.data_ptr(),
            binding.layers,
            len(ys),
            (ctypes.c_void_p * len(ys))(*[y.data_ptr() for y in ys]),
            x.numel() // k,
            k,
            TYPES[x.dtype],
            binding.weight_type,
            torch.get_num_threads(),
        )
        return ys

    def gated(self, x: Tensor, factors: Sequence[Factors], activation: int) -> Tensor:
        """Apply a gated feed-forward block of factors gate, up, down: down(act(gate x) * up x)."""
        binding = self._current(factors)
        x = x.contiguous()
        k = x.shape[-1]
        y = x.new_empty(*x.shape[:-1], binding.outputs[2])
        binding.gated(
            x.data_ptr(),
            binding.layers,
            y.data_ptr(),
            x.numel() // k,
            k,
            activation,
            TYPES[x.dtype],
            binding.weight_type,
            torch.get_num_threads(),
        )
        return y

    def _current(self, factors: Sequence[Factors]) -> "_Binding":
        """Bind unless these are the bound tensors, unchanged in place, type and shape."""
        tensors = [tensor for layer in factors for tensor in layer]
        binding = self._binding
        if (
            binding is None
            or len(tensors) != len(binding.tensors)
            or not all(map(operator.is_, tensors, binding.tensors))
            or [_state(tensor) for tensor in tensors] != binding.state
        ):
            binding = self._binding = _Binding(factors, tensors)
        return binding


class _Binding:
    """What calls with these factors need. Raises ValueError for shapes that do not fit one another,
    tensors elsewhere than on the CPU, and pivots that are not distinct."""

    def __init__(self, factors: Sequence[Factors], tensors: list[Tensor | None]) -> None:
        loaded = required()
        self.linears, self.gated = loaded.calr_linears, loaded.calr_gated
        self.tensors, self.state = tensors, [_state(tensor) for tensor in tensors]
        self.outputs = [layer.out_features for layer in factors]
        self._places: list[Tensor] = []  # pivots as they are now, and the other columns
        self.layers = (Layer * len(factors))(*map(self._layer, factors, self.outputs))
        self.weight_type = TYPES[factors[0].up.dtype]

    def _layer(self, layer: Factors, n: int) -> Layer:
        """Describe one layer to the kernel."""
        rank, pivots, others = 0 if layer.down is None else layer.down.shape[0], None, None
        width = layer.in_features if layer.down is None else rank
        for name, tensor, shape in (
            ("up", layer.up, [layer.up.shape[0], width]),
            ("pivots", layer.pivots, [rank]),
            ("bias", layer.bias, [n]),
        ):
            if tensor is not None and (list(tensor.shape) != shape or not tensor.is_cpu):
                raise ValueError(
                    f"{name}: is {list(tensor.shape)} on {tensor.device}, must be {shape} on the "
                    "CPU"
                )
        if layer.pivots is not None:
            pivots, others = layer.pivots.clone(), torch.empty(n - rank, dtype=torch.int32)
            loaded = required()
            if loaded.calr_complement(pivots.data_ptr(), others.data_ptr(), n, rank):
                raise ValueError(f"pivots: must be {rank} distinct rows below {n}")
            self._places += [pivots, others]
        return Layer(
            down=pointer(layer.down),
            up=layer.up.data_ptr(),
            bias=pointer(layer.bias),
            pivots=pointer(pivots),
            others=pointer(others),
            n=n,
            r=rank,
        )


def _state(tensor: Tensor | None) -> tuple[Any, ...]:
    """Return where and what a tensor is and, for pivots, how often it was written to.

    Inference tensors do not count that: their values stand for it.
    """
    if tensor is None:
        return ()
    version: object = 0
    if tensor.dtype is torch.int32:
        version = tensor.numpy().tobytes() if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.dtype, tensor.shape, version


def interleave(t: Tensor, rest: Tensor, pivots: Tensor) -> Tensor:
    """Put outputs in their places: t [..., r] at pivots [r] int32, rest [..., N - r] at the others.

    Contiguous CPU tensors of a type in TYPES -> [..., N]. Raises ValueError for pivots that are not
    distinct rows. Several times faster than concatenation and index_select.
    """
    loaded = required()
    r, n = t.shape[-1], t.shape[-1] + rest.shape[-1]
    y = t.new_empty(*t.shape[:-1], n)
    status = loaded.calr_interleave(
        t.data_ptr(),
        rest.data_ptr(),
        pivots.data_ptr(),
        y.data_ptr(),
        t.numel() // r,
        n,
        r,
        t.itemsize,
        torch.get_num_threads(),
    )
    if status:
        raise ValueError(f"pivots: must be {r} distinct rows below {n}")
    return y
