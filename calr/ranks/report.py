"""What is kept: exact counts, layer by layer and in all."""

from collections.abc import Mapping, Sequence
from typing import Any

from calr.model import Matrix, Structure
from calr.ranks.budget import Ranks, Shape
from calr_kernels.forms import Form
from calr_kernels.layout import Layout

Stored = Mapping[str, Mapping[str, Any]]  # {layer: {"layout", "rank"}} of those that are factored


def stored_at(ranks: Ranks, layout: Layout) -> dict[str, dict[str, Any]]:
    """State how layers of given ranks are stored; those left dense are not listed."""
    return {n: {"layout": layout, "rank": r} for n, r in ranks.items() if r is not None}


def rows(structure: Structure, stored: Stored) -> list[dict[str, Any]]:
    """Describe every layer: name, shape, input group, rank (None: dense), layout, parameters."""
    found = []
    for layer in structure.layers:
        how = stored.get(layer.name, {"layout": "dense", "rank": None})
        shape = Shape(layer.name, layer.out_features, layer.in_features)
        found.append(
            {
                "name": layer.name,
                "shape": [layer.out_features, layer.in_features],
                "group": layer.group,
                "rank": how["rank"],
                "layout": how["layout"],
                "parameters": shape.cost(how["layout"], how["rank"]),
            }
        )
    return found


def totals(structure: Structure, stored: Stored) -> dict[str, float]:
    """Count what is kept of the linear layers and of the whole model."""
    dense = structure.linear_parameters
    kept = sum(row["parameters"] for row in rows(structure, stored))
    return {
        "linear_parameters": dense,
        "kept_parameters": kept,
        "keep": kept / dense,
        "dense_model_parameters": structure.model_parameters,
        "model_parameters": structure.model_parameters - (dense - kept),
        "removed_of_model": (dense - kept) / structure.model_parameters,
    }


def pivot_bytes(stored: Stored) -> int:
    """Count the bytes of the outputs that pivoted layers name, an int32 each."""
    return sum(4 * how["rank"] for how in stored.values() if how["layout"] == "pivoted")


def outcome(structure: Structure, stored: Stored) -> dict[str, float]:
    """Count what a compressed model keeps of its dense structure, and how many layers are what."""
    return totals(structure, stored) | {
        "coverage": structure.coverage,
        "factored_layers": len(stored),
        "dense_layers": len(structure.layers) - len(stored),
    }


def quantised_rows(
    matrices: Sequence[Matrix], stored: Stored, element: int
) -> list[dict[str, Any]]:
    """Describe every matrix: name, shape, bits (None: not quantised), levels, scale group, bytes.

    element: bytes of a number that is not quantised.
    """
    found = []
    for matrix in matrices:
        how = stored.get(matrix.name)
        form = None if how is None else Form(**how)
        sizes = matrix.out_features, matrix.in_features
        found.append(
            {
                "name": matrix.name,
                "kind": matrix.kind,
                "shape": list(sizes),
                "bits": form and form.bits,
                "levels": form and form.levels,
                "scale_group": form and form.scale_group,
                "corrective_rank": form and form.corrective_rank,
                "bytes": form.bytes(*sizes, element) if form else matrix.parameters * element,
            }
        )
    return found


def byte_totals(structure: Structure, size: int) -> dict[str, float]:
    """Count the bytes of a compressed model's tensors: size, and bits per parameter of the dense
    one."""
    return {
        "tensor_bytes": size,
        "bits_per_parameter": 8 * size / structure.model_parameters,
    }
