"""The commands behind the command line."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from calr import allocation, benchmark, checkpoint, elastic, models, planning
from calr.calibration import check_finite, fingerprint
from calr.cli import recipe_of
from calr.compression import compress as compress_model
from calr.compression import parameter_report, require_reachable
from calr.errors import CalrError
from calr.evaluation import perplexity
from calr.inference import optimize_for_inference
from calr.integrations.lm_eval import evaluate, retention
from calr.integrations.transformers import CalrConfig, replace_with_low_rank
from calr.models import is_compressed
from calr.structure import Structure, analyse, check_window
from calr.text import content_of, evaluation_windows
from calr_kernels.nn import Layout

LOADING = ("dtype", "device", "trust_remote_code")
logger = logging.get_logger(__name__)


def plan(arguments: Namespace) -> None:
    """Print ranks, parameters, bytes, memory and time of a compression."""
    if arguments.elastic:
        raise CalrError("elastic: has nothing to plan, every layer is kept whole; leave it out")
    result = planning.plan(
        arguments.model,
        recipe_of(arguments),
        statistics=arguments.statistics,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.json:
        _print_json(result.to_dict())
        return
    _print_layers(result.layers)
    if result.ranks_follow_calibration:
        print("Ranks follow calibration under this allocation; shown are nearly uniform ones.")
    if result.feasible_last_k:
        print("How many last blocks, k, follows calibration; each layer of theirs keeps:")
        shown = (f"k={k}: {c['keep_per_layer']:.3f}" for k, c in result.feasible_last_k.items())
        print(", ".join(shown) + " (ranks for each k: --json)")
    totals = result.totals
    _print_facts(
        {
            "keep (of the decoder's linear parameters)": f"{totals['keep']:.4f}",
            "removed of the whole model": f"{totals['removed_of_model']:.2%}",
            "compressible share of the decoder blocks": f"{result.coverage:.2%}",
            "weights": f"{_gigabytes(totals['bytes_before'])} -> "
            f"{_gigabytes(totals['bytes_after'])}",
            "peak memory (estimate)": _gigabytes(result.peak_memory_bytes),
            "time (estimate, this machine's CPU)": f"{result.seconds:.0f} s",
        }
    )


def compress(arguments: Namespace) -> None:
    """Compress a model into a directory and print what it became."""
    started = time.monotonic()
    recipe, directory = recipe_of(arguments), _destination(arguments)
    model, tokenizer = _load(arguments, arguments.model)
    structure = analyse(model, recipe.skip)
    check_finite(model)
    require_reachable(structure, elastic.whole(recipe) if arguments.elastic else recipe)
    key = fingerprint(model, recipe, arguments.elastic, content_of(arguments.calibration))
    with checkpoint.writing(directory):
        work = checkpoint.prepare(
            directory,
            key,
            {"model": arguments.model, "keep": recipe.keep, "method": recipe.method},
            overwrite=arguments.overwrite,
        )
        before = _measure("dense", model, tokenizer, arguments.eval_windows, recipe.window)
        compress_model(
            model,
            recipe,
            calibration=arguments.calibration,
            tokenizer=tokenizer,
            statistics=arguments.statistics,
            work=work,
            elastic=arguments.elastic,
        )
        results = _outcome(model, structure)
        for name, value in model.config.quantization_config.recipe.get("correction", {}).items():
            results[f"correction_{name}"] = round(value, 4)
        results |= before
        results |= _measure("compressed", model, tokenizer, arguments.eval_windows, recipe.window)
        if arguments.elastic:
            results["cut_it_with"] = "calr resize DIRECTORY OUTPUT --keep 0.7"
        results["seconds"] = round(time.monotonic() - started, 1)
        command = "calr compress {model} OUTPUT --config recipe.yaml"
        card = checkpoint.model_card(arguments.model, command, recipe_yaml(arguments), results)
        checkpoint.write(model, tokenizer, directory, card)
    results["bytes"] = checkpoint.size(directory)
    results["directory"] = str(directory)
    _print_results(arguments, results)


def resize(arguments: Namespace) -> None:
    """Cut an elastic checkpoint to another size and print what it became."""
    directory = _destination(arguments)
    trust = arguments.trust_remote_code
    skeleton = models.load_skeleton(arguments.model, trust_remote_code=trust, dense=True)
    structure = analyse(skeleton)
    model, tokenizer = _load(arguments, arguments.model)
    options = {name: arguments[name] for name in ("keep", "layout", "solver")}
    elastic.resize(model, **options)
    results = _outcome(model, structure)
    with checkpoint.writing(directory):
        key = fingerprint(model, options)
        checkpoint.prepare(
            directory,
            key,
            {"model": arguments.model, "keep": arguments.keep},
            overwrite=arguments.overwrite,
        )
        made = yaml.safe_dump(model.config.quantization_config.recipe, sort_keys=False)
        command = " ".join(f"--{name} {value}" for name, value in options.items())
        command = f"calr resize {{model}} OUTPUT {command}"
        card = checkpoint.model_card(arguments.model, command, made, results)
        checkpoint.write(model, tokenizer, directory, card)
    results["bytes"] = checkpoint.size(directory)
    results["directory"] = str(directory)
    _print_results(arguments, results)


def eval(arguments: Namespace) -> None:
    """Print token perplexity and zero-shot accuracy of one model, or of two side by side."""
    sources = [arguments.model] + ([arguments.against] if arguments.against else [])
    both = bool(arguments.against and arguments.tasks)
    rows = []
    for source in sources:
        model, tokenizer = _load(arguments, source)
        row: dict[str, Any] = {"model": source}
        row["parameters"] = sum(p.numel() for p in model.parameters())
        if arguments.windows:
            check_window(model, "window", arguments.window)
            ids = evaluation_windows(
                arguments.text, tokenizer, windows=arguments.windows, window=arguments.window
            )
            row["token_perplexity"] = asdict(perplexity(model, ids))
        if arguments.tasks:
            row["tasks"] = evaluate(
                model,
                tokenizer,
                arguments.tasks,
                data=arguments.task_data,
                limit=arguments.limit,
                seed=arguments.seed,
            )
        rows.append(row)
        del model
    if arguments.json:
        kept = {"retention": retention(rows[0]["tasks"], rows[1]["tasks"])} if both else {}
        _print_json({"text": arguments.text, "models": rows, **kept})
        return
    for row in rows:
        print(f"{row['model']}: {row['parameters']:,} parameters")
        if "token_perplexity" in row:
            result = row["token_perplexity"]
            print(
                f"token perplexity {result['perplexity']:.3f} on {arguments.text} "
                f"({result['windows']} windows of {result['window']}, stride {result['window']}, "
                f"{result['predicted_tokens']} predicted tokens)"
            )
    if arguments.tasks:
        _print_tasks(rows)


def bench(arguments: Namespace) -> None:
    """Print tokens per second of one model, or of two taking turns."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sources = [arguments.model] + ([arguments.against] if arguments.against else [])
    timed = {source: _load(arguments, source)[0] for source in sources}
    for model in timed.values():
        check_window(model, "prompt_tokens", arguments.prompt_tokens)
        check_window(model, "new_tokens", benchmark.START + arguments.new_tokens - 1)
    optimize_for_inference(timed[arguments.model])
    rows = benchmark.bench(
        timed,
        prompt=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
    )
    if arguments.json:
        _print_json(rows)
        return
    table = Table("model", "parameters", "weights", "dtype", "prefill tokens/s", "decode tokens/s")
    for row in rows:
        speeds = [row[f"{kind}_tokens_per_second"] for kind in ("prefill", "decode")]
        table.add_row(
            Path(row["model"]).name,
            f"{row['parameters']:,}",
            _gigabytes(row["weight_bytes"]),
            row["dtype"],
            *(f"{s['median']:.1f} ({s['slowest']:.1f}-{s['fastest']:.1f})" for s in speeds),
        )
    if len(rows) == 2:
        ratios = [
            rows[0][f"{kind}_tokens_per_second"]["median"]
            / rows[1][f"{kind}_tokens_per_second"]["median"]
            for kind in ("prefill", "decode")
        ]
        table.add_row("first ÷ second", "", "", "", *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=120).print(table)
    print(f"medians (slowest-fastest) of {arguments.rounds} rounds, {rows[0]['threads']} threads")


def generate(arguments: Namespace) -> None:
    """Print a continuation of a prompt."""
    model, tokenizer = _load(arguments, arguments.model)
    optimize_for_inference(model)
    if arguments.chat and not tokenizer.chat_template:
        raise CalrError(f"{arguments.model}: has no chat template; leave --chat out")
    if arguments.chat:
        inputs: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": arguments.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(arguments.prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise CalrError("prompt: is empty, and the tokenizer adds no first token; give some text")
    fed = inputs["input_ids"].shape[1] + arguments.max_new_tokens - 1
    check_window(model, "prompt and max_new_tokens", fed)
    inputs = inputs.to(model.device)
    torch.manual_seed(arguments.seed)
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
    started = time.monotonic()
    generate: Any = model.generate
    output = generate(**inputs, max_new_tokens=arguments.max_new_tokens, **sampling)[0]
    new = output[inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    if arguments.json:
        seconds = time.monotonic() - started
        _print_json(
            {"prompt": arguments.prompt, "text": text, "tokens": len(new), "seconds": seconds}
        )
    else:
        print(text if arguments.chat else arguments.prompt + text)


def inspect(arguments: Namespace) -> None:
    """Print the layers, totals and recipe of a compressed checkpoint, from its config alone."""
    directory = Path(arguments.model)
    if not is_compressed(directory):
        raise CalrError(f"{directory}: is no checkpoint written by calr")
    block = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = CalrConfig(**block)
    skeleton = models.load_skeleton(arguments.model, dense=True)
    structure = analyse(skeleton)
    for name, stated in config.layers.items():  # refuses what the model cannot hold
        replace_with_low_rank(skeleton, name, **stated)
    rows: list[dict[str, Any]] = []
    kept = 0
    for layer in structure.layers:
        found = config.layers.get(layer.name, {"layout": "dense", "rank": None})
        layout: Layout = "pivoted" if found["layout"] == "pivoted" else "two_factor"
        stored = allocation.cost(layer.shape, layout, found["rank"])
        kept += stored
        rows.append(
            {
                "name": layer.name,
                "shape": [layer.out_features, layer.in_features],
                "group": layer.group,
                "rank": found["rank"],
                "layout": found["layout"],
                "parameters": stored,
            }
        )
    removed = structure.linear_parameters - kept
    totals = {
        "keep": kept / structure.linear_parameters,
        "removed_of_model": removed / structure.model_parameters,
        "model_parameters": structure.model_parameters - removed,
        "bytes": checkpoint.size(directory),
    }
    if arguments.json:
        _print_json({"layers": rows, "totals": totals, "recipe": config.recipe})
        return
    _print_layers(rows)
    _print_facts(totals | {f"recipe: {name}": value for name, value in config.recipe.items()})


def recipe_yaml(arguments: Namespace) -> str:
    """Return the YAML with which `calr compress` does the same again, anywhere."""
    places = {"model", "directory", "statistics", "config", "overwrite", "json", "device"}
    options = {name: value for name, value in vars(arguments).items() if name not in places}
    return str(yaml.safe_dump(json.loads(json.dumps(options)), sort_keys=False))


def _destination(arguments: Namespace) -> Path:
    """Return the directory to write to, before minutes of loading are spent."""
    directory, source = Path(arguments.directory), Path(arguments.model).resolve()
    home = source.parent if source.is_file() else source
    if home.exists() and directory.resolve() == home:
        raise CalrError(f"{directory}: is the model itself; name another directory")
    kept = arguments.get("statistics")
    if kept and Path(kept).resolve().is_relative_to(directory.resolve()):
        raise CalrError(f"statistics={kept}: lies in {directory}, which holds only the checkpoint")
    checkpoint.refuse(directory, overwrite=arguments.overwrite)
    return directory


def _outcome(model: PreTrainedModel, structure: Structure) -> dict[str, Any]:
    """Count what a compressed model keeps of its dense structure."""
    layers = model.config.quantization_config.layers
    ranks = {name: layer["rank"] for name, layer in layers.items()}
    layout = next((layer["layout"] for layer in layers.values()), "pivoted")
    return parameter_report(structure, ranks, layout) | {
        "coverage": structure.coverage,
        "factored_layers": len(layers),
        "dense_layers": len(structure.layers) - len(layers),
    }


def _load(arguments: Namespace, source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return models.load(source, **{name: arguments[name] for name in LOADING})


def _measure(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: int,
    window: int,
) -> dict[str, Any]:
    """Measure perplexity on built-in text that calibration never sees; nothing for no windows."""
    if not windows:
        return {}
    check_window(model, "window", window)
    ids = evaluation_windows("builtin", tokenizer, windows=windows, window=window)
    result = perplexity(model, ids)
    return {
        "perplexity_text": "builtin, held out",
        "perplexity_windows": result.windows,
        f"perplexity_{name}": round(result.perplexity, 3),
    }


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3f} GB"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _print_results(arguments: Namespace, results: dict[str, Any]) -> None:
    if arguments.json:
        _print_json(results)
    else:
        _print_facts(results)


def _print_facts(facts: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        shown = (
            f"{value:,}"
            if type(value) is int
            else f"{value:.4g}"
            if isinstance(value, float)
            else str(value)
        )
        table.add_row(name.replace("_", " "), shown)
    Console(width=110).print(table)


def _print_layers(layers: list[dict[str, Any]]) -> None:
    table = Table("layer", "shape", "layout", "rank", "parameters", "input group")
    for layer in layers:
        group = (
            "" if layer["group"] == layer["name"] else f"with {layer['group'].rpartition('.')[2]}"
        )
        table.add_row(
            layer["name"],
            "×".join(map(str, layer["shape"])),
            layer["layout"],
            str(layer["rank"] or ""),
            f"{layer['parameters']:,}",
            group,
        )
    Console(width=110).print(table)


def _print_tasks(rows: list[dict[str, Any]]) -> None:
    """Print accuracy per task; with two models also the retention, plain and above chance."""
    table = Table(
        "task", "rows", "chance", *(Path(row["model"]).name or row["model"] for row in rows)
    )
    compared = len(rows) == 2
    if compared:
        table.add_column("retention")
        table.add_column("above chance")
    for task, first in rows[0]["tasks"].items():
        cells = [
            f"{r['tasks'][task]['accuracy']:.3f} ± {r['tasks'][task]['stderr']:.3f}" for r in rows
        ]
        if compared:
            kept = retention({task: first}, {task: rows[1]["tasks"][task]})
            cells += [f"{kept['retention']:.3f}", f"{kept['above_chance']:.3f}"]
        table.add_row(task, str(first["rows"]), f"{first['chance']:.3f}", *cells)
    if compared:
        kept = retention(rows[0]["tasks"], rows[1]["tasks"])
        means = [
            f"{sum(t['accuracy'] for t in r['tasks'].values()) / len(r['tasks']):.3f}" for r in rows
        ]
        table.add_row(
            "average", "", "", *means, f"{kept['retention']:.3f}", f"{kept['above_chance']:.3f}"
        )
    Console(width=120).print(table)
