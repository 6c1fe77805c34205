"""A dense model on the native kernel for a while: text of several sequences at once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from calr.inference.causal import CausalForward
from calr.inference.decoder import DecoderForward
from calr.inference.layers import floating_dtype, of_compressed_tensors
from calr.inference.modules import DenseForward
from calr_kernels import eligible, native


def may_decode(model: PreTrainedModel, dtype: torch.dtype, sequences: int) -> bool:
    """Tell whether a model of a type, on a CPU, would take a token of some sequences natively.

    By the names of its parts and by what this machine has; numbers may be absent.
    """
    return (
        native.library() is not None
        and model.device.type in ("cpu", "meta")
        and sequences <= eligible.MAX_ROWS.get(dtype, 0)
        and not of_compressed_tensors(model)
        and any(map(DecoderForward.may_take, model.modules()))
    )


@contextmanager
def decoding_natively(model: PreTrainedModel) -> Iterator[bool]:
    """Have a model's decoder, and lm_head, decode a few sequences natively, their weights packed.

    Yields whether a trace confirms that it can. Forwards and panels are as before afterwards.
    """
    own = {id(module) for module in model.modules() if "forward" in vars(module)}
    linear = [module for module in model.modules() if type(module) is nn.Linear]
    unpacked = {id(m.weight): m.weight for m in linear if native.packed_numbers(m.weight) is None}
    dtype, taken = floating_dtype(model), False
    try:
        if dtype is not None:
            taken = any([DecoderForward.take(module, dtype) for module in model.modules()])
        if taken:
            taken = all([native.pack(weight) for weight in unpacked.values()])
            head = model.get_output_embeddings()
            if type(head) is nn.Linear and id(head) not in own:
                vars(head)["forward"] = DenseForward(head)
            CausalForward.take(model)
        yield taken
    finally:
        for module in model.modules():
            if id(module) not in own and isinstance(
                vars(module).get("forward"), eligible.Replacement
            ):
                del vars(module)["forward"]
        for weight in unpacked.values():
            native.unpack(weight)
