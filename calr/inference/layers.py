"""What a module's layers are to the native kernel, and when it may read them."""

from typing import Any

import torch
from torch import Tensor, nn

from calr_kernels import LowRankLinear, QuantizedLinear, eligible
from calr_kernels.layout import Factors, Records

ACTIVATIONS = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1, "PytorchGELUTanh": 1}
GATED = ("gate_proj", "up_proj", "act_fn", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def unfollowed() -> bool:
    """Tell whether neither autograd nor anybody else follows the operations."""
    return not torch.is_grad_enabled() and not eligible.watched()


def tensors_of(
    layer: nn.Module | None, x: Tensor, in_features: int | None = None
) -> Factors | Records | None:
    """Return a layer's tensors if the kernel may read them for x, or for as many rows, and can."""
    if type(layer) is QuantizedLinear:
        if not layer.fusible(x):
            return None
        records = layer.records()
        return records if eligible.native_packed(x, records, in_features) else None
    if type(layer) is nn.Linear:
        own = layer._parameters
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None or "bias" not in own or not eligible.readable(x, bias, weight):
            return None
        factors = Factors(weight, bias=bias)
    elif type(layer) is LowRankLinear and layer.fusible(x):
        factors = layer.factors()
    else:
        return None
    return factors if eligible.native(x, factors, in_features) else None


def floating_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of a model's activations: that of its first floating parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def of_compressed_tensors(model: nn.Module) -> bool:
    """Tell whether another library quantised a model: it changes forwards itself, when it runs."""
    return any(hasattr(module, "quantization_status") for module in model.modules())


def epsilon_of(norm: nn.Module) -> Any:
    """Return what an RMS norm adds to the mean square, None where it is not named as usual."""
    own = vars(norm)
    return own.get("variance_epsilon", own.get("eps"))
