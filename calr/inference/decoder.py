"""A decoder's forward with one native call for all of its blocks, for one new token a sequence."""

import operator
import weakref
from collections.abc import MutableMapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from calr.inference.blocks import HELD, bind, close, same, usual
from calr.inference.cache import Steps, together
from calr.inference.layers import tensors_of, unfollowed
from calr.inference.modules import Wrapper
from calr.inference.rotary import Turns
from calr.inference.traces import TOLERANCE, is_gated
from calr.inference.watch import Watch
from calr.model import fast_attention
from calr_kernels import eligible, native

TAKEN = {  # arguments; of any others only None is taken
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
    "cache_position",  # which says what the cache's length does
    "return_dict",
}
WINDOW, DTYPE = map(operator.attrgetter, ("window", "dtype"))


class DecoderForward(Wrapper):
    """The forward of a decoder (transformers' LlamaModel and its like).

    One new token a sequence, behind a cache that holds the others, goes through all blocks at once;
    anything else, and whatever would notice, takes the module's own forward, whose attention in
    bfloat16 is a faster one where nobody follows it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._bound, self._turns = _Bound(), Turns()

    @classmethod
    def take(cls, module: nn.Module, dtype: torch.dtype) -> bool:
        """Put one before a decoder's own forward if a trace confirms that it computes the same."""
        if not cls.may_take(module) or "forward" in vars(module):
            return False
        made = cls(module)
        try:
            confirmed = dtype in TOLERANCE and made._traced(dtype)
        except Exception:  # other arguments, sizes that do not fit, no such attributes
            confirmed = False
        if confirmed:
            vars(module)["forward"] = made
        return confirmed

    @staticmethod
    def may_take(module: nn.Module) -> bool:
        """Tell whether a module has a decoder's parts, by their names; numbers may be absent."""
        parts = module._modules
        blocks = parts.get("layers")
        named = {"embed_tokens", "layers", "norm", "rotary_emb"} == set(parts)
        return named and isinstance(blocks, nn.ModuleList) and all(map(usual, blocks))

    def __call__(self, *given: Any, **others: Any) -> Any:
        """Apply the decoder: ids [B, T] -> last hidden states [B, T, hidden_size] and the cache."""
        named = self.named(given, others)
        last = self.token(named)
        if last is None:
            quick = unfollowed() and eligible.cpu_multiplies_bfloat16()
            with fast_attention() if quick else nullcontext():
                return type(self._module).forward(self._module, *given, **others)
        cache = named["past_key_values"]
        return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=cache)

    def token(self, named: dict[str, Any], head: nn.Module | None = None) -> Tensor | None:
        """Return the last hidden states of one token a sequence [B, 1, hidden_size], or what a head
        makes of them [B, 1, V]; None where the module's own forward must run.

        named: what that was called with.
        """
        ids, embedded, cache = map(named.get, ("input_ids", "inputs_embeds", "past_key_values"))
        given = ids if embedded is None else embedded
        module: Any = self._module
        if (
            given is None
            or (ids is None) == (embedded is None)
            or type(cache) is not DynamicCache
            or not all(v is None or name in TAKEN for name, v in named.items())
            or named.get("use_cache") is False
            or named.get("return_dict", module.config.return_dict) is False
            or not self._plain(given, cache)
        ):
            return None
        starts = _starts(named.get("attention_mask"), len(given), cache.get_seq_length() + 1)
        if starts is None:
            return None
        x: Tensor = module.embed_tokens(ids) if embedded is None else embedded
        state = self._bound.behind(module, x[:, 0], cache)
        if state is None:
            return None
        return self._decode(x, state, named.get("position_ids"), cache, *starts, head=head)

    def _plain(self, given: Tensor, cache: DynamicCache) -> bool:
        """Tell whether one token a sequence comes, and nobody looks at what is between."""
        module: Any = self._module
        return (
            given.dim() >= 2
            and given.shape[1] == 1
            and given.is_cpu
            and 0 < len(given) <= eligible.QUANTIZED_ROWS
            and unfollowed()
            and not torch.is_autocast_enabled("cpu")
            and not (module.training and getattr(module.config, "attention_dropout", 0))
            and not module.config.output_hidden_states
            and not module.config.output_attentions
            and module.config._attn_implementation in ("sdpa", "eager")
            and len(cache.layers) == len(module.layers) == module.config.num_hidden_layers
            and not cache.offloading
        )

    def _decode(
        self,
        x: Tensor,
        state: "_Generation",
        position_ids: Tensor | None,
        cache: Any,
        starts: Tensor | None = None,
        head: nn.Module | None = None,
    ) -> Tensor:
        module: Any = self._module
        rotations = self._turns.at(module, x, position_ids, cache.get_seq_length())
        hidden = x[:, 0].clone(memory_format=torch.contiguous_format)
        normed = state.blocks.norm is not None
        bound = None if head is None or not normed else self._bound.head(head, hidden)
        last = state.blocks.decode(hidden, state.pasts, rotations, starts, bound)[:, None]
        state.advance()
        if not normed:
            last = module.norm(last)
        return last if head is None or bound is not None else head(last)

    @torch.no_grad()
    def _traced(self, dtype: torch.dtype) -> bool:
        """Compare every block alone, and the whole, with the module's own forward."""
        module: Any = self._module
        generator = torch.Generator().manual_seed(0)
        size = module.config.hidden_size
        blocks = self._bound.blocks(module, torch.zeros(1, size, dtype=dtype))
        if blocks is None:
            return False
        for i, block in enumerate(module.layers):
            if not is_gated(block.mlp, dtype):
                return False
            for sharpness in (1.0, 30.0):
                if not same(block, blocks.parts[i], i, size, dtype, sharpness, generator):
                    return False
        ids = torch.arange(HELD + 1)[None] % module.config.vocab_size
        caches = DynamicCache(config=module.config), DynamicCache(config=module.config)
        for cache in caches:
            type(module).forward(
                module, input_ids=ids[:, :HELD], past_key_values=cache, use_cache=True
            )
        last = ids[:, HELD:]
        expected = type(module).forward(
            module, input_ids=last, past_key_values=caches[0], use_cache=True
        )
        x = module.embed_tokens(last)
        state = self._bound.behind(module, x[:, 0], caches[1])
        if state is None or not self._plain(last, caches[1]):
            return False
        found = self._decode(x, state, None, caches[1])
        return close(found, expected.last_hidden_state, 3 * TOLERANCE[dtype])


class _Generation:
    """Blocks behind a cache: while only they add to it, nothing of it has to be looked at again."""

    def __init__(self, blocks: native.Blocks, x: Tensor, layers: list[Any], steps: Steps) -> None:
        count = layers[0].get_seq_length()
        self.blocks, self._layers, self._steps = blocks, list(layers), steps
        pasts = [(*layer.room(1), layer.held, count - layer.held) for layer in layers]
        self.pasts = blocks.pasts(x, pasts)
        self._changes, self._room = steps.changes, self.pasts.left

    def goes_on(self, x: Tensor, layers: list[Any]) -> bool:
        """Tell whether the cache is as `advance` left it, for as many sequences, and has room."""
        return (
            self._steps.changes == self._changes
            and self._layers == layers
            and self._steps.count + self.pasts.left == self._room  # else interrupted between them
            and self.pasts.kind == (len(x), x.dtype)
            and self.pasts.left > 0
        )

    def advance(self) -> None:
        """Count the token that was decoded."""
        self._steps.count += 1
        self.pasts.advance()


class _Bound:
    """The blocks bound to the kernel, and whether they may still be used."""

    def __init__(self) -> None:
        self._held: tuple[Watch, tuple[torch.dtype, int], native.Blocks | None] | None = None
        self._generations: MutableMapping[Any, _Generation] = weakref.WeakKeyDictionary()
        self._head = native.Bound()

    def blocks(self, module: Any, x: Tensor, *, whole: bool = True) -> native.Blocks | None:
        """Return the blocks for x [B, hidden_size], or None where they must not be bypassed.

        whole: all that could have changed is looked at, not a share of it.
        """
        held = self._held
        kind = x.dtype, native.packs()
        if held is None or held[1] != kind or not held[0].unchanged(whole):
            blocks = (m for block in module.layers for m in block.modules())
            watch = Watch([module.layers, *blocks, module.norm])
            held = self._held = watch, kind, bind(module, x)
        return None if held[0].hooked() else held[2]

    def head(self, module: nn.Module, x: Tensor) -> native.Binding | None:
        """Return a head bound for x [B, hidden_size], or None where it must be called."""
        layer = tensors_of(module, x) if eligible.unhooked(module) else None
        return None if layer is None else self._head.binding((layer,))

    def behind(self, module: Any, x: Tensor, cache: DynamicCache) -> _Generation | None:
        """Return the blocks behind a cache, for the next token x [B, hidden_size]; None where they
        must not be bypassed, or do not take it.

        A generation that goes on is not looked at as thoroughly as its first token.
        """
        layers: list[Any] = cache.layers
        last = self._generations.get(cache)
        on = last is not None and last.goes_on(x, layers)
        blocks = self.blocks(module, x, whole=not on)
        if last is not None and on and last.blocks is blocks:
            return last
        steps = together(layers)
        if blocks is None or steps is None or not _takes(blocks, x, layers):
            return None
        try:
            made = self._generations[cache] = _Generation(blocks, x, layers, steps)
        except ValueError:  # keys that somebody has replaced by those of other shapes
            return None
        return made


def _takes(blocks: native.Blocks, x: Tensor, layers: list[Any]) -> bool:
    """Tell whether blocks are for a cache of such layers, and faster than torch for x's rows."""
    most = eligible.MAX_ROWS[x.dtype] if blocks.plain else eligible.QUANTIZED_ROWS
    return (
        len(x) <= most
        and list(map(WINDOW, layers)) == blocks.windows
        and set(map(DTYPE, layers)) == {x.dtype}
    )


def _starts(mask: Tensor | None, b: int, count: int) -> tuple[Tensor | None] | None:
    """Return the first position that each sequence sees [B], (None,) where that is 0 for all.

    None for a mask that is not [B, count] with all of its zeros on the left.
    """
    if mask is None:
        return (None,)
    if not isinstance(mask, Tensor) or mask.shape != (b, count) or mask.is_floating_point():
        return None
    if bool(mask.all()):
        return (None,)
    seen = mask != 0
    starts = count - seen.sum(-1)
    ordered = seen == (torch.arange(count, device="cpu") >= starts[:, None])
    return (starts,) if bool(ordered.all()) and bool((starts < count).all()) else None
