"""What trial ranks do to the final hidden state: the measure of allocation=last_k."""

from torch import Tensor, nn

from calr.model import BlockRunner, Structure, Swapped, two_factor
from calr.ranks.budget import Budget, Ranks, Shape
from calr.ranks.decompositions import PROBES, Decompositions


def by_block(budget: Budget, structure: Structure) -> list[list[Shape]]:
    """Group a budget's shapes by the block of their layer."""
    shapes = {shape.name: shape for shape in budget.shapes}
    return [
        [shapes[layer.name] for layer in structure.in_block(block) if layer.name in shapes]
        for block in range(structure.blocks)
    ]


class FinalState:
    """The dense model's hidden states on a few windows, and what trial ranks make of the last."""

    def __init__(self, decompositions: Decompositions) -> None:
        self.decompositions, self.model = decompositions, decompositions.model
        self.structure = decompositions.structure
        ids = decompositions.statistics.ids[:PROBES]
        self.runner = BlockRunner(self.model, self.structure, ids)
        self.inputs = [self.runner.hidden]
        for block in range(self.structure.blocks):
            self.inputs.append(self.runner.run(block, self.inputs[-1]))

    def error(self, ranks: Ranks) -> float:
        """Return the relative squared error of the final hidden state."""
        trial = {x.name: x for x in self.structure.layers if ranks.get(x.name) is not None}
        first = min((layer.block for layer in trial.values()), default=self.structure.blocks)
        with Swapped[nn.Module](self.model) as places:
            for name, layer in trial.items():
                rank, dense = ranks[name], self.model.get_submodule(name)
                assert rank is not None and isinstance(dense, nn.Linear)
                low = two_factor(dense, *self.decompositions.of(layer).factors(rank))
                places.put(name, low.to(dense.weight.dtype))
            hidden = self.inputs[first]
            for block in range(first, self.structure.blocks):
                hidden = self.runner.run(block, hidden)
        return _relative_error(hidden, self.inputs[-1])


def _relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    pairs = zip(found, exact, strict=True)
    wrong = sum(float((h.double() - y.double()).square().sum()) for h, y in pairs)
    return wrong / sum(float(y.double().square().sum()) for y in exact)
