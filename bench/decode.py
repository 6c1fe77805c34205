"""Greedy decoding: the compressed model, the dense one in transformers, and llama.cpp, by turns.

    python bench/decode.py DIR --model MODEL [--threads 1]

DIR is a compressed checkpoint of MODEL, which is a directory with a GGUF file; llama.cpp gets that
file as F16 and as Q8_0, through llama-cpp-python if it is installed (`pip install
llama-cpp-python`, built for this machine). The compressed model runs after
`calr.optimize_for_inference`, the dense one with and without. All continue a prompt of 8 tokens by
32 within one process. Writes bench/results/decode.json, rows per size and number of threads, and
prints a table.
"""

import argparse
import ctypes
import importlib.util
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from texts import write_json

import calr
from calr.inference import optimize_for_inference

PROMPT, NEW, ROUNDS = list(range(1, 9)), 32, 9


def torch_side(source: Path, dtype: str, optimized: bool) -> Callable[[], None]:
    """Return a function that decodes once with a model of transformers."""
    model, _ = calr.load(str(source), dtype=dtype)
    if optimized:
        optimize_for_inference(model)
    prompt = torch.tensor([PROMPT])
    lengths = {"min_new_tokens": NEW, "max_new_tokens": NEW}

    @torch.no_grad()
    def run() -> None:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **lengths)

    return run


def llama_side(source: Path, kind: int, threads: int, directory: str) -> Callable[[], None]:
    """Return a function that decodes once with llama.cpp, the file's weights stored as kind."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.pure = kind, True, True
    path = Path(directory) / f"{kind}.gguf"
    names = str(source).encode(), str(path).encode()
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(params)):
        raise SystemExit(f"{source}: llama.cpp could not convert it")
    model = llama_cpp.Llama(
        str(path), n_ctx=128, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def run() -> None:
        model.reset()  # else it keeps the prompt
        made = sum(1 for _ in itertools.islice(model.generate(PROMPT, temp=0.0), NEW))
        assert made == NEW

    return run


def main() -> None:
    """Time all sides by turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("bench/results/decode.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sides = {
        f"{name} {dtype}": torch_side(source, dtype, optimized)
        for dtype in ("float32", "bfloat16")
        for name, source, optimized in (
            ("calr", arguments.directory, True),
            ("dense", arguments.model, False),
            ("dense, optimized", arguments.model, True),
        )
    }
    with tempfile.TemporaryDirectory() as directory:
        if importlib.util.find_spec("llama_cpp"):
            file = next(arguments.model.glob("*.gguf"))
            for name, kind in (("F16", 1), ("Q8_0", 7)):  # llama_ftype
                sides[f"llama.cpp {name}"] = llama_side(file, kind, arguments.threads, directory)
        times = rounds(sides)
    config = json.loads((arguments.directory / "config.json").read_text())
    cell = {
        "keep": config["quantization_config"]["recipe"]["keep"],
        "threads": arguments.threads,
    }
    rows = [
        cell
        | {
            "model": name,
            "tokens_per_second": NEW / statistics.median(found),
            "slowest": NEW / max(found),
            "fastest": NEW / min(found),
        }
        for name, found in times.items()
    ]
    for row in rows:
        print(
            f"{row['model']:25} {row['tokens_per_second']:7.1f} tokens/s "
            f"({row['slowest']:.1f}-{row['fastest']:.1f}), {row['threads']} threads"
        )
    kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    others = [row for row in kept if not cell.items() <= row.items()]
    write_json(arguments.output, others + rows)


def rounds(sides: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Run all sides in turn, ROUNDS times after one of warm-up; return seconds."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
