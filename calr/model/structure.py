"""What a causal language model is made of: decoder blocks, their linear layers, input groups.

Found from the module tree and one traced forward pass, never from a table of model names.
"""

import fnmatch
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calr.errors import CalrError
from calr.integrations.experts import all_experts, every_expert
from calr.model.swapping import evaluating, hooked
from calr_kernels import LowRankLinear, QuantizedLinear

UNCOVERED_LIMIT = 0.1  # share of stacked expert weights above which a model is refused


@dataclass(frozen=True)
class Layer:
    """A linear layer of a decoder block. Layers of one group read the same input.

    share: of the tokens, that reach it; below 1 for an expert's, which are routed to it.
    """

    name: str
    block: int
    group: str
    in_features: int
    out_features: int
    skipped: bool = False
    share: float = 1.0

    @property
    def parameters(self) -> int:
        """Numbers in its dense weight."""
        return self.out_features * self.in_features

    @property
    def routed(self) -> bool:
        """Tell whether only tokens that are routed to it reach it."""
        return self.share < 1

    @property
    def stack(self) -> str:
        """Name of the list that holds it: of an expert, all experts' layers of its kind."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Structure:
    """The decoder of a model.

    blocks_name names the module list of its blocks. tuple_output tells whether a block returns a
    tuple. block_parameters and model_parameters count all parameters there (tied ones once).
    """

    blocks_name: str
    blocks: int
    layers: tuple[Layer, ...]
    tuple_output: bool
    block_parameters: int
    model_parameters: int

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear layers found: what `keep` is a fraction of."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def coverage(self) -> float:
        """Share of the blocks' parameters that can be compressed."""
        return sum(s.parameters for s in self.layers if not s.skipped) / self.block_parameters

    @property
    def active_parameters(self) -> float:
        """Parameters that the mean token meets."""
        idle = sum((1 - layer.share) * layer.parameters for layer in self.layers)
        return self.model_parameters - idle

    def in_block(self, block: int) -> list[Layer]:
        """List the layers of one block, in order of execution."""
        return [layer for layer in self.layers if layer.block == block]


def analyse(model: PreTrainedModel, skip: Sequence[str] = ()) -> Structure:
    """Find blocks, linear layers and input groups of a model, which may live on the meta device.

    skip: fnmatch patterns of layer names that stay dense. Raises CalrError for one that is no
    causal language model, is compressed or quantised already, shares linear layers, keeps its
    weights elsewhere (Conv1D, experts that were not taken apart), or whose layers a pattern does
    not match.
    """
    if not model.can_generate():
        raise CalrError(
            f"{type(model).__name__}: cannot generate text; AutoModelForCausalLM loads what can"
        )
    _refuse_compressed(model)
    _refuse_adapters(model)
    if model.config.get_text_config(decoder=True) is not model.config:
        raise CalrError(
            f"{type(model).__name__}: is multimodal, which is not supported; load its text model"
        )
    name, blocks = find_blocks(model)
    linears = _linears(name, blocks)
    groups, tuple_output = _trace(model, blocks, linears)
    shares = _shares(model)
    unmatched = [p for p in skip if not any(fnmatch.fnmatch(n, p) for n in linears)]
    if unmatched:
        raise CalrError(
            f"skip={unmatched[0]!r}: matches none of the {len(linears)} linear layers, "
            f"which are named like {next(iter(linears))!r}"
        )
    layers = tuple(
        Layer(
            name=linear,
            block=int(linear.removeprefix(f"{name}.").split(".")[0]),
            group=group,
            in_features=linears[linear].in_features,
            out_features=linears[linear].out_features,
            skipped=any(fnmatch.fnmatch(linear, pattern) for pattern in skip),
            share=shares.get(linear.rpartition(".")[0], 1.0),
        )
        for linear, group in groups.items()
    )
    if not layers:
        raise CalrError(f"{name}: none of its linear layers took part in a forward pass")
    return Structure(
        blocks_name=name,
        blocks=len(blocks),
        layers=layers,
        tuple_output=tuple_output,
        block_parameters=sum(p.numel() for p in blocks.parameters()),
        model_parameters=sum(p.numel() for p in model.parameters()),
    )


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of decoder blocks: the module list with most parameters."""
    lists = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    if not lists:
        raise CalrError(f"{type(model).__name__}: has no list of decoder blocks to compress")
    _, name, blocks = max(lists, key=lambda entry: entry[0])
    return name, blocks


def check_window(model: PreTrainedModel, name: str, tokens: int) -> None:
    """Raise CalrError for an argument that asks for more tokens than the model has positions.

    Only a table of learned positions ends; rotary ones go on.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    learned = any(
        isinstance(module, nn.Embedding) and "position" in name
        for name, module in model.named_modules()
    )
    if learned and positions is not None and tokens > positions:
        raise CalrError(f"{name}={tokens}: the model has {positions} positions; lower it")


def check_vocabulary(model: PreTrainedModel, what: str, ids: Tensor) -> None:
    """Raise CalrError, beginning with what, for token ids that the model has no embedding of."""
    embeddings: Any = model.get_input_embeddings()
    if ids.numel() and int(ids.max()) >= embeddings.num_embeddings:
        raise CalrError(
            f"{what}: {int(ids.max())} is outside the model's vocabulary of "
            f"{embeddings.num_embeddings}; is it another model's tokenizer?"
        )


def _refuse_compressed(model: PreTrainedModel) -> None:
    if any(isinstance(module, LowRankLinear | QuantizedLinear) for module in model.modules()):
        raise CalrError("the model is compressed already; start from its dense original")
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        method = (
            quantization.get("quant_method")
            if isinstance(quantization, dict)
            else getattr(quantization, "quant_method", None)
        )
        raise CalrError(
            f"the model is quantised already ({method}); start from its dense original, or load a "
            "GGUF file with dequantize=True"
        )


def _refuse_adapters(model: nn.Module) -> None:
    adapted = [n for n, m in model.named_modules() if type(m).__module__.startswith("peft.")]
    if adapted:
        raise CalrError(
            f"{adapted[0] or type(model).__name__}: is a PEFT adapter; merge it into the model "
            "first (merge_and_unload)"
        )


def _linears(name: str, blocks: nn.ModuleList) -> dict[str, nn.Linear]:
    """Return the blocks' plain linear layers by full name; refuse weights that would be missed."""
    total = sum(p.numel() for p in blocks.parameters())
    if not total:
        raise CalrError(f"{name}: its blocks have no weights; config.json is damaged")
    conv = [n for n, m in blocks.named_modules() if isinstance(m, Conv1D)]
    if conv:
        raise CalrError(
            f"{name}.{conv[0]}: is a Conv1D (GPT-2 style, weight stored transposed), which calr "
            "does not support; use a model with nn.Linear layers"
        )
    stacked = {n: p for n, p in blocks.named_parameters() if p.dim() >= 3}
    share = sum(p.numel() for p in stacked.values()) / total
    if share > UNCOVERED_LIMIT:
        first, parameter = next(iter(stacked.items()))
        raise CalrError(
            f"{name}.{first} {list(parameter.shape)}: {share:.0%} of the blocks' parameters are "
            "stacked weights of experts; calr.compress takes apart those of the form that "
            "transformers documents, and no others"
        )
    found = {f"{name}.{n}": m for n, m in blocks.named_modules() if type(m) is nn.Linear}
    derived = {
        n: m
        for n, m in blocks.named_modules()
        if isinstance(m, nn.Linear) and type(m) is not nn.Linear
    }
    if sum(m.weight.numel() for m in derived.values()) > UNCOVERED_LIMIT * total:
        first, module = next(iter(derived.items()))
        raise CalrError(
            f"{name}.{first}: {type(module).__name__} is not nn.Linear but a class of its own, "
            "which calr does not support"
        )
    owners: dict[int, str] = {}
    for linear, module in found.items():
        other = owners.setdefault(id(module.weight), linear)
        if other != linear:
            raise CalrError(f"{linear}: shares its weight with {other}, which is not supported")
    return found


@torch.no_grad()
def _trace(
    model: PreTrainedModel, blocks: nn.ModuleList, linears: dict[str, nn.Linear]
) -> tuple[dict[str, str], bool]:
    """Run one short forward pass; return each executed layer's group, and the blocks' output kind.

    A group is named after its first layer. Inputs are kept alive, so identity means sameness.
    """
    inputs: dict[str, Tensor] = {}
    outputs: list[bool] = []

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name] = args[0]

        return hook

    hooks = [module.register_forward_pre_hook(record(n)) for n, module in linears.items()]
    hooks.append(
        blocks[0].register_forward_hook(lambda m, a, out: outputs.append(isinstance(out, tuple)))
    )
    with hooked(hooks), evaluating(model), every_expert(model):
        device = next(blocks.parameters()).device
        with _values_unread(device):
            ids = torch.ones(1, 8, dtype=torch.long, device=device)
            decoder(model)(input_ids=ids, use_cache=False)
    idle = {name: module.weight.numel() for name, module in linears.items() if name not in inputs}
    if sum(idle.values()) > UNCOVERED_LIMIT * sum(p.numel() for p in blocks.parameters()):
        raise CalrError(
            f"{next(iter(idle))}: did not run for a few tokens, like {len(idle) - 1} other linear "
            "layers (experts?); models that use their layers selectively are not supported"
        )
    first: dict[int, str] = {}
    return {n: first.setdefault(id(x), n) for n, x in inputs.items()}, outputs[0]


def _shares(model: nn.Module) -> dict[str, float]:
    """Return the share of tokens that reach each expert, by the name of a list of its layers."""
    return {
        f"{name}.{part}": experts.top_k / experts.num_experts
        for name, experts in all_experts(model)
        for part, _ in experts.named_children()
    }


def _values_unread(device: torch.device) -> AbstractContextManager[object]:
    """On the meta device, make models skip the mask shortcuts that would read tensor values."""
    if device.type != "meta":
        return nullcontext()
    return FakeTensorMode(allow_non_fake_inputs=True)


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the model without its language-modelling head."""
    inner: nn.Module = model.base_model
    return inner
