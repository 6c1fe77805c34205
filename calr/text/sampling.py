"""Text that a model writes itself, and hard-wrapped text."""

import contextlib
import math
import textwrap
from functools import partial
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from calr import parallel
from calr.errors import CalrError
from calr.inference.cache import GrowingLayer, grow
from calr.inference.temporary import decoding_natively, may_decode
from calr.model import absent, fast_attention, find_blocks, hooked, resident, tensor_bytes
from calr.progress import progress
from calr.text.tokens import adds_bos, encode
from calr_kernels.eligible import cpu_multiplies_bfloat16

CACHE_BYTES = 2 << 30  # of keys and values while sampling
MOST = 48  # windows sampled at once: with more it is not faster, only larger
NATIVE = 16  # by the native kernel, which is 1.2 to 1.8 times as fast with them
SEEDS = 1 << 20  # from the seed of a batch to that of the next
LINES = (60, 80)  # shortest and longest lines, in characters, of hard-wrapped text


def sample_from(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    window: int,
    seed: int,
    cache_bytes: int = CACHE_BYTES,
    natively: bool = True,
) -> Tensor:
    """Let the model write its own calibration text: [samples, window] ids, at temperature 1.

    Each window starts with BOS where the tokenizer adds it, then a token drawn uniformly
    (as in LLM-QAT, arXiv 2305.17888). cache_bytes: of keys and values, of at least one window.
    natively: on the native kernel, faster, where `panel_bytes` says that it can. With another of
    both the text may be another, since products round otherwise, and so it may on other machines.
    """
    dtype = _sampling_dtype(model)
    natively = natively and panel_bytes(model, model.dtype) > 0
    _require_memory(model, dtype, 2 if natively else 1)
    generator = torch.Generator().manual_seed(seed)
    embeddings: Any = model.get_input_embeddings()
    usable = set(range(min(len(tokenizer), embeddings.num_embeddings)))
    ordinary = torch.tensor(sorted(usable - set(tokenizer.all_special_ids)))
    start = ordinary[torch.randint(len(ordinary), (samples, 1), generator=generator)]
    if adds_bos(tokenizer):
        start = torch.cat([torch.full_like(start, tokenizer.bos_token_id), start], 1)
    length = window - start.shape[1]
    usual, generate = model.generation_config, cast(Any, model.generate)
    rows: dict[int, Tensor] = {}
    grown = partial(_grow, window)
    growing = model.register_forward_pre_hook(grown, with_kwargs=True)
    with (
        hooked([growing]),
        torch.no_grad(),
        resident(model, dtype=dtype),
        decoding_natively(model) if natively else contextlib.nullcontext(False) as native,
        fast_attention(),
    ):
        try:
            # none of the model's own penalties and filters: `_Drawing` leaves the search one token
            model.generation_config = GenerationConfig(max_new_tokens=length, pad_token_id=0)
            eos_token_id = usual.eos_token_id if usual else None
            row = cache_row(model, window, (dtype or model.dtype).itemsize)
            together = parallel.gather({parallel.rank(): native})
            most = NATIVE if all(together.values()) else MOST
            batches = start.split(sampling_batch(samples, row, cache_bytes, most))
            own = parallel.mine(range(len(batches)))
            for i in progress(own, desc="sampling text", unit="batch"):
                mask = torch.ones_like(batches[i], device=model.device)
                drawing = LogitsProcessorList([_Drawing(seed + i * SEEDS, eos_token_id)])
                ids = batches[i].to(model.device)
                rows[i] = generate(ids, attention_mask=mask, logits_processor=drawing).cpu()
        finally:
            model.generation_config = usual
    every = parallel.gather(rows)
    return torch.cat([every[i] for i in sorted(every)])


class _Drawing(LogitsProcessor):
    """Draws a token for each row by its scores, but not EOS; leaves it alone to be found.

    PyTorch's own drawing took a third of the time, and transformers' own way to forbid tokens a
    twelfth; and this one is the same on every device, but for rounding.
    """

    def __init__(self, seed: int, eos_token_id: int | list[int] | None) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [n, V] of 0 for the tokens drawn and -inf for all others."""
        if not bool(scores.amax(-1).isfinite().all()):
            raise CalrError(
                "calibration=sampled: the model's logits hold NaN or infinity; check the "
                "checkpoint, or, where they overflow float16, use --dtype bfloat16 or float32"
            )
        scores[:, [token for token in self._eos if 0 <= token < scores.shape[1]]] = -math.inf
        uniform = torch.rand(len(scores), 1, generator=self._generator)
        drawn = draw(scores.float().softmax(-1), uniform)
        return torch.full_like(scores, -math.inf).scatter_(1, drawn[:, None], 0.0)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token a row of probabilities [n, V], by inverting the cumulative distribution: [n].

    uniform [n, 1]: numbers in [0, 1). One whose probability is 0 is not drawn.
    """
    cumulative = probabilities.cumsum(-1)
    sought = uniform.to(cumulative.device) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, sought, right=True)
    return drawn.squeeze(1).clamp(max=probabilities.shape[1] - 1)


def hard_wrapped(windows: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Break the lines of windows [S, T] at 60 to 80 characters, as books, mail and comments are.

    Another length for each window, in turn. A window keeps its length: line breaks push text out at
    its end. One that would become shorter stays as it is.
    """
    start = adds_bos(tokenizer)
    result = windows.clone()
    for i, row in enumerate(windows):
        wrap = textwrap.TextWrapper(
            LINES[0] + i % (LINES[1] - LINES[0] + 1),
            expand_tabs=False,
            replace_whitespace=False,
            break_long_words=False,
            break_on_hyphens=False,
        )
        text = str(tokenizer.decode(row[start:]))
        ids = encode(tokenizer, "\n".join(wrap.fill(line) for line in text.split("\n")))
        if len(ids) >= len(row) - start:
            result[i, start:] = ids[: len(row) - start]
    return result


def _grow(window: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Have a decoder's cache hold a window in place: a third of the time went into copying it."""
    cache = kwargs.get("past_key_values")
    if type(cache) is DynamicCache and not cache.offloading:
        grow(cache.layers)
        for layer in cache.layers:
            if type(layer) is GrowingLayer:
                layer.expect(window)


def _require_memory(model: PreTrainedModel, dtype: torch.dtype | None, copies: int) -> None:
    """Refuse a model that is read from its files because it does not fit: every token needs all."""
    needed, free = copies * tensor_bytes(model, dtype), psutil.virtual_memory().available
    if absent(model) and model.device.type == "cpu" and needed > free:
        less = ", or a --max_memory, which takes half of it" if copies > 1 else ""
        raise CalrError(
            f"calibration=sampled: the model writes its own text only in memory, where it needs "
            f"{needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free; name a file of text, "
            f"or builtin{less}"
        )


def sampled_in(dtype: torch.dtype) -> torch.dtype:
    """Return in what type a model of a type writes its text on a CPU: bfloat16 where that is faster
    than float32. It draws tokens from what rounding hardly moves."""
    faster = dtype is torch.float32 and cpu_multiplies_bfloat16()
    return torch.bfloat16 if faster else dtype


def panel_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Return the bytes of the weights' second copy, in which the native kernel reads them while a
    model of a type writes text; 0 where it does not.

    It does where the machine, not what is free of it, has twice the memory that the weights take
    with this copy in every process: else the text would depend on what else is running.
    """
    own = sampled_in(dtype)
    size = tensor_bytes(model, own)
    fits = 4 * size * parallel.size() <= psutil.virtual_memory().total
    return size if fits and may_decode(model, own, NATIVE) else 0


def _sampling_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """Return another type to write text in than the model's own; None where there is none."""
    own: Any = model  # some families keep modules in float32
    kept = getattr(own, "_keep_in_fp32_modules", None) or own._keep_in_fp32_modules_strict
    if kept or model.device.type != "cpu":
        return None
    dtype = sampled_in(model.dtype)
    return None if dtype is model.dtype else dtype


def sampling_batch(samples: int, row: int, cache_bytes: int, most: int = MOST) -> int:
    """Return how many of some windows to sample at once: batches of one size, of at most so many,
    and so many bytes of keys and values, of which a window has row."""
    most = max(1, min(most, cache_bytes // max(1, row), math.ceil(samples / parallel.size())))
    return math.ceil(samples / math.ceil(samples / most))


def cache_row(model: PreTrainedModel, window: int, element: int) -> int:
    """Return the bytes of keys and values of one window of tokens, of so many bytes a number."""
    config = model.config.get_text_config()

    def stated(name: str) -> int:  # 0: not every family states it, nor for all layers
        try:
            value = getattr(config, name, 0)
        except Exception:  # of a kind of its own, where layers differ
            value = 0
        return value if isinstance(value, int) else 0

    embeddings: Any = model.get_input_embeddings()
    width, heads = int(embeddings.weight.shape[1]), stated("num_attention_heads") or 1
    row = (stated("num_key_value_heads") or heads) * (stated("head_dim") or width // heads)
    layers = stated("num_hidden_layers") or len(find_blocks(model)[1])
    return 2 * layers * row * window * element
