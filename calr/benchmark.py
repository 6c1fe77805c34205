"""Time prefill and decode of models, interleaved in one process."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from calr.model import parameter_count
from calr.progress import progress
from calr_kernels.native import packed_bytes

START = 8  # tokens before those that decode is timed on


@torch.no_grad()
def bench(
    models: dict[str, PreTrainedModel], *, prompt: int = 256, new_tokens: int = 32, rounds: int = 5
) -> list[dict[str, Any]]:
    """Measure tokens per second of each model: prefill of `prompt` tokens, greedy decode after 8.

    The models take turns within every round, after one round of warm-up; figures are medians with
    the fastest and slowest round. weight_bytes counts parameters and buffers once; packed_bytes
    what quantised layers hold beside them, in the order in which a CPU reads them.
    """
    vocabulary = min(m.config.get_text_config().vocab_size for m in models.values())
    long = torch.arange(1, prompt + 1)[None] % vocabulary
    short = torch.arange(1, START + 1)[None] % vocabulary
    times: dict[tuple[str, str], list[float]] = {}
    for turn in progress(range(rounds + 1), desc="timing", unit="round"):
        for name, model in models.items():
            generate: Any = model.generate
            ids, start = long.to(model.device), short.to(model.device)
            prefill = _timed(partial(model, input_ids=ids, logits_to_keep=1))
            decode = _timed(
                partial(
                    generate,
                    start,
                    attention_mask=torch.ones_like(start),
                    do_sample=False,
                    min_new_tokens=new_tokens,
                    max_new_tokens=new_tokens,
                )
            )
            if turn:
                times.setdefault((name, "prefill"), []).append(prompt / prefill)
                times.setdefault((name, "decode"), []).append(new_tokens / decode)
    return [
        {
            "model": name,
            "parameters": parameter_count(model),
            "weight_bytes": sum(
                t.numel() * t.itemsize for t in [*model.parameters(), *model.buffers()]
            ),
            "packed_bytes": packed_bytes(model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            **{
                f"{kind}_tokens_per_second": {
                    "median": statistics.median(times[name, kind]),
                    "slowest": min(times[name, kind]),
                    "fastest": max(times[name, kind]),
                }
                for kind in ("prefill", "decode")
            },
        }
        for name, model in models.items()
    ]


def _timed(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
