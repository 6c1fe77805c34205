"""Faster decoding on a CPU: dense layers and all of a decoder's block on the native kernel."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from calr_kernels import LowRankLinear, eligible, native
from calr_kernels.layout import Factors

ACTIVATIONS = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1, "PytorchGELUTanh": 1}
SCALES = (1.0, 1e2, 1e4)  # of the traced inputs: some forms clamp what is large
GATED = ("gate_proj", "up_proj", "act_fn", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
IGNORED = {"position_ids", "use_cache", "cache_position"}  # arguments that attention passes on
TRACE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}

logger = logging.get_logger(__name__)


def optimize_for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """Prepare a dense or compressed model, in place, for decoding a few rows at a time on a CPU.

    Dense linear layers, lm_head among them, run on the native kernel, and so do RMS norms, gated
    feed-forward blocks, down(act(gate x) * up x), and rotary attention of one new token, where a
    trace of their forward confirms that form. Parameters, names and checkpoints are unchanged;
    weights are read where they are, so that training, moving or reloading them stays right. Larger
    batches, a GPU, autograd, torch.compile and layers with hooks or adapters run as before. Returns
    the model.
    """
    if native.library() is None:
        return model
    blocks = attentions = linears = norms = 0
    inner = {id(module.down) for module in model.modules() if isinstance(module, LowRankLinear)}
    for module in model.modules():
        if "forward" in vars(module) or id(module) in inner:  # accelerate's, or not called
            continue
        if _is_gated(module):
            vars(module)["forward"] = _GatedForward(module)
            blocks += 1
        elif _is_attention(module):
            vars(module)["forward"] = _AttentionForward(module)
            attentions += 1
        elif type(module) is nn.Linear:
            vars(module)["forward"] = _DenseForward(module)
            linears += 1
        elif _is_rms_norm(module):
            vars(module)["forward"] = _NormForward(module)
            norms += 1
    logger.debug(
        f"native kernel: {blocks} gated blocks, {attentions} attentions, {linears} dense linear "
        f"layers, {norms} norms"
    )
    return model


class _DenseForward(eligible.Replacement):
    """`nn.Linear.forward` on the native kernel where that changes nothing but the speed."""

    def __init__(self, module: nn.Linear) -> None:
        self._module, self._bound = module, native.Bound()

    def __call__(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        factors = _factors(self._module, input) if _unfollowed() else None
        if factors is None:
            return nn.Linear.forward(self._module, input)
        return self._bound.linears(input, (factors,))[0]


class _GatedForward(eligible.Replacement):
    """The forward of a gated feed-forward block as one call of the native kernel."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._bound = module, native.Bound()

    def __call__(self, x: Tensor, *more: Any, **others: Any) -> Tensor:
        """Apply the block: [..., hidden_size] -> [..., hidden_size]."""
        parts = self._module._modules
        layers: Any = [parts["gate_proj"], parts["up_proj"], parts["down_proj"]]
        act: Any = parts["act_fn"]
        activation = ACTIVATIONS.get(type(act).__name__)
        plain = activation is not None and all(map(eligible.unhooked, [*layers, act]))
        if plain and not more and not others and _unfollowed():
            factors = [_factors(layer, x) for layer in layers[:2]]
            if factors[0] is not None:
                factors.append(_factors(layers[2], x, factors[0].out_features))
            if None not in factors:
                return self._bound.gated(x, factors, activation)  # type: ignore[arg-type]
        result: Tensor = type(self._module).forward(self._module, x, *more, **others)
        return result


class _AttentionForward(eligible.Replacement):
    """The forward of rotary attention: natively for one new token a sequence that sees all others.

    Queries, keys and values in one call, rotated, the model's own cache, softmax, all heads. With a
    mask, several new tokens, gradients or attention weights asked for, the module's own forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._bound = module, native.Bound()

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the attention: [B, T, hidden_size] -> the same and the weights, None here."""
        if (
            attention_mask is None
            and position_embeddings is not None
            and past_key_values is not None
        ):
            factors = self._factors(hidden_states, position_embeddings, others)
            if factors is not None:
                y = self._attend(hidden_states, factors, position_embeddings, past_key_values)
                return self._module._modules["o_proj"](y), None  # type: ignore[misc]
        result: tuple[Tensor, Tensor | None] = type(self._module).forward(
            self._module,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **others,
        )
        return result

    def _factors(
        self, x: Tensor, positions: tuple[Tensor, Tensor], others: dict[str, Any]
    ) -> list[Factors] | None:
        """Return the tensors of q, k and v where no more is asked than `_attend` does."""
        module: Any = self._module
        plain = (
            x.dim() == 3
            and x.shape[1] == 1
            and _unfollowed()
            and not (module.training and module.attention_dropout)
            and module.config._attn_implementation == "sdpa"
            and all(value is None for name, value in others.items() if name not in IGNORED)
            and all(
                eligible.is_plain(p)
                and p.dtype is x.dtype
                and p.is_cpu
                and p.shape[0] in (1, x.shape[0])
                and p.shape[1:] == (1, module.head_dim)
                for p in positions
            )
        )
        layers = [module._modules[name] for name in ATTENTION[:3]]
        if not plain or not all(map(eligible.unhooked, layers)):
            return None
        factors = [found for layer in layers if (found := _factors(layer, x)) is not None]
        return factors if len(factors) == 3 else None

    def _attend(
        self, x: Tensor, factors: list[Factors], positions: tuple[Tensor, Tensor], cache: Any
    ) -> Tensor:
        """Attend from x [B, 1, hidden_size] to the cache and to x: [B, 1, heads * head_dim]."""
        module: Any = self._module
        b, d = x.shape[0], module.head_dim
        q, k, v = (y.view(b, -1, d) for y in self._bound.linears(x, factors))
        for heads in (q, k):
            native.rotate(heads, *positions)
        keys, values = cache.update(k[:, :, None], v[:, :, None], module.layer_idx)
        return native.attend(q, keys, values, module.scaling).view(b, 1, -1)


class _NormForward(eligible.Replacement):
    """The forward of an RMS norm as one call of the native kernel instead of six operations."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: Tensor, *more: Any, **others: Any) -> Tensor:
        """Apply the norm: [..., hidden_size] -> [..., hidden_size]."""
        weight: Any = self._module._parameters.get("weight")
        alone = not more and not others and _unfollowed()
        if alone and eligible.readable(x, None, weight) and eligible.native_norm(x, weight):
            return native.rms_norm(x, weight, vars(self._module)["variance_epsilon"])
        result: Tensor = type(self._module).forward(self._module, x, *more, **others)
        return result


def _unfollowed() -> bool:
    """Tell whether neither autograd nor anybody else follows the operations."""
    return not torch.is_grad_enabled() and not eligible.watched()


def _factors(layer: nn.Module | None, x: Tensor, in_features: int | None = None) -> Factors | None:
    """Return a layer's tensors if the kernel may read them for x, or for as many rows, and can."""
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


@torch.no_grad()
def _is_gated(module: nn.Module) -> bool:
    """Tell whether a module computes down(act(gate x) * up x), from its parts and a trace."""
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
            seen = (x * scale).to(weight.dtype)
            found, expected = module(seen), down(act(gate(seen)) * up(seen))
            if not torch.equal(found.nan_to_num(), expected.nan_to_num()):
                return False
    except Exception:  # other arguments, sizes that do not fit, no matrices: another form
        return False
    return True


@torch.no_grad()
def _is_attention(module: nn.Module) -> bool:
    """Tell whether a module computes rotary attention as `_AttentionForward` does, by a trace."""
    if set(module._modules) != set(ATTENTION) or module._parameters:
        return False
    layers: Any = [module._modules[name] for name in ATTENTION]
    weight = layers[0]._parameters.get("weight")
    if weight is None or weight.device.type != "cpu" or weight.dtype not in TRACE_TOLERANCE:
        return False
    fast, own = _AttentionForward(module), vars(module)
    try:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(weight.dtype)

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
        return bool(error <= TRACE_TOLERANCE[weight.dtype] * torch.linalg.vector_norm(expected))
    except Exception:  # other arguments, sizes that do not fit, no such attributes: another form
        return False


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
