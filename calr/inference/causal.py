"""A causal language model's forward: a decoder's blocks and the head behind them in one call.

What Python does between two calls takes a fifth of a small model's token: the weights that were
read have driven all that it needs out of the caches.
"""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from calr.inference.blocks import HELD
from calr.inference.decoder import DecoderForward
from calr.inference.modules import Wrapper
from calr_kernels import eligible

LARGE = 1e3  # outputs of a head beyond every cap that is in use


class CausalForward(Wrapper):
    """The forward of a model that is a decoder and a head (transformers' LlamaForCausalLM).

    Where the decoder's blocks go natively its head does, too; anything else, and what the decoder
    does not take, goes to the module's own forward.
    """

    @classmethod
    def take(cls, module: nn.Module) -> bool:
        """Put one before a model's own forward if a trace confirms that it computes the same."""
        if set(module._modules) != {"model", "lm_head"} or "forward" in vars(module):
            return False
        made = cls(module)
        try:
            confirmed = made._traced()
        except Exception:  # other arguments, no such attributes
            confirmed = False
        if confirmed:
            vars(module)["forward"] = made
        return confirmed

    def __call__(self, *given: Any, **others: Any) -> Any:
        """Apply the model: ids [B, T] -> logits [B, T, V] and the cache."""
        module: Any = self._module
        decoder = module._modules["model"]
        forward = vars(decoder).get("forward")
        named = self.named(given, others)
        kept = named.pop("logits_to_keep", 0)
        if (
            type(kept) is int
            and kept in (0, 1)
            and type(forward) is DecoderForward
            and eligible.unhooked(decoder)
        ):
            logits = forward.token(named, module._modules["lm_head"])
            if logits is not None:
                cache = named["past_key_values"]
                return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        return type(module).forward(module, *given, **others)

    @torch.no_grad()
    def _traced(self) -> bool:
        """Compare the logits of a token with those of the module's own forward: the same bits.

        Once more with a head whose outputs are large, so that a cap or a scale of them shows.
        """
        module: Any = self._module
        if type(vars(module.model).get("forward")) is not DecoderForward:
            return False
        if not self._agrees():
            return False
        hook = module.lm_head.register_forward_hook(lambda _layer, _x, y: LARGE * (1 + y.abs()))
        try:
            return self._agrees()
        finally:
            hook.remove()

    def _agrees(self) -> bool:
        module: Any = self._module
        ids = torch.arange(HELD + 1)[None] % module.config.vocab_size
        found = []
        for forward in (type(module).forward.__get__(module), self):
            cache = DynamicCache(config=module.config)
            module.model(input_ids=ids[:, :HELD], past_key_values=cache, use_cache=True)
            found.append(forward(input_ids=ids[:, HELD:], past_key_values=cache).logits)
        return torch.equal(*found)
