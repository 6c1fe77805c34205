"""An exported GGUF file in llama.cpp, against the checkpoint that it came from in transformers.

    python bench/llama.py DIRECTORY FILE.gguf

Greedy continuations of five prompts by 32 tokens, and token perplexity on windows of the held-out
built-in text, both in float32 on the side of transformers. The corrective paths are read from
FILE-adapter.gguf, where `calr export` wrote one. Needs llama-cpp-python.
"""

import argparse
import math
from pathlib import Path

import torch
from llama_cpp import Llama

import calr
from calr.evaluation import perplexity
from calr.text import evaluation_windows

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "Water boils at a temperature of",
    "The most important thing about science is",
    "In the morning she opened the window and",
)
TOKENS, WINDOW = 32, 256


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("file", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    arguments = parser.parse_args()
    model, tokenizer = calr.load(arguments.directory, dtype="float32")
    adapter = arguments.file.with_name(f"{arguments.file.stem}-adapter.gguf")
    paths = str(adapter) if adapter.exists() else None
    print(f"corrective paths: {paths or 'none'}")
    llama = Llama(str(arguments.file), lora_path=paths, n_ctx=512, logits_all=True, verbose=False)
    same = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        ours = model.generate(
            torch.tensor([ids]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
        )[0, len(ids) :].tolist()
        theirs = greedy(llama, ids)
        agreed = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), TOKENS
        )
        same += agreed == TOKENS
        print(f"{prompt!r}: the first {agreed} of {TOKENS} tokens are the same")
    ids = evaluation_windows("builtin", tokenizer, windows=arguments.windows, window=WINDOW)
    ours, theirs = perplexity(model, ids).perplexity, llama_perplexity(llama, ids)
    print(f"{same} of {len(PROMPTS)} continuations are the same")
    print(f"perplexity: calr {ours:.4f}, llama.cpp {theirs:.4f}, ratio {theirs / ours:.4f}")


def greedy(llama: Llama, ids: list[int]) -> list[int]:
    """Continue ids by the most probable tokens."""
    llama.reset()
    llama.eval(ids)
    found: list[int] = []
    while len(found) < TOKENS:
        found.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(found[-1:])
    return found


def llama_perplexity(llama: Llama, ids: torch.Tensor) -> float:
    """Return the token perplexity of windows [S, T], by `calr.evaluation.perplexity`'s protocol."""
    nats = 0.0
    for window in ids:
        llama.reset()
        llama.eval(window.tolist())
        scores = torch.from_numpy(llama.scores[: len(window) - 1]).double().log_softmax(-1)
        nats -= float(scores.gather(-1, window[1:, None]).sum())
    return math.exp(nats / (len(ids) * (ids.shape[1] - 1)))


if __name__ == "__main__":
    main()
