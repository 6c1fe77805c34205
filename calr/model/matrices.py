"""The weight matrices of a model that may be quantised: linear layers, embeddings, lm_head."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from calr.integrations.modules import can_be_quantised
from calr.model.structure import Layer, Structure


@dataclass(frozen=True)
class Matrix:
    """A weight [out_features, in_features] that is stored once, under the name of its module.

    kind: a "linear" layer of a block, whose `layer` says more; the "embedding"; the "head"; or
    "tied", the embedding that is lm_head, too. names: of all modules that hold it.
    """

    kind: Literal["linear", "embedding", "head", "tied"]
    names: tuple[str, ...]
    out_features: int
    in_features: int
    layer: Layer | None = None

    @property
    def name(self) -> str:
        """Of the module under which it is stored."""
        return self.names[0]

    @property
    def parameters(self) -> int:
        """Numbers in it."""
        return self.out_features * self.in_features


def matrices(model: PreTrainedModel, structure: Structure) -> list[Matrix]:
    """List the matrices of a model that are not skipped, those of the blocks first.

    An embedding or lm_head of a class of its own that does more than look up or multiply is left
    out.
    """
    found = [
        Matrix("linear", (x.name,), x.out_features, x.in_features, x)
        for x in structure.layers
        if not x.skipped
    ]
    names = {id(module): name for name, module in model.named_modules()}
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    looked_up = isinstance(embedding, nn.Embedding) and can_be_quantised(embedding)
    tied = head is not None and head.weight is embedding.weight
    if looked_up and tied and type(head) is nn.Linear:
        both = (names[id(embedding)], names[id(head)])
        rows, columns = embedding.weight.shape
        return [*found, Matrix("tied", both, rows, columns)]
    for kind, module, fits in (
        ("embedding", embedding, looked_up and not tied),
        ("head", head, type(head) is nn.Linear and not tied),
    ):
        if fits:
            rows, columns = module.weight.shape
            found.append(Matrix(kind, (names[id(module)],), rows, columns))  # type: ignore[arg-type]
    return found
