"""Linear layers of few rows on the native kernel.

Callers ask `calr_kernels.eligible` first: shapes, types and places are trusted here.
"""

import ctypes
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calr_kernels.forms import CORRECTIVE, SCALE_BYTES
from calr_kernels.layout import Factors, Records
from calr_kernels.native.loader import TYPES, Layer, pointer, required
from calr_kernels.native.panels import packed, packed_numbers, packs
from calr_kernels.native.quantized import table


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

    Every call names the tensors and binds anew when one was replaced, moved or, for pivots and
    records, written to (but not through `.data`, which torch does not count); other weights may
    change in place. All weights are contiguous, on the CPU, of types in TYPES or records, which are
    packed in panels, a second time in memory; x has few rows. Weights in panels (`pack`) are read
    from there until they are written to. A copy, or what is unpickled, starts unbound.
    """

    def __init__(self) -> None:
        self._binding: Binding | None = None  # replaced whole: threads may share a layer

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copy and pickle as unbound: pointers are of this process and these tensors."""
        return Bound, ()

    def linears(self, x: Tensor, layers: Sequence[Factors | Records]) -> list[Tensor]:
        """Apply every layer: x [..., K] -> one [..., N] each."""
        binding = self.binding(layers)
        x = x.contiguous()
        k, shape = x.shape[-1], x.shape[:-1]
        ys = [x.new_empty(*shape, n) for n in binding.outputs]
        required().calr_linears(
            x.data_ptr(),
            binding.layers,
            len(ys),
            (ctypes.c_void_p * len(ys))(*[y.data_ptr() for y in ys]),
            x.numel() // k,
            k,
            TYPES[x.dtype],
            torch.get_num_threads(),
        )
        return ys

    def gated(self, x: Tensor, layers: Sequence[Factors | Records], activation: int) -> Tensor:
        """Apply a gated feed-forward block of layers gate, up, down: down(act(gate x) * up x)."""
        binding = self.binding(layers)
        x = x.contiguous()
        k = x.shape[-1]
        y = x.new_empty(*x.shape[:-1], binding.outputs[2])
        required().calr_gated(
            x.data_ptr(),
            binding.layers,
            y.data_ptr(),
            x.numel() // k,
            k,
            activation,
            TYPES[x.dtype],
            torch.get_num_threads(),
        )
        return y

    def binding(self, layers: Sequence[Factors | Records]) -> "Binding":
        """Bind unless these are the bound tensors, unchanged in place, type and shape."""
        binding = self._binding
        if binding is None or not binding.holds(layers):
            binding = self._binding = Binding(layers)
        return binding


class Binding:
    """Layers as the kernel takes them: `layers`, an array of Layer, `inputs` and `outputs`, their
    widths.

    Raises ValueError for shapes that do not fit one another, tensors elsewhere than on the CPU, and
    pivots that are not distinct.
    """

    def __init__(self, layers: Sequence[Factors | Records]) -> None:
        self._parts = [part for layer in layers for part in layer]
        self._state = list(map(_state, self._parts))
        self._kept: list[Tensor] = []  # panels, pivots as they are now, and the other columns
        self._packed: list[tuple[Tensor, int]] = []  # weights read from panels, and their versions
        self._packs = packs()
        self.inputs = [layer.in_features for layer in layers]
        self.outputs = [layer.out_features for layer in layers]
        self.layers = (Layer * len(layers))(*map(self._layer, layers))

    def holds(self, layers: Sequence[Factors | Records]) -> bool:
        """Tell whether these are the bound tensors, as they were."""
        parts = [part for layer in layers for part in layer]
        return (
            len(parts) == len(self._parts)
            and all(map(operator.is_, parts, self._parts))
            and list(map(_state, parts)) == self._state
            and self._packs == packs()
            and all(weight._version == version for weight, version in self._packed)
        )

    def _layer(self, layer: Factors | Records) -> Layer:
        """Describe one layer to the kernel."""
        described = self._quantized(layer) if isinstance(layer, Records) else self._plain(layer)
        bias, n = layer.bias, layer.out_features
        if bias is not None and (list(bias.shape) != [n] or not bias.is_cpu):
            raise ValueError(
                f"bias: is {list(bias.shape)} on {bias.device}, must be [{n}] on the CPU"
            )
        described.bias, described.n = pointer(bias), n
        return described

    def _quantized(self, layer: Records) -> Layer:
        down, up = layer.corrective_down, layer.corrective_up
        panels = self._keep(packed(layer.weight, layer.form, layer.in_features))
        paths: dict[str, Any] = {}
        if down is not None and up is not None:
            paths["c"], paths["packed_corrective"] = down.shape[0], down.dtype is torch.uint8
            if paths["packed_corrective"]:
                terms = up.transpose(0, 1).clone(memory_format=torch.contiguous_format)
                terms[..., SCALE_BYTES:] ^= 0x80  # levels in place of codes
                paths["corrective_down"] = self._keep(packed(down, CORRECTIVE, layer.in_features))
                paths["corrective_up"] = self._keep(terms)
            else:
                paths["corrective_down"], paths["corrective_up"] = down.data_ptr(), up.data_ptr()
                paths["type"] = TYPES[down.dtype]
        return Layer(
            panels=panels,
            table=table(layer.form).data_ptr(),
            group=layer.form.scale_group,
            bits=layer.form.bits,
            **paths,
        )

    def _plain(self, layer: Factors) -> Layer:
        n, rank = layer.out_features, 0 if layer.down is None else layer.down.shape[0]
        pivots = others = None
        width = layer.in_features if layer.down is None else rank
        for name, tensor, shape in (
            ("up", layer.up, [layer.up.shape[0], width]),
            ("pivots", layer.pivots, [rank]),
        ):
            if tensor is not None and (list(tensor.shape) != shape or not tensor.is_cpu):
                raise ValueError(
                    f"{name}: is {list(tensor.shape)} on {tensor.device}, must be {shape} on the "
                    "CPU"
                )
        if layer.pivots is not None:
            found = torch.empty(n - rank, dtype=torch.int32, device="cpu")
            pivots, others = self._keep(layer.pivots.clone()), self._keep(found)
            if required().calr_complement(pivots, others, n, rank):
                raise ValueError(f"pivots: must be {rank} distinct rows below {n}")
        weights = [w for w in (layer.up, layer.down) if w is not None and w.numel()]
        panels = [panel for panel in map(packed_numbers, weights) if panel is not None]
        places = {id(weight): weight.data_ptr() for weight in weights}
        if len(panels) == len(weights):
            self._packed += [(weight, weight._version) for weight in weights]
            places = {id(w): self._keep(p) for w, p in zip(weights, panels, strict=True)}
        return Layer(
            down=places.get(id(layer.down)),
            up=places.get(id(layer.up)),  # none where every output is a pivot
            pivots=pivots,
            others=others,
            r=rank,
            type=TYPES[layer.up.dtype],
            packed=len(panels) == len(weights),
        )

    def _keep(self, tensor: Tensor) -> int:
        """Hold on to a tensor, and return its address."""
        self._kept.append(tensor)
        return tensor.data_ptr()


COPIED = (torch.int32, torch.uint8)  # pivots and records: a binding has them as they were


def _state(part: object) -> tuple[Any, ...]:
    """Return where and what a tensor is and, for what is copied, how often it was written to.

    Inference tensors do not count that: their values stand for it.
    """
    if not isinstance(part, Tensor):
        return ()
    version: object = 0
    if part.dtype in COPIED:
        version = part.numpy().tobytes() if part.is_inference() else part._version
    return part.data_ptr(), part.dtype, part.shape, version


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
