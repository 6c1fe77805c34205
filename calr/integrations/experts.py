"""Mixtures of experts with every expert's matrices as linear layers of their own.

transformers keeps all experts of a block as one tensor of three dimensions. Taken apart, each has
its own second moment, form and records, and only those that tokens are routed to are computed with.
"""

import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PARTS = {"gate_up": "gate_up_proj", "up": "up_proj", "down": "down_proj"}  # ours: transformers'

INNER = ".down"  # ends the name of layers that read what each expert makes by itself


class Experts(nn.Module):
    """The experts of one block: `gate_up` (or `up`) and `down`, lists of linear layers.

    Names of their own, so that transformers does not take them for parts of the tensors that it
    would stack when it loads, or split when it saves. Call: hidden states [tokens, H], the experts
    chosen for each token [tokens, k] and their weights [tokens, k] -> [tokens, H].
    """

    fused: Any  # transformers' module, without its tensors

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.num_experts = int(fused.down_proj.shape[0])
        self.top_k = 0  # experts a token, once a trace has seen it
        self.every = False  # run each on all tokens, as a trace wants it
        for own, name in PARTS.items():
            if name in fused._parameters:
                self.add_module(own, nn.ModuleList(_apart(fused, name)))
        vars(self)["fused"] = fused  # no submodule: kept for its activation, and to be filled again

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Add up the outputs of the experts that were chosen."""
        total, top_k = torch.zeros_like(hidden_states), index.shape[-1]
        if self.every:
            self.top_k = top_k
            for expert in range(self.num_experts):
                total = total + self._one(expert, hidden_states.view_as(hidden_states))
            return total
        order = index.reshape(-1).argsort(stable=True)
        hit, counts = index.reshape(-1).unique(return_counts=True)
        each = zip(hit.tolist(), order.split(counts.tolist()), strict=True)
        for expert, places in each:
            if expert < self.num_experts:  # another stands for none
                tokens = places // top_k
                found = self._one(expert, hidden_states[tokens])
                found = found * weights.reshape(-1)[places, None]
                total.index_add_(0, tokens, found.to(total.dtype))
        return total

    def readers(self) -> list[nn.Module]:
        """List the layers that read the hidden states."""
        return list(self.get_submodule("gate_up" if self.fused.has_gate else "up").children())

    def _one(self, expert: int, x: Tensor) -> Tensor:
        if self.fused.has_gate:
            inner = self.fused._apply_gate(self.get_submodule(f"gate_up.{expert}")(x))
        else:
            inner = self.fused.act_fn(self.get_submodule(f"up.{expert}")(x))
        found: Tensor = self.get_submodule(f"down.{expert}")(inner)
        return found


def all_experts(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Find the mixtures of a model that were taken apart, by name."""
    return ((name, module) for name, module in model.named_modules() if type(module) is Experts)


def take_apart(model: nn.Module) -> None:
    """Give every expert layers of its own, in place: the same function."""
    for name, module in list(model.named_modules()):
        if _is_fused(module):
            model.set_submodule(name, Experts(module).train(module.training))


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put experts together again that were taken apart in the block, if it fails."""
    before = {name for name, _ in all_experts(model)}
    try:
        yield
    except BaseException:
        put_together(model, but=before)
        raise


def put_together(model: nn.Module, but: Collection[str] = ()) -> None:
    """Stack experts again, in place, whose layers are all dense and in memory."""
    for name, module in list(all_experts(model)):
        if name not in but and all(map(_is_dense, _layers(module))):
            fused: Any = module.fused
            for own, part in PARTS.items():
                if hasattr(module, own):
                    _stack(fused, part, list(module.get_submodule(own).children()))
            model.set_submodule(name, fused.train(module.training))


@contextmanager
def every_expert(model: nn.Module) -> Iterator[None]:
    """Have all experts run on all tokens, in the block; what comes out is no model's output."""
    found = [module for _, module in all_experts(model)]
    for module in found:
        module.every = True
    try:
        yield
    finally:
        for module in found:
            module.every = False


def _is_fused(module: Any) -> bool:
    """Tell whether a module holds experts in the form that transformers documents, and no more.

    One that somebody watches, or has given another forward, is left alone.
    """
    if not hasattr(module, "is_transposed") or getattr(module, "has_post_expert_norm", False):
        return False
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    first = "gate_up_proj" if module.has_gate else "up_proj"
    names = {first, "down_proj"}
    if module.has_bias:
        names |= {f"{name}_bias" for name in names}
    held = {name for name, _ in itertools.chain(module.named_parameters(), module.named_buffers())}
    return held == names and module.down_proj.dim() == 3


def _is_dense(layer: nn.Module) -> bool:
    """Tell whether a layer is a plain linear one, its weight in memory."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter


def _layers(experts: Experts) -> Iterator[nn.Module]:
    return (layer for part in experts.children() for layer in part.children())


def _apart(fused: Any, name: str) -> list[nn.Linear]:
    """Take one tensor, and its biases, out of a module: a linear layer for each expert."""
    stacked, bias = fused._parameters.pop(name), fused._parameters.pop(f"{name}_bias", None)
    made = []
    for expert in range(len(stacked)):
        weight = stacked.detach()[expert]
        weight = (weight.mT if fused.is_transposed else weight).clone(
            memory_format=torch.contiguous_format
        )
        rows, columns = weight.shape
        layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=stacked.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach()[expert].clone(), bias.requires_grad)
        made.append(layer)
    return made


def _stack(fused: Any, name: str, layers: list[Any]) -> None:
    """Give a module one tensor, and its biases, of linear layers."""
    weights = [layer.weight.detach() for layer in layers]
    if fused.is_transposed:
        weights = [weight.mT for weight in weights]
    trained = layers[0].weight.requires_grad
    fused.register_parameter(name, nn.Parameter(torch.stack(weights), trained))
    if layers[0].bias is not None:
        biases = torch.stack([layer.bias.detach() for layer in layers])
        fused.register_parameter(f"{name}_bias", nn.Parameter(biases, trained))
