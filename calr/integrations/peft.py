"""Adapters on top of compressed layers: what PEFT would get wrong is refused or put right.

PEFT takes a compressed layer for an `nn.Linear` whose `weight` is the dense matrix. Training an
adapter beside it needs no such thing; merging one, and starting one from the weight, do. Registered
as soon as PEFT's LoRA is imported.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from calr.errors import CalrError
from calr.integrations.experts import PARTS, all_experts
from calr_kernels import LowRankLinear, QuantizedEmbedding, QuantizedLinear

COMPRESSED = (LowRankLinear, QuantizedLinear)
READ_WEIGHT = (  # ways to start an adapter that read or change the base weight
    "pissa_init",
    "olora_init",
    "mica_init",
    "corda_init",
    "loftq_init",
    "lora_ga_init",
)


MERGE = (
    "an adapter cannot be merged into a low-rank layer; keep it beside the model, or call "
    "dequantize() on the model before the adapter is added"
)
NOT_PLAIN = "only a plain LoRA of linear layers can be merged into a quantised model"
UNMERGE = "an adapter that was merged into a quantised layer cannot be taken out again"


def register_layers(module: Any) -> None:
    """Guard peft.tuners.lora.layer: no merge into, and no start from, half of a weight.

    Into a quantised layer an adapter is merged as terms of its corrective path.
    """
    _guard(module.Linear, "merge", MERGE, where=LowRankLinear)
    _guard(module.Linear, "unmerge", UNMERGE, where=QuantizedLinear)
    _append_on_merge(module.Linear)
    _guard(
        module.LoraLayer,
        "update_layer",
        "DoRA scales by the norms of the dense weight, which a compressed layer does not hold; "
        "leave use_dora out, or call dequantize() on the model before",
        when=lambda kwargs: bool(
            kwargs.get("use_dora") or getattr(kwargs.get("config"), "use_dora", False)
        ),
    )
    for name in READ_WEIGHT:
        if hasattr(module.LoraLayer, name):
            _guard(
                module.LoraLayer,
                name,
                f"{name.removesuffix('_init')} starts an adapter from the dense weight, which a "
                "compressed layer does not hold; use init_lora_weights=True, or call dequantize() "
                "on the model before",
            )


def register_models(module: Any) -> None:
    """Guard peft.tuners.tuners_utils: refuse a merge before any layer is merged, and let
    target_modules="all-linear" mean whole low-rank layers."""
    for name in ("_unload_and_optionally_merge", "merge_adapter"):
        if hasattr(module.BaseTuner, name):
            _guard_model(module, name)
    _without_inner(module)


def _guard_model(module: Any, name: str) -> None:
    original: Callable[..., Any] = getattr(module.BaseTuner, name)

    @functools.wraps(original)
    def guarded(self: Any, *args: Any, merge: bool = True, **kwargs: Any) -> Any:
        adapted = [m for m in self.model.modules() if isinstance(m, module.BaseTunerLayer)]
        if merge:
            _refuse_merge(self.model, adapted)
        given = {} if name == "merge_adapter" else {"merge": merge}
        dtype = _dtype(self.model)
        result = original(self, *args, **given, **kwargs)
        _state_forms(self.model, dtype)
        return result

    setattr(module.BaseTuner, name, guarded)


def _refuse_merge(model: Any, adapted: list[Any]) -> None:
    """Raise CalrError for an adapter that one of the layers cannot take."""
    from peft.tuners.lora.layer import Linear

    tables = {
        id(m.weight): n for n, m in model.named_modules() if isinstance(m, QuantizedEmbedding)
    }
    for layer in adapted:
        base = layer.get_base_layer()
        if isinstance(base, LowRankLinear):
            raise CalrError(MERGE)
        if not isinstance(base, QuantizedLinear | QuantizedEmbedding):
            continue
        if type(layer) is not Linear or isinstance(base, QuantizedEmbedding):
            raise CalrError(NOT_PLAIN)
        _require_plain(layer)
        if id(base.weight) in tables:
            raise CalrError(
                f"an adapter cannot be merged into lm_head, whose weight is that of "
                f"{tables[id(base.weight)]}, too; leave it out of target_modules, or call "
                "dequantize() on the model before the adapter is added"
            )


def _require_plain(lora: Any) -> None:
    """Raise CalrError for a LoRA on a linear layer that is more than its two factors."""
    if getattr(lora, "lora_variant", None):
        raise CalrError(NOT_PLAIN)
    if any(lora.lora_bias.values()):
        raise CalrError("lora_bias: cannot be merged into a quantised layer")


def _append_on_merge(linear: Any) -> None:
    original: Callable[..., Any] = linear.merge

    @functools.wraps(original)
    def merge(self: Any, safe_merge: bool = False, adapter_names: Any = None) -> None:
        base = self.get_base_layer()
        if not isinstance(base, QuantizedLinear):
            original(self, safe_merge=safe_merge, adapter_names=adapter_names)
            return
        _require_plain(self)
        for adapter in self.active_adapters if adapter_names is None else adapter_names:
            if adapter in self.lora_A and adapter not in self.merged_adapters:
                down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
                base.append(down.detach(), up.detach() * self.scaling[adapter])
                self.merged_adapters.append(adapter)

    linear.merge = merge


def _dtype(model: Any) -> torch.dtype | None:
    """Return the dtype of a model's own numbers: PEFT's, in float32 beside it, are not counted."""
    own = (p for name, p in model.named_parameters() if "lora_" not in name)
    return next((p.dtype for p in own if p.is_floating_point()), None)


def _state_forms(model: Any, dtype: torch.dtype | None) -> None:
    """Have a model's configuration state the corrective paths that its layers now have, and have
    those in the model's dtype."""
    config: Any = getattr(model.config, "quantization_config", None)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and name in getattr(config, "layers", {}):
            config.layers[name] = module.form.to_dict()
            if module.corrective is not None:
                module.corrective.to(dtype)


def _without_inner(module: Any) -> None:
    name = "_maybe_include_all_linear_layers"
    original: Callable[..., Any] | None = getattr(module, name, None)
    if original is None:
        return

    @functools.wraps(original)
    def without_inner(config: Any, model: Any) -> Any:
        result = original(config, model)
        if isinstance(targets := getattr(result, "target_modules", None), set):
            _name_experts(result, model)
            layers = [n for n, m in model.named_modules() if isinstance(m, LowRankLinear)]
            targets -= {f"{layer}.down" for layer in layers}
        return result

    setattr(module, name, without_inner)


def _name_experts(config: Any, model: Any) -> None:
    """Name experts' layers whole where PEFT, which knows them as one tensor, left their numbers."""
    numbers = {target for target in config.target_modules if target.isdecimal()}
    if not numbers or next(all_experts(model), None) is None:
        return
    layers = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    config.target_modules -= numbers
    config.target_modules |= {name for name in layers if name.rpartition(".")[2] in numbers}
    stacked = tuple(PARTS.values())  # names of tensors that are no more
    left = {name for name in config.target_parameters or () if not name.endswith(stacked)}
    config.target_parameters = left or None
    for patterns in (config.rank_pattern, config.alpha_pattern):
        for pattern in [pattern for pattern in patterns if pattern.endswith(stacked)]:
            del patterns[pattern]


def _guard(
    owner: Any,
    name: str,
    message: str,
    when: Callable[[dict[str, Any]], bool] = lambda kwargs: True,
    where: type | tuple[type, ...] = COMPRESSED,
) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.get_base_layer(), where) and when(kwargs):
            raise CalrError(message)
        return original(self, *args, **kwargs)

    setattr(owner, name, guarded)
