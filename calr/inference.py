"""Faster decoding on a CPU: dense layers, feed-forward blocks and norms on the native kernel."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from calr_kernels import cpu
from calr_kernels.cpu import Bound, Factors, bindable
from calr_kernels.nn import LowRankLinear, may_bypass

ACTIVATIONS = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1, "PytorchGELUTanh": 1}
SCALES = (1.0, 1e2, 1e4)  # of the traced inputs: some forms clamp what is large
PARTS = ("gate_proj", "up_proj", "act_fn", "down_proj")

logger = logging.get_logger(__name__)


def optimize_for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """Prepare a dense or compressed model, in place, for decoding a few rows at a time on a CPU.

    Dense linear layers, lm_head among them, run on the native kernel, and so do RMS norms and whole
    gated feed-forward blocks, down(act(gate x) * up x), where a trace of their forward confirms
    that form: one call instead of five or six. Parameters, names and checkpoints are unchanged;
    weights are read where they are, so that training, moving or reloading them stays right. Larger
    batches, a GPU, autograd, torch.compile and layers with hooks or adapters run as before. Returns
    the model.
    """
    if cpu.library() is None:
        return model
    blocks = linears = norms = 0
    inner = {id(module.down) for module in model.modules() if isinstance(module, LowRankLinear)}
    for module in model.modules():
        if "forward" in vars(module) or id(module) in inner:  # accelerate's, or not called
            continue
        if _is_gated(module):
            vars(module)["forward"] = _GatedForward(module)
            blocks += 1
        elif type(module) is nn.Linear:
            vars(module)["forward"] = _DenseForward(module)
            linears += 1
        elif _is_rms_norm(module):
            vars(module)["forward"] = _NormForward(module)
            norms += 1
    logger.info(
        f"native kernel: {blocks} gated blocks, {linears} dense linear layers, {norms} norms"
    )
    return model


class _DenseForward:
    """`nn.Linear.forward` on the native kernel where that changes nothing but the speed."""

    def __init__(self, module: nn.Linear) -> None:
        self._module, self._bound = module, Bound()

    def __call__(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        factors = _factors(self._module, input)
        if factors is None or torch.is_grad_enabled():
            return nn.Linear.forward(self._module, input)
        return self._bound.linears(input, (factors,))[0]


class _GatedForward:
    """The forward of a gated feed-forward block as one call of the native kernel."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._bound = module, Bound()

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the block: [..., hidden_size] -> [..., hidden_size]."""
        parts = self._module._modules
        layers: Any = [parts["gate_proj"], parts["up_proj"], parts["down_proj"]]
        act: Any = parts["act_fn"]
        activation = ACTIVATIONS.get(type(act).__name__)
        plain = activation is not None and not any(map(_has_hooks, [*layers, act]))
        if plain and not torch.is_grad_enabled():
            factors = [_factors(layer, x) for layer in layers[:2]]
            if factors[0] is not None:
                factors.append(_factors(layers[2], x, factors[0].out_features))
            if None not in factors:
                return self._bound.gated(x, factors, activation)  # type: ignore[arg-type]
        result: Tensor = type(self._module).forward(self._module, x)
        return result


class _NormForward:
    """The forward of an RMS norm as one call of the native kernel instead of six operations."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the norm: [..., hidden_size] -> [..., hidden_size]."""
        weight: Any = self._module._parameters.get("weight")
        if not torch.is_grad_enabled() and may_bypass(x, weight, None) and cpu.norms(x, weight):
            return cpu.rms_norm(x, weight, vars(self._module)["variance_epsilon"])
        result: Tensor = type(self._module).forward(self._module, x)
        return result


def _factors(layer: nn.Module | None, x: Tensor, in_features: int | None = None) -> Factors | None:
    """Return a layer's tensors if the kernel may read them for x, or for as many rows, and can."""
    if type(layer) is nn.Linear:
        own = layer._parameters
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None or "bias" not in own or not may_bypass(x, weight, bias):
            return None
        factors = Factors(weight, bias=bias)
    elif type(layer) is LowRankLinear and layer.may_fuse(x):
        factors = layer.factors()
    else:
        return None
    return factors if bindable(x, factors, in_features) else None


def _has_hooks(layer: nn.Module) -> bool:
    replaced = vars(layer).get("forward")
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or not (replaced is None or isinstance(replaced, _DenseForward))
    )


@torch.no_grad()
def _is_gated(module: nn.Module) -> bool:
    """Tell whether a module computes down(act(gate x) * up x), from its parts and a trace."""
    parts = [module._modules.get(name) for name in PARTS]
    if None in parts or type(parts[2]).__name__ not in ACTIVATIONS or len(module._modules) != 4:
        return False
    gate, up, act, down = (part for part in parts if part is not None)
    weight = gate._parameters.get("weight")
    if weight is None or weight.device.type != "cpu" or not isinstance(gate, nn.Linear):
        return False
    rows = max(cpu.MAX_ROWS.values()) + 1
    x = torch.randn(rows, gate.in_features, generator=torch.Generator().manual_seed(0))
    try:
        for scale in SCALES:
            seen = (x * scale).to(weight.dtype)
            found, expected = module(seen), down(act(gate(seen)) * up(seen))
            if not torch.equal(found.nan_to_num(), expected.nan_to_num()):
                return False
    except Exception:  # other arguments, sizes that do not fit, no matrices: another form
        return False
    return True


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Tell whether a module computes weight * round(x / sqrt(mean(x²) + epsilon)), by a trace."""
    epsilon, weight = vars(module).get("variance_epsilon"), module._parameters.get("weight")
    if not isinstance(epsilon, float) or weight is None or weight.device.type != "cpu":
        return False
    x = torch.randn(3, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    try:
        for scale in (1e-4, *SCALES):  # epsilon counts where x is small
            seen = (x * scale).to(weight.dtype)
            wide = seen.float()
            inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
            if not torch.equal(module(seen), weight * (wide * inverse).to(weight.dtype)):
                return False
    except Exception:
        return False
    return weight.dim() == 1
