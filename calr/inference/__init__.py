"""Faster decoding on a CPU: a decoder's blocks, or its single modules, on the native kernel."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from calr.inference import modules, traces
from calr.inference.causal import CausalForward
from calr.inference.decoder import DecoderForward
from calr.inference.layers import floating_dtype, of_compressed_tensors
from calr_kernels import LowRankLinear, native

logger = logging.get_logger(__name__)


def optimize_for_inference(model: PreTrainedModel, *, pack: bool = False) -> PreTrainedModel:
    """Prepare a dense or compressed model, in place, for decoding a few rows at a time on a CPU.

    Where a trace confirms that a decoder's blocks are of the usual form (RMS norms, rotary
    attention, a gated feed-forward block), one new token a sequence goes through all of them, and
    lm_head, in one native call, with a cache that grows in place. Otherwise, and for other inputs
    of a few rows, dense linear layers, lm_head among them, RMS norms, gated feed-forward blocks and
    rotary attention run there one by one, again where a trace confirms their form. Such a decoder
    attends to prompts in bfloat16 by parts, where the CPU multiplies that fast. Parameters,
    names and checkpoints are unchanged. Quantised layers pack their weights when they are first
    used, which takes their bytes a second time in memory. Those of 16 and 32 bits are read where
    they are or, with pack, packed in the same way now, and read faster until they are written to;
    the log says how many bytes that takes. Writes through `.data`, as PEFT merges with, are not
    noticed: merge first, pack then. Training, moving or reloading the model stays right.
    Larger batches, a GPU, autograd, torch.compile and layers with hooks or adapters run as before,
    and so does a model that compressed-tensors quantised. Returns the model.
    """
    dtype = floating_dtype(model)
    if native.library() is None or dtype is None or of_compressed_tensors(model):
        return model
    if pack:
        _pack(model)
    replaced = [_replace(module, dtype) for module in _replaceable(model)]
    counts = {name: replaced.count(name) for name in sorted({name for name in replaced if name})}
    decoders = [
        name for name, module in model.named_modules() if DecoderForward.take(module, dtype)
    ]
    CausalForward.take(model)
    logger.debug(f"native kernel: {counts}; whole decoders: {decoders}")
    return model


def _pack(model: PreTrainedModel) -> None:
    """Hold the weights of dense and low-rank layers in panels, too."""
    weights: dict[int, Tensor] = {}
    for module in model.modules():
        if type(module) is nn.Linear:
            own = [module.weight]
        elif type(module) is LowRankLinear:
            own = [weight for weight in module.factors()[:2] if weight is not None]
        else:
            continue
        weights |= {id(weight): weight for weight in own}
    held = [weight for weight in weights.values() if native.pack(weight)]
    logger.info(f"packed {len(held)} matrices: {native.packed_bytes(held):,} bytes beside them")


def _replaceable(model: nn.Module) -> list[nn.Module]:
    """List the modules whose forward is their own and is called."""
    inner = {id(module.down) for module in model.modules() if isinstance(module, LowRankLinear)}
    return [m for m in model.modules() if "forward" not in vars(m) and id(m) not in inner]


def _replace(module: nn.Module, dtype: torch.dtype) -> str | None:
    """Put a faster forward before a module's own where it computes the same; name it."""
    kind: Any = None
    if traces.is_gated(module, dtype):
        kind = modules.GatedForward
    elif traces.is_attention(module, dtype):
        kind = modules.AttentionForward
    elif type(module) is nn.Linear:
        kind = modules.DenseForward
    elif (form := traces.norm_form(module)) and not form.from_one:
        kind = modules.NormForward
    if kind is None:
        return None
    vars(module)["forward"] = kind(module)
    name: str = kind.__name__
    return name
