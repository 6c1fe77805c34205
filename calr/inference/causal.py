"""A causal language model's forward: a decoder's blocks and the head behind them in one call.

What Python does between two calls takes a fifth of a small model's token: the weights that were
read have driven all that it needs out of the caches.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from calr.inference.blocks import HELD
from calr.inference.decoder import DecoderForward
from calr_kernels import eligible


class CausalForward(eligible.Replacement):
    """The forward of a model that is a decoder and a head (transformers' LlamaForCausalLM).

    Where the decoder's blocks go natively its head does, too; anything else, and what the decoder
    does not take, goes to the module's own forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @classmethod
    def take(cls, module: nn.Module) -> bool:
        """Put one before a model's own forward if a trace confirms that it computes the same."""
        made = cls(module)
        try:
            confirmed = set(module._modules) == {"model", "lm_head"} and made._traced()
        except Exception:  # other arguments, no such attributes
            confirmed = False
        if confirmed:
            vars(module)["forward"] = made
        return confirmed

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> Any:
        """Apply the model: ids [B, T] -> logits [B, T, V] and the cache."""
        module: Any = self._module
        decoder = module._modules["model"]
        forward = vars(decoder).get("forward")
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        if (
            labels is None
            and type(logits_to_keep) is int
            and logits_to_keep in (0, 1)
            and type(forward) is DecoderForward
            and eligible.unhooked(decoder)
            and others.get("return_dict", module.config.return_dict) is not False
        ):
            logits = forward.token(**given, others=others, head=module._modules["lm_head"])
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        return type(module).forward(
            module, **given, labels=labels, logits_to_keep=logits_to_keep, **others
        )

    @torch.no_grad()
    def _traced(self) -> bool:
        """Compare the logits of a token with those of the module's own forward: the same bits."""
        module: Any = self._module
        if type(vars(module.model).get("forward")) is not DecoderForward:
            return False
        ids = torch.arange(HELD + 1)[None] % module.config.vocab_size
        found = []
        for forward in (type(module).forward.__get__(module), self):
            cache = DynamicCache(config=module.config)
            module.model(input_ids=ids[:, :HELD], past_key_values=cache, use_cache=True)
            found.append(forward(ids[:, HELD:], past_key_values=cache, use_cache=True).logits)
        return torch.equal(*found)
