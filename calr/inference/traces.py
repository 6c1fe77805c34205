"""Whether a module computes what the native kernel does: found by tracing it, never by its name."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from calr.inference.layers import ACTIVATIONS, ATTENTION, GATED, epsilon_of
from calr.inference.modules import AttentionForward
from calr_kernels import eligible

SCALES = (1.0, 1e2, 1e4)  # of the traced inputs: some forms clamp what is large
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@torch.no_grad()
def is_gated(module: nn.Module, dtype: torch.dtype) -> bool:
    """Tell whether a module computes down(act(gate x) * up x) of x of a dtype, by a trace."""
    parts = [module._modules.get(name) for name in GATED]
    if None in parts or type(parts[2]).__name__ not in ACTIVATIONS or len(module._modules) != 4:
        return False
    gate, up, act, down = (part for part in parts if part is not None)
    weight = gate._parameters.get("weight")
    if weight is None or weight.device.type != "cpu" or not isinstance(gate, nn.Linear):
        return False
    rows = max(eligible.MAX_ROWS.values()) + 1
    x = torch.randn(rows, gate.in_features, generator=torch.Generator().manual_seed(0))
    try:
        for scale in SCALES:
            seen = (x * scale).to(dtype)
            found, expected = module(seen), down(act(gate(seen)) * up(seen))
            if not torch.equal(found.nan_to_num(), expected.nan_to_num()):
                return False
    except Exception:  # other arguments, sizes that do not fit, no matrices: another form
        return False
    return True


@torch.no_grad()
def is_attention(module: nn.Module, dtype: torch.dtype) -> bool:
    """Tell whether a module computes rotary attention as `AttentionForward` does, by a trace."""
    if set(module._modules) != set(ATTENTION) or module._parameters:
        return False
    layers: Any = [module._modules[name] for name in ATTENTION]
    weight = layers[0]._parameters.get("weight")
    if weight is None or weight.device.type != "cpu" or dtype not in TOLERANCE:
        return False
    fast, own = AttentionForward(module), vars(module)
    try:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        d = own["head_dim"]
        x, positions = random(1, 1, layers[0].in_features), (random(1, 1, d), random(1, 1, d))
        heads = layers[1].out_features // d
        held = random(1, heads, 5, d), random(1, heads, 5, d)
        caches = DynamicCache(), DynamicCache()
        for cache in caches:
            cache.update(*held, own["layer_idx"])
        expected = type(module).forward(
            module,
            x,
            position_embeddings=positions,
            attention_mask=None,
            past_key_values=caches[0],
        )[0]
        factors = fast._factors(x, positions, {})
        if factors is None:
            return False
        found = layers[3](fast._attend(x, factors, positions, caches[1]))
        error = torch.linalg.vector_norm(found - expected)
        return bool(error <= TOLERANCE[dtype] * torch.linalg.vector_norm(expected))
    except Exception:  # other arguments, sizes that do not fit, no such attributes: another form
        return False


class NormForm(NamedTuple):
    """An RMS norm: its epsilon, and whether its weight counts from 1, as Gemma's does."""

    epsilon: float
    from_one: bool


@torch.no_grad()
def norm_form(module: nn.Module) -> NormForm | None:
    """Tell by a trace of which form an RMS norm is, None for another module.

    weight * round(x / sqrt(mean(x²) + epsilon)), or round((1 + weight) * x / sqrt(…)).
    """
    epsilon, weight = epsilon_of(module), module._parameters.get("weight")
    if not isinstance(epsilon, float) or weight is None or weight.device.type != "cpu":
        return None
    if weight.dim() != 1:
        return None
    x = torch.randn(3, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    possible = {False, True}
    try:
        for scale in (1e-4, *SCALES):  # epsilon counts where x is small
            seen = (x * scale).to(weight.dtype)
            wide = seen.float()
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
            found = type(module).forward(module, seen)
            if not torch.equal(found, weight * normed.to(weight.dtype)):
                possible.discard(False)
            if not torch.equal(found, (normed * (1.0 + weight.float())).to(weight.dtype)):
                possible.discard(True)
    except Exception:
        return None
    return NormForm(epsilon, min(possible)) if possible else None
