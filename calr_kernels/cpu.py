"""The native CPU kernel: binding, and the choice of when it is used.

Built by setup.py as a shared library with a C interface, so that one binary serves every torch. It
runs the fastest instruction set that the machine has; CALR_CPU_ISA (scalar, avx2, avx512) forces
another. Without the library everything works in plain PyTorch, slower for small batches.
"""

import ctypes
import importlib.util
import operator
import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

ISAS = ("scalar", "avx2", "avx512")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PLAIN = (Tensor, torch.nn.Parameter)
# rows of x above which torch's products are faster (bench/kernels.py; its bfloat16 uses AMX)
MAX_ROWS = {torch.float32: 16, torch.bfloat16: 8, torch.float16: 16}


@cache
def library() -> ctypes.CDLL | None:
    """Load the kernel, or warn once that it is not there and return None.

    Raises ValueError when CALR_CPU_ISA names an instruction set that this machine lacks.
    """
    spec = importlib.util.find_spec("calr_kernels._cpu")
    try:
        loaded = _load(spec.origin if spec else None)
    except (OSError, AttributeError) as error:  # damaged, of another system, of another version
        warnings.warn(
            "calr_kernels: no native CPU kernel (it needs a C++ compiler at installation; "
            f"{error}); small batches run in plain PyTorch, slower",
            stacklevel=2,
        )
        return None
    wanted = os.environ.get("CALR_CPU_ISA")
    if wanted is not None and (
        wanted not in ISAS or loaded.calr_select_isa(ISAS.index(wanted)) != 0
    ):
        raise ValueError(f"CALR_CPU_ISA={wanted!r}: this machine has {ISAS[: isa() + 1]}")
    return loaded


def _load(path: str | None) -> ctypes.CDLL:
    """Open the library and declare its functions; OSError or AttributeError where it has none."""
    if path is None:
        raise OSError("it was not built")
    loaded = ctypes.CDLL(path)
    pointer: Any = ctypes.c_void_p
    size: Any = ctypes.c_int64
    code: Any = ctypes.c_int32
    loaded.calr_lowrank_linear.argtypes = [pointer] * 8 + [size] * 5 + [code] * 3
    loaded.calr_lowrank_linear.restype = code
    loaded.calr_linears.argtypes = [pointer, pointer, size, pointer, size, size] + [code] * 3
    loaded.calr_linears.restype = None
    loaded.calr_gated.argtypes = [pointer] * 3 + [size] * 2 + [code] * 4
    loaded.calr_gated.restype = None
    loaded.calr_rms_norm.argtypes = [pointer] * 3 + [size] * 2 + [ctypes.c_float] + [code] * 2
    loaded.calr_rms_norm.restype = None
    loaded.calr_rotate.argtypes = [pointer] * 3 + [size] * 4 + [code]
    loaded.calr_rotate.restype = None
    loaded.calr_attend.argtypes = [pointer] * 4 + [size] * 5 + [ctypes.c_float] + [code] * 2
    loaded.calr_attend.restype = None
    loaded.calr_complement.argtypes = [pointer, pointer, size, size]
    loaded.calr_complement.restype = code
    loaded.calr_interleave.argtypes = [pointer] * 4 + [size] * 3 + [code] * 2
    loaded.calr_interleave.restype = code
    return loaded


def isa() -> int:
    """Return the index in ISAS of the instruction set in use."""
    spec = importlib.util.find_spec("calr_kernels._cpu")
    assert spec is not None and spec.origin is not None
    return int(ctypes.CDLL(spec.origin).calr_isa())


def is_plain(x: Tensor) -> bool:
    """Tell whether a tensor has its numbers at its address: no subclass, not sparse, not nested."""
    return type(x) in PLAIN and x.layout is torch.strided and not x.is_nested


def usable(x: Tensor, down: Tensor, up: Tensor) -> bool:
    """Tell whether the kernel computes this: few rows, plain CPU tensors, types that it knows.

    Factors share one type; x has it too, or is float32. A width that does not fit is torch's to
    refuse. Written out, since it runs at every call.
    """
    return (
        down.dtype in TYPES
        and x.shape[-1:] == down.shape[1:]
        and up.dtype is down.dtype
        and (x.dtype is down.dtype or x.dtype is torch.float32)
        and is_plain(x)
        and x.is_cpu
        and down.is_cpu
        and up.is_cpu
        and down.shape[0] > 0
        and 0 < x.numel() <= MAX_ROWS[down.dtype] * x.shape[-1]
        and type(down) in PLAIN
        and type(up) in PLAIN
        and down.is_contiguous()
        and up.is_contiguous()
        and library() is not None
    )


def lowrank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    pivots: Tensor | None,
    bias: Tensor | None,
    corrective_down: Tensor | None = None,
    corrective_up: Tensor | None = None,
) -> Tensor:
    """Compute what `calr_kernels.lowrank_linear` and `pivoted_linear` do, for `usable` tensors.

    Shapes are trusted: the public functions check them. Raises ValueError for pivots that are not
    distinct rows.
    """
    loaded = library()
    assert loaded is not None
    x = x.contiguous()
    k, r = x.shape[-1], down.shape[0]
    n = up.shape[0] + (0 if pivots is None else r)
    y = x.new_empty(*x.shape[:-1], n)
    status = loaded.calr_lowrank_linear(
        x.data_ptr(),
        down.data_ptr(),
        up.data_ptr(),
        _pointer(pivots),
        _pointer(bias),
        _pointer(corrective_down),
        _pointer(corrective_up),
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


def eager() -> bool:
    """Tell whether nobody watches the operations: a kernel called directly is not seen by
    torch.compile, torch.jit.trace, make_fx and other dispatch modes, forward-mode differentiation
    and the transforms of torch.func.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or transformed()
    )


def transformed() -> bool:
    """Tell whether forward-mode differentiation or a transform of torch.func is at work."""
    return bool(
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


# torch.compiler.assume_constant_result does this, but would load all of torch._dynamo here
vars(transformed)["_dynamo_marked_constant"] = True


class Factors(NamedTuple):
    """The tensors of one layer: a dense weight as `up` [N, K] alone, or down [r, K] and up."""

    up: Tensor
    down: Tensor | None = None
    pivots: Tensor | None = None
    bias: Tensor | None = None

    @property
    def in_features(self) -> int:
        """K."""
        return (self.up if self.down is None else self.down).shape[1]

    @property
    def out_features(self) -> int:
        """N, pivots included."""
        return self.up.shape[0] + (0 if self.pivots is None else self.pivots.shape[0])


def bindable(x: Tensor, factors: Factors, in_features: int | None = None) -> bool:
    """Tell whether `Bound` computes this: few rows, contiguous CPU tensors.

    For tensors that may be read (`nn.may_bypass`): plain, of x's type. in_features: of what the
    layer gets, where that is not x itself.
    """
    return (
        eager()
        and x.is_cpu
        and x.dim() > 0
        and factors.in_features == (in_features or x.shape[-1])
        and x.dtype in TYPES
        and 0 < x.numel() <= MAX_ROWS[x.dtype] * x.shape[-1]
        and factors.up.is_contiguous()
        and (factors.down is None or factors.down.is_contiguous())
        and (factors.bias is None or factors.bias.is_contiguous())
        and (factors.pivots is None or factors.pivots.is_contiguous())
        and library() is not None
    )


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
        loaded = library()
        assert loaded is not None
        self.linears, self.gated = loaded.calr_linears, loaded.calr_gated
        self.tensors, self.state = tensors, [_state(tensor) for tensor in tensors]
        self.outputs = [layer.out_features for layer in factors]
        self._places: list[Tensor] = []  # pivots as they are now, and the other columns
        self.layers = (_Layer * len(factors))(*map(self._layer, factors, self.outputs))
        self.weight_type = TYPES[factors[0].up.dtype]

    def _layer(self, layer: Factors, n: int) -> "_Layer":
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
            loaded = library()
            assert loaded is not None
            if loaded.calr_complement(pivots.data_ptr(), others.data_ptr(), n, rank):
                raise ValueError(f"pivots: must be {rank} distinct rows below {n}")
            self._places += [pivots, others]
        return _Layer(
            down=_pointer(layer.down),
            up=layer.up.data_ptr(),
            bias=_pointer(layer.bias),
            pivots=_pointer(pivots),
            others=_pointer(others),
            n=n,
            r=rank,
        )


class _Layer(ctypes.Structure):
    """struct calr_layer of csrc/linear.cpp."""

    _fields_: ClassVar[list[Any]] = [
        *((name, ctypes.c_void_p) for name in ("down", "up", "corrective_down", "corrective_up")),
        *((name, ctypes.c_void_p) for name in ("bias", "pivots", "others")),
        *((name, ctypes.c_int64) for name in ("n", "r", "c")),
    ]


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


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def interleave(t: Tensor, rest: Tensor, pivots: Tensor) -> Tensor:
    """Put outputs in their places: t [..., r] at pivots [r] int32, rest [..., N - r] at the others.

    Contiguous CPU tensors of a type in TYPES -> [..., N]. Raises ValueError for pivots that are not
    distinct rows. Several times faster than concatenation and index_select.
    """
    loaded = library()
    assert loaded is not None
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


def norms(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `rms_norm` computes this, no slower than torch.

    For tensors that may be read (`nn.may_bypass`): plain, of one type.
    """
    return (
        eager()
        and x.is_cpu
        and x.dim() > 0
        and x.shape[-1:] == weight.shape
        and x.dtype in TYPES
        and x.numel() > 0
        and (x.dtype is not torch.float16 or x.numel() <= MAX_ROWS[x.dtype] * x.shape[-1])
        and weight.is_contiguous()
        and library() is not None
    )


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Compute weight * x / sqrt(mean(x²) + epsilon) over the last dimension, in float32.

    x [..., K] and weight [K], contiguous CPU tensors of one type in TYPES. What is multiplied by
    the weight is rounded to that type first, as the norms of transformers' Llama family do.
    """
    loaded = library()
    assert loaded is not None
    x = x.contiguous()
    y = torch.empty_like(x)
    k = x.shape[-1]
    loaded.calr_rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        x.numel() // k,
        k,
        epsilon,
        TYPES[x.dtype],
        torch.get_num_threads(),
    )
    return y


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Turn heads by rotary position embeddings, in place: x * cos + (-second, first half) * sin.

    x [B, heads, d], contiguous, and cosines and sines [B or 1, 1, d], on the CPU, of one type in
    TYPES. Products and sum round to that type, as in transformers.
    """
    loaded = library()
    assert loaded is not None
    b, heads, d = x.shape
    cosines, sines = cosines.contiguous(), sines.contiguous()
    loaded.calr_rotate(
        x.data_ptr(),
        cosines.data_ptr(),
        sines.data_ptr(),
        b,
        heads,
        d,
        d if cosines.shape[0] > 1 else 0,
        TYPES[x.dtype],
    )


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Compute softmax(scale q keys') values for one query a head, in float32.

    q [B, heads, d], keys and values [B, key heads, count, d], heads a multiple of key heads, on the
    CPU, of one type in TYPES -> [B, heads, d]. Raises ValueError for what does not fit.
    """
    loaded = library()
    assert loaded is not None
    b, heads, count, d = keys.shape
    shapes = keys.shape == values.shape and q.shape == (b, q.shape[1] // heads * heads, d)
    kinds = {(t.dtype, t.device.type) for t in (q, keys, values)}
    if not shapes or kinds != {(q.dtype, "cpu")}:
        described = [f"{list(t.shape)} {t.dtype} on {t.device}" for t in (q, keys, values)]
        raise ValueError(f"keys and values do not fit the queries: {described}")
    q, keys, values = q.contiguous(), keys.contiguous(), values.contiguous()
    y = torch.empty_like(q)
    loaded.calr_attend(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        y.data_ptr(),
        b,
        heads,
        q.shape[1] // heads,
        count,
        d,
        scale,
        TYPES[q.dtype],
        torch.get_num_threads(),
    )
    return y
