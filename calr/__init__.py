"""Compress causal language models by low-rank decomposition with a corrective path.

Importing this package registers the checkpoint format with transformers, now or as soon as
transformers is imported; nothing heavy is imported before it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from calr.compression import compress
    from calr.elastic import resize
    from calr.errors import CalrError
    from calr.evaluation import perplexity
    from calr.inference import optimize_for_inference
    from calr.models import load
    from calr.planning import plan
    from calr.recipe import Recipe
    from calr_kernels import LowRankLinear

_HOMES = {
    "CalrError": "calr.errors",
    "LowRankLinear": "calr_kernels",
    "Recipe": "calr.recipe",
    "compress": "calr.compression",
    "load": "calr.models",
    "optimize_for_inference": "calr.inference",
    "perplexity": "calr.evaluation",
    "plan": "calr.planning",
    "resize": "calr.elastic",
}
__version__ = "0.1.0"
__all__ = [
    "CalrError",
    "LowRankLinear",
    "Recipe",
    "compress",
    "load",
    "optimize_for_inference",
    "perplexity",
    "plan",
    "resize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'calr' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


@wrapt.when_imported("transformers.modeling_utils")
def _register(module: Any) -> None:
    from calr.integrations.transformers import register

    register()
