"""Greedy decoding and prefill on a CPU: compressed models, the dense one, and llama.cpp, by turns.

    python bench/decode.py --model MODEL [DIR ...] [--threads 1] [--context 8] [--batch 1]
        [--rounds 5] [--only NAME ...] [--ways WAY ...] [--busy 0]

MODEL is a directory with a GGUF file, DIR what `calr compress` wrote. From MODEL come, beside the
dense model itself, models of the same shapes and other values, since only their speed counts: every
decoder layer at keep 0.5, pivoted; and all matrices, embeddings included, in one form: 8 bits, 4
bits, and 4 bits with a corrective path of rank 16, in 8 bits and in 16. They run in bfloat16, after
`calr.optimize_for_inference`: through transformers' `generate`, and chained, the model alone and an
argmax. llama.cpp gets the file as F16, Q8_0 and Q4_0, every matrix, through llama-cpp-python if it
is installed (`pip install llama-cpp-python`, built for this machine), and is chained, too. All
continue a prompt of --context tokens by 128 within one process, and read one of 512 tokens (of the
dense model in float32, too). --busy: as many other programs keep a core busy all the while. Prints
a table and, without these and of all ways, writes bench/results/decode.json, a row a model, way,
context, batch and number of threads.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from texts import write_json
from torch import Tensor, nn
from transformers import DynamicCache

import calr
from calr.model.quantized import quantize, weight_of
from calr_kernels import Form, LowRankLinear, records
from calr_kernels.forms import CORRECTIVE
from calr_kernels.layout import rank_at

NEW, PREFILL = 128, 512
FORMS = {
    "8 bits": Form(8, "uniform", 32),
    "4 bits": Form(4, "table", 32),
    "4 bits, rank 16": Form(4, "table", 32, corrective_rank=16),
    "4 bits, rank 16 in 16 bits": Form(4, "table", 32, corrective_rank=16, corrective_bits=16),
}
PLAIN = ("dense in transformers", "dense in transformers, float32")
RUNGS = {"F16": 1, "Q8_0": 7, "Q4_0": 2}  # llama_ftype
WAYS = ("generate", "chained", "prefill")
Side = Callable[[], None]


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def SILENCE(level: int, text: bytes, data: object) -> None:
    """Take what llama.cpp says, a line a tensor."""


def in_form(model: nn.Module, form: Form) -> None:
    """Put every matrix in a form, of other values; embeddings and lm_head have no path beside."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            names.setdefault(id(module.weight), []).append(name)
    for shared in names.values():
        n, k = weight_of(model, shared[0]).shape
        own = (
            form if n < model.config.vocab_size else Form(form.bits, form.levels, form.scale_group)
        )
        stored = {"weight": random_records(n, k, own)}
        if own.corrective_rank and own.corrective_bits == 16:
            rank, dtype = own.corrective_rank, model.dtype
            stored["corrective.down"] = torch.randn(rank, k, dtype=dtype) / 100
            stored["corrective.up"] = torch.randn(rank, n, dtype=dtype) / 100
        elif own.corrective_rank:
            stored["corrective.down"] = random_records(own.corrective_rank, k, CORRECTIVE)
            stored["corrective.up"] = random_records(own.corrective_rank, n, CORRECTIVE)
        quantize(model, tuple(shared), own, stored)


def random_records(rows: int, columns: int, form: Form) -> Tensor:
    """Make records whose numbers are about as large as a model's."""
    codes = torch.randint(1 << form.bits, (rows, columns)).to(torch.uint8)
    return records.pack(codes, torch.full((rows, form.groups(columns)), 5e-4), form)


def at_keep(model: nn.Module, keep: float) -> None:
    """Make every linear layer of the decoder a pivoted one of some rank: of other values."""
    for block in model.model.layers:
        for name, layer in list(block.named_modules()):
            if type(layer) is nn.Linear:
                n, k = layer.weight.shape
                rank = max(1, int(rank_at("pivoted", n, k, keep)) // 8 * 8)
                like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
                made = LowRankLinear(k, n, rank, "pivoted", bias=False, **like)
                made.pivots.copy_(torch.randperm(n)[:rank].sort()[0])
                block.set_submodule(name, made)


def models(arguments: argparse.Namespace) -> Iterator[tuple[str, nn.Module]]:
    """Make what is timed: names and models."""
    for directory in arguments.directories:
        yield directory.name, calr.load(str(directory), dtype="bfloat16")[0]
    for name in (*PLAIN, "dense", "dense, packed", "keep 0.5", "keep 0.5, packed", *FORMS):
        if arguments.only and name not in arguments.only:
            continue
        dtype = "float32" if name == PLAIN[1] else "bfloat16"
        model, _ = calr.load(str(arguments.model), dtype=dtype)
        if name in FORMS:
            in_form(model, FORMS[name])
        elif name.startswith("keep 0.5"):
            at_keep(model, 0.5)
        yield name, model


def generated(model: nn.Module, ids: Tensor) -> Side:
    """Return a function that decodes once with transformers' generate."""
    lengths = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False}

    @torch.no_grad()
    def run() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), **lengths)

    return run


def chained(model: nn.Module, ids: Tensor) -> Side:
    """Return a function that decodes once, the most probable token each time."""

    @torch.no_grad()
    def run() -> None:
        cache, tokens = DynamicCache(config=model.config), ids
        for _ in range(NEW):
            logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
            # as for llama.cpp: torch's own argmax takes ten times as long, 3 ms for 16 sequences
            best = logits[:, -1].float().numpy().argmax(-1, keepdims=True)
            tokens = torch.from_numpy(best)

    return run


def prefilled(model: nn.Module) -> Side:
    """Return a function that reads PREFILL tokens once."""
    ids = torch.randint(3, model.config.vocab_size, (1, PREFILL))

    @torch.no_grad()
    def run() -> None:
        model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)

    return run


def llama_sides(file: Path, ids: Tensor, threads: int) -> dict[str, Side]:
    """Return functions that decode one sequence, and read one, once with llama.cpp."""
    import llama_cpp

    prompt = ids[0].tolist()
    context = max(len(prompt) + NEW, PREFILL) + 8
    model = llama_cpp.Llama(
        str(file),
        n_ctx=context,
        n_batch=context,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    vocabulary = model.n_vocab()

    def feed(tokens: list[int]) -> int:
        raw = model._ctx.ctx  # of a model that must outlive it
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(raw, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise SystemExit(f"{file}: llama.cpp could not decode")
        logits = llama_cpp.llama_get_logits_ith(raw, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    def decode() -> None:
        model._ctx.kv_cache_clear()
        token = feed(prompt)
        for _ in range(NEW - 1):
            token = feed([token])

    def read() -> None:
        model._ctx.kv_cache_clear()
        feed(torch.randint(3, vocabulary, (PREFILL,)).tolist())

    return {"chained": decode, "prefill": read}


def llama_file(source: Path, rung: str, directory: Path) -> Path:
    """Write a GGUF file again with all of its matrices in one type."""
    import llama_cpp

    llama_cpp.llama_log_set(SILENCE, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.pure = RUNGS[rung], True, True
    path = directory / f"{rung}.gguf"
    if llama_cpp.llama_model_quantize(
        str(source).encode(), str(path).encode(), ctypes.byref(params)
    ):
        raise SystemExit(f"{source}: llama.cpp could not convert it")
    return path


def main() -> None:
    """Time all sides by turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", type=Path, nargs="*")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--context", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="Names of the models to time.")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--busy", type=int, default=0, help="Programs beside this one.")
    parser.add_argument("--output", type=Path, default=Path("bench/results/decode.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sides: dict[tuple[str, str], Side] = {}
    for name, model in models(arguments):
        if name not in PLAIN:
            calr.optimize_for_inference(model, pack=name.endswith("packed"))
        ids = torch.randint(3, model.config.vocab_size, (arguments.batch, arguments.context))
        sides[name, "prefill"] = prefilled(model)
        if name != PLAIN[1]:
            sides[name, "generate"] = generated(model, ids)
            sides[name, "chained"] = chained(model, ids)
    with tempfile.TemporaryDirectory() as directory:
        if importlib.util.find_spec("llama_cpp") and arguments.batch == 1:
            source = next(arguments.model.glob("*.gguf"))
            for rung in RUNGS:
                if arguments.only and f"llama.cpp {rung}" not in arguments.only:
                    continue
                file = llama_file(source, rung, Path(directory))
                for way, side in llama_sides(file, ids, arguments.threads).items():
                    sides[f"llama.cpp {rung}", way] = side
        asked = {side: run for side, run in sides.items() if side[1] in arguments.ways}
        with busy(arguments.busy):
            times = by_turns(asked, arguments.rounds)
    cell = {key: vars(arguments)[key] for key in ("threads", "context", "batch")}
    rows = [
        cell
        | {"model": name, "way": way}
        | {
            key: (PREFILL if way == "prefill" else NEW * arguments.batch) / seconds
            for key, seconds in (
                ("tokens_per_second", statistics.median(found)),
                ("slowest", max(found)),
                ("fastest", min(found)),
            )
        }
        for (name, way), found in times.items()
    ]
    print(
        f"{arguments.threads} threads, {arguments.context} tokens before, batch {arguments.batch}"
    )
    print(f"| | generate, tokens/s | chained | prefill of {PREFILL} |\n|---|---|---|---|")
    for name in dict.fromkeys(name for name, _ in times):
        own = {
            row["way"]: f"{row['tokens_per_second']:.1f}" for row in rows if row["model"] == name
        }
        print(f"| {name} | {' | '.join(own.get(way, '') for way in WAYS)} |")
    if arguments.busy or len(arguments.ways) < len(WAYS):
        return
    kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    others = [row for row in kept if not cell.items() <= row.items()]
    write_json(arguments.output, others + rows)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Have programs beside this one that keep a core busy each."""
    loop = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(loop) for _ in range(count)]
    try:
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


def by_turns(sides: dict[tuple[str, str], Side], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Run all sides in turn, `rounds` times after one of warm-up; return seconds."""
    times: dict[tuple[str, str], list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
