"""Compress a model: calibrate, choose ranks, factorise, correct, replace the layers."""

import dataclasses
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calr import parallel
from calr.errors import CalrError
from calr.evaluation import measured
from calr.integrations.experts import as_it_was
from calr.job import Job
from calr.model import (
    GGUF_DTYPE,
    check_window,
    gguf_files,
    load,
    on_grid,
    require_same,
    saver,
    tensor_bytes,
)
from calr.progress import Phase, measured_phases
from calr.recipe import Recipe
from calr.storage import (
    Store,
    claim,
    destination,
    finished,
    give_up,
    locked,
    model_card,
    open_parts,
    prepare,
    recipe_yaml,
    remove_offloaded,
    size,
    write,
    writing,
)
from calr.text import Source, evaluation_windows


def compress(
    model: PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    calibration: Source | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    statistics: str | Path | None = None,
    work: str | Path | None = None,
    elastic: bool = False,
    max_memory: str | None = None,
    device_memory: str | None = None,
) -> PreTrainedModel:
    """Compress a dense causal language model in place and return it.

    calibration: a path or source (see calr.text), a list of texts, or token ids [S, T]; None is
    text sampled from the model itself. tokenizer: needed for text; by default that of
    model.name_or_path. statistics: a directory in which calibration statistics are kept and
    found again. work: a directory for finished parts, so that a killed run can continue
    (another one is refused there). elastic: keep every layer whole, as ordered factors with
    their error curves, for `resize`; keep, layout and training do not count then. max_memory,
    device_memory: what the process and the model's GPU may take, such as 8GB, by the estimates
    that `plan` shows: text is sampled in smaller batches, activations are computed twice. The
    model is changed only after everything has been computed, but for a rotation that leaves its
    function as it is; CalrError says what is wrong otherwise.

    >>> import torch
    >>> from calr.testing import tiny_llama
    >>> model = compress(tiny_llama(), Recipe(keep=0.5), calibration=torch.ones(2, 8).long())
    >>> type(model.model.layers[0].mlp.up_proj).__name__
    'LowRankLinear'
    """
    recipe = recipe or _default(elastic)
    if work is not None and Path(work).is_file():
        raise CalrError(f"{work}: is a file; name a directory")
    with as_it_was(model):
        limits: dict[str, Any] = {"max_memory": max_memory, "device_memory": device_memory}
        job = Job.of(model, recipe, calibration, tokenizer, elastic, **limits)
        if work is None:
            return job.run(Store(), statistics)
        with locked(Path(work) / "lock", str(work)):
            refusal = "holds parts of another run; name another directory or delete it"
            return job.run(claim(Path(work), job.key, refusal), statistics)


def compress_to(
    source: str | Path,
    directory: str | Path,
    recipe: Recipe | None = None,
    *,
    calibration: str | Path = "sampled",
    statistics: str | Path | None = None,
    elastic: bool = False,
    overwrite: bool = False,
    eval_windows: int = 8,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    max_memory: str | None = None,
    device_memory: str | None = None,
    offload: str | Path | None = None,
) -> dict[str, Any]:
    """Compress a model into a directory, whole or not at all, and return what it became.

    source, dtype, device and trust_remote_code: as in `load`; max_memory and device_memory: as in
    `compress`. Finished parts lie in DIRECTORY/.calr, or in a folder of offload, until the
    checkpoint is written: the same call continues where a killed one stopped and ends with the
    same bits. What a GGUF file holds is computed with in float32 and stored in bfloat16, where
    no dtype is named; weights that are quantised there are not rotated, off the grid on which
    they lie. eval_windows: windows of held-out built-in text on which the result is compared
    with the dense model, which is loaded again for that; 0: none. "phases" of the result: what
    each took, beside what was expected. Raises CalrError for a directory that holds something
    else (without overwrite), for calibration that has no name, and for what `load` and
    `compress` refuse.
    """
    started, recipe = time.monotonic(), recipe or _default(elastic)
    if not isinstance(calibration, str | Path):
        raise CalrError("calibration: name a file or a source; what is in memory is for `compress`")
    source, calibration = str(source), str(calibration)
    place = destination(
        directory, source, statistics=statistics, overwrite=overwrite, offload=offload
    )
    files = gguf_files(source)
    widened = bool(files) and dtype == "auto"
    loading: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    loading |= {"dtype": "float32" if widened else dtype, "lazily": not elastic}
    options = {"calibration": calibration, "elastic": elastic, "eval_windows": eval_windows}
    options |= {"dtype": dtype, "trust_remote_code": trust_remote_code}
    with measured_phases("loading") as phases:
        model, tokenizer = load(source, **loading)
        stored = GGUF_DTYPE if widened else None
        if recipe.quantised and on_grid(source):
            recipe = dataclasses.replace(recipe, rotate=False)
        limits: dict[str, Any] = {"max_memory": max_memory, "device_memory": device_memory}
        job = Job.of(
            model, recipe, calibration, tokenizer, elastic, stored, **limits, source=source
        )
        held_out = _held_out(model, tokenizer, eval_windows, recipe.window)
        before = sum(file.stat().st_size for file in files) or tensor_bytes(model)
        key, results = job.key, None
        with writing(place) if parallel.first() else nullcontext():
            if parallel.first() and not overwrite:
                results = finished(place, key)
            results = parallel.agree(results)
            if results is not None:
                remove_offloaded(place, offload)
                return results | {"bytes": size(place), "directory": str(place)}
            parts = _parts(place, job, source, overwrite, offload)
            job.run(parts, statistics)
            if parallel.first():
                results = job.outcome(before)
                if held_out is not None:
                    dense, _ = load(source, **loading)
                    results |= measured(model, dense, held_out)
                    del dense
                results["seconds"] = round(time.monotonic() - started, 1)
                _write(job, source, place, results, options)
                remove_offloaded(place, offload)
            results = parallel.agree(results) or {}
    results |= {"bytes": size(place), "directory": str(place)}
    return results | {"phases": _beside(phases, job.expected)}


def _held_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: int, window: int
) -> Tensor | None:
    """Return the text [S, T] on which the result is compared, before anything long begins."""
    if not windows:
        return None
    check_window(model, "window", window)
    try:
        return evaluation_windows("builtin", tokenizer, windows=windows, window=window)
    except CalrError as error:
        raise CalrError(f"{error}; lower window, or leave it out: eval_windows=0") from error


def _parts(
    place: Path, job: Job, source: str, overwrite: bool, offload: str | Path | None
) -> Store:
    """Open the store of finished parts, which the first process makes ready."""
    summary = {"model": source, "budget": job.recipe.budget, "method": job.recipe.method}
    with parallel.first_then_others():
        if parallel.first():
            if overwrite:
                give_up(place, job.key)
            prepare(place, job.key, summary, overwrite=overwrite)
        return open_parts(place, offload, job.key)


def _write(
    job: Job, source: str, place: Path, results: dict[str, Any], options: dict[str, Any]
) -> None:
    """Write the checkpoint and its card; options: of the card's recipe."""
    if job.elastic:
        results["cut_it_with"] = "calr resize DIRECTORY OUTPUT --keep 0.7"
    command = "calr compress {model} OUTPUT --config recipe.yaml"
    recipe = recipe_yaml(job.recipe, options)
    card = model_card(source, job.what, command, recipe, results)
    trust = options["trust_remote_code"]
    check = partial(require_same, job.model, trust_remote_code=trust)
    assert job.tokenizer is not None
    save = saver(job.model, job.tokenizer)
    write(save, place, card, key=job.key, results=results, check=check)


def _beside(measured: dict[str, Phase], expected: dict[str, Phase]) -> dict[str, dict[str, float]]:
    """List what phases took, beside what was expected of those of which something was."""
    found = {name: phase.to_dict() for name, phase in measured.items()}
    for name in expected.keys() & measured.keys():
        found[name] |= expected[name].to_dict("expected_")
    return found


def _default(elastic: bool) -> Recipe:
    return Recipe(keep=1.0) if elastic else Recipe()
