"""Forwards that stand before modules' own: linear layers, feed-forward blocks, attention, norms."""

import inspect
from typing import Any

from torch import Tensor, nn

from calr.inference.layers import ACTIVATIONS, ATTENTION, epsilon_of, tensors_of, unfollowed
from calr_kernels import eligible, native
from calr_kernels.layout import Factors, Records

IGNORED = {"position_ids", "use_cache", "cache_position"}  # arguments that attention passes on


class Wrapper(eligible.Replacement):
    """Base of one that takes whatever the module's own forward does, and passes on what it does not
    compute itself."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        own = type(module).forward.__get__(module)
        self.__signature__ = inspect.signature(own)  # generate and Trainer ask for names
        self._names = tuple(self.__signature__.parameters)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by the module: a signature's types may not be pickled."""
        return type(self), (self._module,)

    def named(self, given: tuple[Any, ...], others: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by their names in the module's own forward."""
        return dict(zip(self._names, given, strict=False)) | others


class DenseForward(eligible.Replacement):
    """`nn.Linear.forward` on the native kernel where that changes nothing but the speed."""

    def __init__(self, module: nn.Linear) -> None:
        self._module, self._bound = module, native.Bound()

    def __call__(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        factors = tensors_of(self._module, input) if unfollowed() else None
        if factors is None:
            return nn.Linear.forward(self._module, input)
        return self._bound.linears(input, (factors,))[0]


class GatedForward(eligible.Replacement):
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
        if plain and not more and not others and unfollowed():
            factors = [tensors_of(layer, x) for layer in layers[:2]]
            if factors[0] is not None:
                factors.append(tensors_of(layers[2], x, factors[0].out_features))
            if None not in factors:
                return self._bound.gated(x, factors, activation)  # type: ignore[arg-type]
        result: Tensor = type(self._module).forward(self._module, x, *more, **others)
        return result


class AttentionForward(eligible.Replacement):
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
    ) -> list[Factors | Records] | None:
        """Return the tensors of q, k and v where no more is asked than `_attend` does."""
        module: Any = self._module
        plain = (
            x.dim() == 3
            and x.shape[1] == 1
            and unfollowed()
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
        factors = [found for layer in layers if (found := tensors_of(layer, x)) is not None]
        return factors if len(factors) == 3 else None

    def _attend(
        self,
        x: Tensor,
        factors: list[Factors | Records],
        positions: tuple[Tensor, Tensor],
        cache: Any,
    ) -> Tensor:
        """Attend from x [B, 1, hidden_size] to the cache and to x: [B, 1, heads * head_dim]."""
        module: Any = self._module
        b, d = x.shape[0], module.head_dim
        q, k, v = (y.view(b, -1, d) for y in self._bound.linears(x, factors))
        for heads in (q, k):
            native.rotate(heads, *positions)
        keys, values = cache.update(k[:, :, None], v[:, :, None], module.layer_idx)
        return native.attend(q, keys, values, module.scaling).view(b, 1, -1)


class NormForward(eligible.Replacement):
    """The forward of an RMS norm as one call of the native kernel instead of six operations."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: Tensor, *more: Any, **others: Any) -> Tensor:
        """Apply the norm: [..., hidden_size] -> [..., hidden_size]."""
        weight: Any = self._module._parameters.get("weight")
        alone = not more and not others and unfollowed()
        if alone and eligible.readable(x, None, weight) and eligible.native_norm(x, weight):
            return native.rms_norm(x, weight, epsilon_of(self._module))
        result: Tensor = type(self._module).forward(self._module, x, *more, **others)
        return result
