"""Compress causal language models by low-rank decomposition with a corrective path.

Importing this package registers the checkpoint format with transformers, now or as soon as
transformers is imported; nothing heavy is imported before it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from calr.version import __version__

if TYPE_CHECKING:
    from calr.compression import compress, compress_to
    from calr.elastic import resize, resize_to
    from calr.errors import CalrError
    from calr.evaluation import perplexity
    from calr.inference import optimize_for_inference
    from calr.model import load
    from calr.planning import plan
    from calr.recipe import Recipe
    from calr_kernels import LowRankLinear

_HOMES = {
    "CalrError": "calr.errors",
    "LowRankLinear": "calr_kernels",
    "Recipe": "calr.recipe",
    "compress": "calr.compression",
    "compress_to": "calr.compression",
    "load": "calr.model",
    "optimize_for_inference": "calr.inference",
    "perplexity": "calr.evaluation",
    "plan": "calr.planning",
    "resize": "calr.elastic",
    "resize_to": "calr.elastic",
}
__all__ = [
    "CalrError",
    "LowRankLinear",
    "Recipe",
    "__version__",
    "compress",
    "compress_to",
    "load",
    "optimize_for_inference",
    "perplexity",
    "plan",
    "resize",
    "resize_to",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'calr' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


@wrapt.when_imported("transformers.modeling_utils")
def _register(module: Any) -> None:
    from calr.integrations.transformers import register

    register()


@wrapt.when_imported("peft.tuners.lora.layer")
def _guard_adapters(module: Any) -> None:
    from calr.integrations.peft import register_layers

    register_layers(module)


@wrapt.when_imported("peft.tuners.tuners_utils")
def _guard_adapted_models(module: Any) -> None:
    from calr.integrations.peft import register_models

    register_models(module)
