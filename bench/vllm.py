"""A compressed-tensors export and its adapter in vLLM, over its OpenAI-compatible server.

    python bench/vllm.py DIRECTORY EXPORT MODEL --python VENV/bin/python

DIRECTORY: a checkpoint of calr's; EXPORT: what `calr export --to compressed-tensors` made of it;
MODEL: the dense model; --python: of an environment with vLLM. Prompt log-probabilities of held-out
built-in text, in vLLM (bfloat16, 16-bit activations) with the adapter and without it and in
transformers with PEFT in bfloat16, against transformers with PEFT in float32; and tokens per second
of one greedy sequence, beside the dense model's, of several at once, too. Written to
bench/results/vllm.json.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from texts import write_json
from torch import Tensor
from transformers import AutoModelForCausalLM

import calr
from calr.text import evaluation_windows

OUTPUT = Path("bench/results/vllm.json")
PORT, WINDOW, NEW, ROUNDS, STARTING = 8731, 256, 64, 5, 300  # the last: seconds
TOGETHER = (4, 8, 16)  # sequences


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("export", type=Path)
    parser.add_argument("model")
    parser.add_argument("--python", default=".venv-vllm/bin/python")
    parser.add_argument("--windows", type=int, default=4)
    arguments = parser.parse_args()
    model, tokenizer = calr.load(arguments.directory, dtype="float32")
    ids = evaluation_windows("builtin", tokenizer, windows=arguments.windows, window=WINDOW)
    own, exact = log_probabilities(model, ids), in_transformers(arguments.export, ids, "float32")
    rows = {"calr, float32": own, "transformers and PEFT": in_transformers(arguments.export, ids)}
    speeds = {}
    with server(arguments.python, arguments.export, adapter=True) as ask:
        for name, served in (("vLLM", "adapter"), ("vLLM without the adapter", "base")):
            rows[name] = torch.stack([prompt_log_probabilities(ask, served, w) for w in ids])
            speeds[name] = tokens_per_second(ask, served, ids[:1])
    with tempfile.TemporaryDirectory() as folder:
        for part in calr.load(arguments.model, dtype="bfloat16"):
            part.save_pretrained(folder)
        with server(arguments.python, Path(folder)) as ask:
            speeds["vLLM, dense model"] = tokens_per_second(ask, "base", ids[:1])
            for count in TOGETHER:
                several = ids.repeat(count, 1)[:count]
                speed = tokens_per_second(ask, "base", several)
                speeds[f"vLLM, dense model, {count} sequences"] = speed
    found: dict[str, Any] = {
        name: {
            "largest_difference": float((row - exact).abs().max()),
            "mean_difference": float((row - exact).abs().mean()),
        }
        for name, row in rows.items()
    }
    for name, speed in speeds.items():
        found.setdefault(name, {})["tokens_per_second"] = speed
    write_json(OUTPUT, found)
    print("| | largest | mean difference of log-probabilities, nats | decode, tokens/s |")
    print("|---|---|---|---|")
    for name, row in found.items():
        figures = [row.get(f"{kind}_difference") for kind in ("largest", "mean")]
        cells = ["" if x is None else f"{x:.4f}" for x in figures]
        speed = row.get("tokens_per_second")
        print(f"| {name} | {' | '.join(cells)} | {'' if speed is None else f'{speed:.1f}'} |")


def in_transformers(export: Path, ids: Tensor, dtype: str = "bfloat16") -> Tensor:
    """Return the log-probabilities that transformers and PEFT give an export in some dtype."""
    model: Any = AutoModelForCausalLM.from_pretrained(export, dtype=dtype)
    model.hf_quantizer.compressor.decompress_model(model)
    return log_probabilities(PeftModel.from_pretrained(model, export / "adapter").eval(), ids)


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Return those of every token of windows [S, T] but the first, [S, T - 1]."""
    logits = torch.cat([model(window[None]).logits for window in ids])
    known: Tensor = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return known


@contextlib.contextmanager
def server(python: str, directory: Path, *, adapter: bool = False) -> Iterator[Any]:
    """Serve a directory as "base", and its adapter; yield what asks for a completion."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--served-model-name", "base", "--port", str(PORT)]
    command += ["--dtype", "bfloat16", "--max-model-len", str(2 * WINDOW), "--enforce-eager"]
    if adapter:
        rank = json.loads((directory / "adapter/adapter_config.json").read_text())["r"]
        command += ["--enable-lora", "--max-lora-rank", str(rank)]
        command += ["--lora-modules", f"adapter={directory / 'adapter'}"]
    environment = os.environ | {"VLLM_CPU_INT4_W4A8": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    url = f"http://127.0.0.1:{PORT}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            end = time.monotonic() + STARTING
            while not (up := answers(url)) and process.poll() is None and time.monotonic() < end:
                time.sleep(1)
            if not up:
                log.seek(0)
                raise RuntimeError(f"vLLM did not start: {log.read()[-3000:]}")

            def ask(**request: Any) -> Any:
                body = json.dumps({"temperature": 0, **request}).encode()
                headers = {"Content-Type": "application/json"}
                posted = urllib.request.Request(f"{url}/v1/completions", body, headers)
                with urllib.request.urlopen(posted) as answer:
                    return json.load(answer)["choices"][0]

            yield ask
        finally:
            process.terminate()
            process.wait(60)


def answers(url: str) -> bool:
    """Tell whether a server is up."""
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{url}/health")
        return True
    return False


def prompt_log_probabilities(ask: Any, model: str, ids: Tensor) -> Tensor:
    """Return those of every token of a window [T] but the first, [T - 1]."""
    tokens = ids.tolist()
    found = ask(model=model, prompt=tokens, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"]
    known = [at[str(token)]["logprob"] for token, at in zip(tokens[1:], found[1:], strict=True)]
    return torch.tensor(known, dtype=torch.float64)


def tokens_per_second(ask: Any, model: str, ids: Tensor) -> float:
    """Return the median speed of continuing 16 tokens of windows [S, T] by NEW each, at once."""
    speeds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        ask(model=model, prompt=ids[:, :16].tolist(), max_tokens=NEW, ignore_eos=True)
        speeds.append(len(ids) * NEW / (time.perf_counter() - started))
    return statistics.median(speeds)


if __name__ == "__main__":
    main()
