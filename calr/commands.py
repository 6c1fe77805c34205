"""The commands behind the command line: each calls the library and prints."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from jsonargparse import Namespace
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from calr import benchmark, parallel, planning, tables
from calr.compression import compress_to
from calr.elastic import resize_to
from calr.errors import CalrError
from calr.evaluation import compare, perplexity
from calr.export import export_compressed_tensors, export_dense, export_gguf
from calr.inference import optimize_for_inference
from calr.integrations.config import CalrConfig, is_quantised
from calr.integrations.lm_eval import evaluate, retention
from calr.integrations.modules import replace
from calr.model import (
    analyse,
    check_vocabulary,
    check_window,
    is_compressed,
    load,
    load_skeleton,
    matrices,
    parameter_count,
    tensor_bytes,
    weight_of,
)
from calr.ranks import report
from calr.recipe import Recipe
from calr.storage import size, verify
from calr.text import evaluation_windows

LOADING = ("dtype", "device", "trust_remote_code")
MEMORY = ("max_memory", "device_memory")


def plan(arguments: Namespace) -> None:
    """Print ranks, parameters, bytes, memory and time of a compression."""
    if arguments.elastic:
        raise CalrError("elastic: has nothing to plan, every layer is kept whole; leave it out")
    result = planning.plan(
        arguments.model,
        _recipe(arguments),
        statistics=arguments.statistics,
        dtype=arguments.dtype,
        calibration=arguments.calibration,
        **{name: arguments[name] for name in (*MEMORY, "device", "trust_remote_code")},
    )
    if arguments.json:
        tables.print_json(result.to_dict())
        return
    if "smallest_bytes" in result.totals:
        _print_quantised_plan(result)
        return
    tables.print_layers(result.layers)
    if result.ranks_follow_calibration:
        print("Ranks follow calibration under this allocation; shown are nearly uniform ones.")
    if result.feasible_last_k:
        print("How many last blocks, k, follows calibration; each layer of theirs keeps:")
        shown = (f"k={k}: {c['keep_per_layer']:.3f}" for k, c in result.feasible_last_k.items())
        print(", ".join(shown) + " (ranks for each k: --json)")
    totals = result.totals
    tables.print_facts(
        {
            "keep (of the decoder's linear parameters)": f"{totals['keep']:.4f}",
            "removed of the whole model": f"{totals['removed_of_model']:.2%}",
            "compressible share of the decoder blocks": f"{result.coverage:.2%}",
            "bytes": f"{tables.gigabytes(totals['source_bytes'])} -> "
            f"{tables.gigabytes(totals['tensor_bytes'])}",
        }
    )
    _print_taken(result)


def _print_quantised_plan(result: planning.Plan) -> None:
    tables.print_matrices(result.layers)
    if result.ranks_follow_calibration:
        print("Which matrix gets which bits follows calibration; shown are nearly equal ones.")
    totals = result.totals
    tables.print_facts(
        {
            "bits per parameter, of the whole model": f"{totals['bits_per_parameter']:.3f}",
            "bytes": f"{tables.gigabytes(totals['source_bytes'])} -> "
            f"{tables.gigabytes(totals['tensor_bytes'])}",
            "smallest that the forms reach": f"{tables.gigabytes(totals['smallest_bytes'])}, "
            f"{totals['smallest_bits']:.2f} bits",
            "share of the model that can be quantised": f"{result.coverage:.2%}",
            "can be exported to": ", ".join(result.exports)
            + (" (others: name a --target)" if len(result.exports) == 1 else ""),
        }
    )
    _print_taken(result)


def _print_taken(result: planning.Plan) -> None:
    tables.print_phases({n: p.to_dict("expected_") for n, p in result.phases.items()})
    facts, where = {}, "this machine's CPU"
    if result.peak_gpu_bytes:
        facts["peak memory on the GPU (estimate)"] = tables.gigabytes(result.peak_gpu_bytes)
        where = "by what an H200 reached elsewhere"
    facts["peak memory (estimate)"] = tables.gigabytes(result.peak_memory_bytes)
    facts["disk (estimate)"] = tables.gigabytes(result.disk_bytes)
    tables.print_facts(facts | {f"time (estimate, {where})": f"{result.seconds:.0f} s"})


def compress(arguments: Namespace) -> None:
    """Compress a model into a directory and print what it became."""
    names = ("calibration", "statistics", "offload", "elastic", "overwrite", "eval_windows")
    with parallel.joined():
        options = {name: arguments[name] for name in (*names, *MEMORY, *LOADING)}
        options["device"] = parallel.place_of(arguments.device)
        results = compress_to(arguments.model, arguments.directory, _recipe(arguments), **options)
        following = f"calr generate {quote(arguments.directory)} --prompt 'Once upon a time'"
        if arguments.elastic:
            following = f"calr resize {quote(arguments.directory)} OUTPUT --keep 0.7"
        if parallel.first():
            _print_written(arguments, results, following)


def resize(arguments: Namespace) -> None:
    """Cut an elastic checkpoint to another size and print what it became."""
    names = ("keep", "layout", "solver", "overwrite", *LOADING)
    results = resize_to(
        arguments.model, arguments.directory, **{name: arguments[name] for name in names}
    )
    following = f"calr eval {quote(arguments.directory)} --against {quote(arguments.model)}"
    _print_written(arguments, results, following)


def export(arguments: Namespace) -> None:
    """Write a compressed checkpoint in another format and print what it became."""
    options = {name: arguments[name] for name in ("overwrite", "trust_remote_code")}
    if arguments.to == "dense":
        results = export_dense(arguments.model, arguments.output, **options)
    elif arguments.to == "compressed-tensors":
        results = export_compressed_tensors(arguments.model, arguments.output, **options)
    elif arguments.like is None:
        raise CalrError(
            "like: name a GGUF file of the dense model; tokenizer and hyperparameters are copied "
            "from it"
        )
    else:
        results = export_gguf(arguments.model, arguments.output, like=arguments.like, **options)
    (tables.print_json if arguments.json else tables.print_facts)(results)


def eval(arguments: Namespace) -> None:
    """Print token perplexity and zero-shot accuracy of one model, or of two side by side."""
    sources = [arguments.model] + ([arguments.against] if arguments.against else [])
    both = bool(arguments.against and arguments.tasks)
    rows, compared = [], []
    for source in sources:
        model, tokenizer = _load(arguments, source)
        row: dict[str, Any] = {"model": source}
        row["parameters"] = parameter_count(model)
        if arguments.windows:
            check_window(model, "window", arguments.window)
            ids = evaluation_windows(
                arguments.text, tokenizer, windows=arguments.windows, window=arguments.window
            )
            row["token_perplexity"] = asdict(perplexity(model, ids))
            if arguments.against:
                compared.append((model, ids))
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
    found: dict[str, Any] = {}
    if len(compared) == 2 and torch.equal(compared[0][1], compared[1][1]):  # one tokenizer
        (model, ids), (dense, _) = compared
        found["comparison"] = asdict(compare(model, dense, ids))
    if arguments.json:
        kept = {"retention": retention(rows[0]["tasks"], rows[1]["tasks"])} if both else {}
        tables.print_json({"text": arguments.text, "models": rows, **found, **kept})
        return
    for row in rows:
        print(f"{row['model']}: {row['parameters']:,} parameters")
        if "token_perplexity" in row:
            tables.print_perplexity(arguments.text, row["token_perplexity"])
    if found:
        tables.print_comparison(found["comparison"])
    if arguments.tasks:
        tables.print_tasks(rows)


def bench(arguments: Namespace) -> None:
    """Print tokens per second of one model, or of two taking turns."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    timed = {arguments.model: _load(arguments, arguments.model)[0]}
    if arguments.against:
        same = arguments.against == arguments.model
        name = f"{arguments.against}, not optimized" if same else arguments.against
        timed[name] = _load(arguments, arguments.against)[0]
    for model in timed.values():
        check_window(model, "prompt_tokens", arguments.prompt_tokens)
        check_window(model, "new_tokens", benchmark.START + arguments.new_tokens - 1)
    optimize_for_inference(timed[arguments.model], pack=arguments.pack)
    rows = benchmark.bench(
        timed,
        prompt=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
    )
    if arguments.json:
        tables.print_json(rows)
    else:
        tables.print_speeds(rows, arguments.rounds)


def generate(arguments: Namespace) -> None:
    """Print a continuation of a prompt."""
    model, tokenizer = _load(arguments, arguments.model)
    optimize_for_inference(model, pack=arguments.pack)
    inputs = _encoded(arguments, tokenizer)
    fed = inputs["input_ids"].shape[1] + arguments.max_new_tokens - 1
    check_window(model, "prompt and max_new_tokens", fed)
    check_vocabulary(model, "prompt", inputs["input_ids"])
    inputs = inputs.to(model.device)
    torch.manual_seed(arguments.seed)
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
    started = time.monotonic()
    generate: Any = model.generate
    try:
        output = generate(
            **inputs, max_new_tokens=arguments.max_new_tokens, tokenizer=tokenizer, **sampling
        )
    except (ValueError, TypeError, KeyError) as error:
        raise CalrError(
            f"{arguments.model}: cannot generate as its generation_config.json asks: {error}"
        ) from error
    output = getattr(output, "sequences", output)[0]  # a dictionary under return_dict_in_generate
    new = output[inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    if arguments.json:
        seconds = time.monotonic() - started
        tables.print_json(
            {"prompt": arguments.prompt, "text": text, "tokens": len(new), "seconds": seconds}
        )
    else:
        print(text if arguments.chat else arguments.prompt + text)


def _encoded(arguments: Namespace, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """Turn the prompt into ids [1, T] and their mask; with --chat through the model's template."""
    try:
        arguments.prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalrError("prompt: is not UTF-8 text") from error
    if arguments.chat and not tokenizer.chat_template:
        raise CalrError(f"{arguments.model}: has no chat template; leave --chat out")
    if arguments.chat:
        try:
            found: Any = tokenizer.apply_chat_template(
                [{"role": "user", "content": arguments.prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise CalrError(
                f"{arguments.model}: its chat template refuses one message of the user: {error}"
            ) from error
    else:
        found = tokenizer(arguments.prompt, return_tensors="pt")
    if not found["input_ids"].numel():
        raise CalrError("prompt: is empty, and the tokenizer adds no first token; give some text")
    mask = found.get("attention_mask", torch.ones_like(found["input_ids"]))
    return BatchEncoding({"input_ids": found["input_ids"], "attention_mask": mask})


def inspect(arguments: Namespace) -> None:
    """Print the layers, totals and recipe of a compressed checkpoint, from its config alone."""
    directory = Path(arguments.model)
    if not is_compressed(directory):
        raise CalrError(f"{directory}: is no checkpoint written by calr")
    verified = {"verified_files": verify(directory)} if arguments.verify else {}
    block = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = CalrConfig(**block)
    trust = arguments.trust_remote_code
    skeleton = load_skeleton(arguments.model, trust_remote_code=trust, dense=True)
    structure = analyse(skeleton)
    quantised, dense = matrices(skeleton, structure), tensor_bytes(skeleton)
    element = weight_of(skeleton, structure.layers[0].name).element_size()
    for name, stated in config.layers.items():  # refuses what the model cannot hold
        replace(skeleton, name, stated)
    if any(map(is_quantised, config.layers.values())):
        rows = report.quantised_rows(quantised, config.layers, element)
        saved = sum(m.parameters * element for m in quantised) - sum(r["bytes"] for r in rows)
        totals = report.byte_totals(structure, dense - saved)
    else:
        rows = report.rows(structure, config.layers)
        counted = report.totals(structure, config.layers)
        totals = {name: counted[name] for name in ("keep", "removed_of_model", "model_parameters")}
    totals |= {"bytes": size(directory), **verified}
    if arguments.json:
        tables.print_json({"layers": rows, "totals": totals, "recipe": config.recipe})
        return
    (tables.print_matrices if "bits" in rows[0] else tables.print_layers)(rows)
    tables.print_facts(totals | {f"recipe: {name}": value for name, value in config.recipe.items()})


def _recipe(arguments: Namespace) -> Recipe:
    values = {name: arguments[name] for name in Recipe.__dataclass_fields__}
    if arguments.elastic and not any(values[name] for name in ("keep", "bits", "size")):
        values["keep"] = 1.0
    return Recipe(**values)


def _load(arguments: Namespace, source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(source, **{name: arguments[name] for name in LOADING})


def _print_written(arguments: Namespace, results: dict[str, Any], following: str) -> None:
    """Print what was written where, and what to type next."""
    if arguments.json:
        tables.print_json(results)
        return
    if "phases" in results:
        tables.print_phases(results["phases"])
    apart = ("directory", "bytes", "phases")
    tables.print_facts({k: v for k, v in results.items() if k not in apart})
    megabytes = f"{results['bytes'] / 1e6:.1f} MB"
    where = tables.plain(results["directory"])
    print(f"written to {where} ({megabytes} of weights); next: {tables.plain(following)}")
