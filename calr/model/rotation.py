"""A rotation that leaves a model's function as it is and makes its weights easier to round.

Of the residual stream, by a random orthogonal matrix (QuaRot, arXiv 2404.00456; SpinQuant, arXiv
2405.16406): weights, and inputs, become more alike in size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calr.integrations.experts import Experts
from calr.model.absent import Absent, Read, present
from calr.model.structure import Structure
from calr.model.support import alike
from calr.model.swapping import evaluating, hooked

Keep = Callable[[str, Tensor], Read]  # of a name and values

PART = 1 << 24  # numbers that are turned at once
TOKENS = 16  # whose logits are compared
TOLERANCES = (1e-3, 5e-2)  # of weights, too, that are rounded: in float32, in 16 bit


@torch.no_grad()
def rotate(
    model: PreTrainedModel, structure: Structure, seed: int = 0, keep: Keep | None = None
) -> bool:
    """Rotate a model's residual stream, in place; return whether it was done.

    Weights of the norms go into the layers that read them. A model whose logits then differ, by
    more than rounding, is of another form (norms behind a layer that writes to the residual, layer
    norms, lm_head tied to the embedding): it is as it was. keep: puts what becomes of an absent
    matrix into a file, and returns what reads it.
    """
    embedding, head = _ends(model)
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        return False
    if head.weight is embedding.weight or next(model.parameters()).device.type == "meta":
        return False
    blocks = model.get_submodule(structure.blocks_name)
    with evaluating(model):
        wanted, readers = _traced(model)
        read = {linear for linears in readers.values() for linear in linears}
        writers = [
            module
            for module in blocks.modules()
            if type(module) is nn.Linear
            and module.out_features == embedding.embedding_dim
            and module not in read
        ]
        moved = [embedding, *readers, *read, *writers]
        before = [  # on the CPU: a GPU may have no room
            (module, name, p, p if isinstance(p, Absent) else p.data.to("cpu", copy=True))
            for module in moved
            for name, p in module.named_parameters(recurse=False)
        ]
        draw, same = torch.Generator().manual_seed(seed), False
        try:
            names = {module: name for name, module in model.named_modules()}
            turn = _Turn(_orthogonal(embedding.embedding_dim, draw), names, keep)
            turn.all(embedding, readers, writers)
            same = head in read and alike(_logits(model), wanted, *TOLERANCES)
        finally:
            for module, name, p, value in [] if same else before:
                module._parameters[name] = p
                if p is not value:
                    p.data = value.to(p.device)
    return same


def _ends(model: Any) -> tuple[nn.Module, nn.Module | None]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _logits(model: Any) -> Tensor:
    ids = torch.arange(1, TOKENS + 1, device=model.device)[None] % model.config.vocab_size
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _traced(model: PreTrainedModel) -> tuple[Tensor, dict[nn.Module, list[nn.Module]]]:
    """Return the logits of a few tokens, and of each norm the layers that read what it gives.

    Beside linear layers these are routers of experts, and the experts' first layers.
    """
    given: dict[int, nn.Module] = {}
    alive: list[Any] = []  # so that an address means sameness
    readers: dict[nn.Module, list[nn.Module]] = {}

    def of_norm(module: nn.Module, args: Any, output: Tensor) -> None:
        alive.append(output)
        given[output.data_ptr()] = module

    def of_reader(module: nn.Module, args: tuple[Any, ...]) -> None:
        norm = given.get(args[0].data_ptr())
        if norm is not None:
            layers = module.readers() if isinstance(module, Experts) else [module]
            readers.setdefault(norm, []).extend(layers)

    hidden, hooks = model.get_input_embeddings().get_parameter("weight").shape[1], []
    for module in model.modules():
        weight = module._parameters.get("weight")
        shape = [] if weight is None else list(weight.shape)
        if "norm" in type(module).__name__.lower() and shape == [hidden]:
            hooks.append(module.register_forward_hook(of_norm))
        elif isinstance(module, Experts) or (
            shape[1:] == [hidden] and not isinstance(module, nn.Embedding)
        ):
            hooks.append(module.register_forward_pre_hook(of_reader))
    with hooked(hooks):
        return _logits(model), readers


def _orthogonal(size: int, draw: torch.Generator) -> Tensor:
    """Draw an orthogonal matrix, float64, evenly from all of them."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
    even: Tensor = q * r.diagonal().sign()
    return even


@dataclass(frozen=True)
class _Turn:
    """Turns h into Qᵀh: E Q, W Γ Q of a layer behind a norm of weight Γ, Qᵀ W, Qᵀ b of a writer."""

    q: Tensor
    names: dict[nn.Module, str]
    keep: Keep | None

    def all(
        self,
        embedding: nn.Embedding,
        readers: dict[nn.Module, list[nn.Module]],
        writers: list[nn.Linear],
    ) -> None:
        """Turn whatever reads or writes the residual stream."""
        self.change(embedding, "weight", lambda w, q: w @ q)
        for norm, linears in readers.items():
            gain = norm.get_parameter("weight")
            for linear in linears:
                self.change(linear, "weight", lambda w, q, gain=gain: (w * gain.to(w)) @ q)
            gain.data = torch.ones_like(gain)
        for linear in writers:
            self.change(linear, "weight", lambda w, q: q.mT @ w, along=1)
            if linear.bias is not None:
                self.change(linear, "bias", lambda b, q: q.mT @ b)

    def change(
        self, module: nn.Module, name: str, how: Callable[..., Tensor], along: int = 0
    ) -> None:
        """Replace a parameter by what becomes of it, computed in float32 at least.

        Of a matrix some rows at a time, or, along 1, some columns.
        """
        p = module.get_parameter(name)
        dtype = torch.promote_types(p.dtype, torch.float32)
        values, q = present(p), self.q.to(p.device, dtype)
        size = max(1, PART * values.shape[along] // values.numel()) if p.dim() > 1 else len(p)
        turned = torch.empty_like(values)
        for into, part in zip(turned.split(size, along), values.split(size, along), strict=True):
            into.copy_(how(part.to(dtype), q))
        if isinstance(p, Absent):
            assert self.keep is not None
            read = self.keep(f"{self.names[module]}.{name}", turned)
            module._parameters[name] = Absent.of(p, read, p.device)
        else:
            p.data = turned
