"""A compressed model as an ordinary dense checkpoint: the same function, the dense model's size."""

from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from calr.errors import CalrError
from calr.integrations.experts import all_experts
from calr.model import (
    digest,
    fingerprint,
    is_compressed,
    load,
    require_same,
    saver,
    tensor_bytes,
)
from calr.storage import (
    destination,
    model_card,
    read_manifest,
    size,
    verify,
    write_at_once,
)

WHAT = "the same function in dense matrices, for programs that do not know calr"


def export_dense(
    source: str,
    directory: str | Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a compressed checkpoint as a dense one, whole or not at all; return what it became.

    Raises CalrError for a source that is no checkpoint of calr's or is damaged, and for a directory
    that holds something else (without overwrite).
    """
    place = destination(directory, source, statistics=None, overwrite=overwrite)
    model, tokenizer = load_compressed(source, trust_remote_code=trust_remote_code)
    before, key = tensor_bytes(model), digest(fingerprint(model), "dense")
    made = yaml.safe_dump(model.config.quantization_config.recipe, sort_keys=False)
    model = model.dequantize()
    results: dict[str, Any] = {"source_bytes": before, "tensor_bytes": tensor_bytes(model)}
    command = "calr export {model} OUTPUT --to dense"
    write_at_once(
        saver(model, tokenizer),
        place,
        model_card(source, WHAT, command, made, results, needs_calr=False),
        key=key,
        summary={"model": source, "to": "dense"},
        results=results,
        overwrite=overwrite,
        check=partial(require_same, model, trust_remote_code=trust_remote_code),
    )
    return results | {"bytes": size(place), "directory": str(place)}


def load_compressed(source: str, *, trust_remote_code: bool) -> Any:
    """Load a checkpoint of calr's, its files checked against their checksums."""
    if not is_compressed(Path(source)):
        raise CalrError(f"{source}: is no checkpoint written by calr")
    if read_manifest(Path(source)) is not None:
        verify(Path(source))
    return load(source, trust_remote_code=trust_remote_code)


def require_no_experts(model: nn.Module, target: str) -> None:
    """Refuse a mixture, whose experts have forms of their own."""
    for name, _ in all_experts(model):
        raise CalrError(
            f"{name}: {target} keeps all experts of a block in one form, which calr does not "
            "write; --to dense"
        )
