"""Whether the native decoder says what the model says: greedy tokens, perplexity token by token.

    python bench/agreement.py --model MODEL [--prompts 8] [--windows 64]

MODEL, dense and with every matrix rounded to the nearest of a form, runs as transformers runs it
(the forms' numbers dense) and after `calr.optimize_for_inference`, packed. In float32: greedy
continuations of 64 tokens behind the first tokens of passages of the built-in text, how many are
the same to the last token; where they part, the most by which the best logit was ahead. In
bfloat16: perplexity of windows of 128 tokens, sixteen windows side by side, each read one token at
a time: natively over transformers, which rounds in other places, and either over float32, with the
ratios' standard errors. Prints a table.
"""

import argparse
import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import calr
from calr.model.quantized import quantize, weight_of
from calr.rounding import round_matrix
from calr.text import evaluation_windows
from calr_kernels import Form

PROMPT, NEW, WINDOW, TOGETHER = 16, 64, 128, 16
KINDS = {
    "dense": None,
    "8 bits": Form(8, "uniform", 32),
    "6 bits": Form(6, "formula", 64),
    "5 bits": Form(5, "formula", 64),
    "4 bits": Form(4, "table", 32),
}


@torch.no_grad()
def rounded(model: nn.Module, form: Form, *, dense: bool) -> None:
    """Round every matrix, embeddings included, to the nearest of a form; dense: to its numbers."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            names.setdefault(id(module.weight), []).append(name)
    for shared in names.values():
        weight = weight_of(model, shared[0])
        found = round_matrix(weight.float(), form)
        if dense:
            weight.copy_(found.weight(weight.dtype))
            continue
        quantize(model, tuple(shared), form, {"weight": found.records})


def made(source: str, form: Form | None, dtype: str, fast: bool) -> nn.Module:
    """Load a model's bfloat16 numbers, round them, and prepare it to run in a dtype."""
    model, _ = calr.load(source, dtype="bfloat16")
    model.to(getattr(torch, dtype))
    if form is not None:
        rounded(model, form, dense=not fast)
    return calr.optimize_for_inference(model, pack=True) if fast else model


@torch.no_grad()
def continued(model: nn.Module, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Return greedy tokens [prompts, NEW], and by how much the best logit was ahead."""
    rows, gaps = [], []
    for prompt in prompts:
        cache, ids = DynamicCache(config=model.config), prompt[None]
        for _ in range(NEW):
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].float()
            best = logits.topk(2)
            gaps.append(best.values[0] - best.values[1])
            ids = best.indices[:1][None]
            rows.append(ids[0, 0])
    return torch.stack(rows).view(-1, NEW), torch.stack(gaps).view(-1, NEW)


@torch.no_grad()
def losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Return cross-entropies of windows [W, T], read one token at a time: [W, T - 1] float64."""
    parts = []
    for part in windows.split(TOGETHER):
        cache, found = DynamicCache(config=model.config), []
        for ids, following in pairwise(part.mT):
            logits = model(ids[:, None], past_key_values=cache).logits[:, -1].float()
            found.append(cross_entropy(logits, following, reduction="none"))
        parts.append(torch.stack(found, 1))
    return torch.cat(parts).double()


def over(found: Tensor, exact: Tensor) -> str:
    """Return the ratio of two perplexities of the same tokens, and its standard error."""
    more = (found - exact).flatten()
    ratio = math.exp(float(more.mean()))
    return f"{ratio:.5f} ± {ratio * float(more.std()) / math.sqrt(len(more)):.5f}"


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    _, tokenizer = calr.load(arguments.model)
    count = max(arguments.prompts, arguments.windows)
    text = evaluation_windows("builtin", tokenizer, windows=count, window=WINDOW)
    print(f"| | same continuations of {NEW} | most lead where they part | ", end="")
    print("native over transformers | native over float32 | transformers over float32 |")
    print("|---|---|---|---|---|---|")
    for name in arguments.only:
        sides = [made(arguments.model, KINDS[name], "float32", fast) for fast in (False, True)]
        prompts, windows = text[: arguments.prompts, :PROMPT], text[: arguments.windows]
        (eager, lead), (native, _) = (continued(model, prompts) for model in sides)
        apart = (eager != native).int()
        first = apart.argmax(1)[apart.any(1)]
        leads = lead[apart.any(1), first]
        most = f"{float(leads.max()):.1e}" if len(leads) else ""
        same = f"{len(prompts) - len(leads)} of {len(prompts)}"
        exact = losses(sides[1], windows)
        sides = [made(arguments.model, KINDS[name], "bfloat16", fast) for fast in (True, False)]
        ours, theirs = (losses(model, windows) for model in sides)
        ratios = [over(ours, theirs), over(ours, exact), over(theirs, exact)]
        print(f"| {name} | {same} | {most} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
