"""The model card: how to load it, how it was made, what was measured."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from calr.recipe import Recipe

NEEDS_CALR = """`import calr` before loading this model with transformers. It is installed from its
repository: the package of that name on PyPI is another project."""


def recipe_yaml(recipe: Recipe, options: dict[str, Any]) -> str:
    """Return the YAML with which `calr compress` does the same again, anywhere.

    options: what else was asked for, by the name of its argument.
    """
    plain = json.loads(json.dumps(dataclasses.asdict(recipe) | options))  # tuples as lists
    return str(yaml.safe_dump(plain, sort_keys=False))


def model_card(
    source: str,
    what: str,
    command: str,
    recipe_yaml: str,
    results: dict[str, Any],
    *,
    needs_calr: bool = True,
    adapter: str | None = None,
) -> ModelCard:
    """Describe a compressed model: how to load it, the exact recipe, the measured numbers.

    what: was done, in words; command: what made it, with {model} for the source's name. needs_calr:
    to be loaded. adapter: a folder with a PEFT adapter that belongs to it.
    """
    local = Path(source).exists()
    data = ModelCardData(
        base_model=None if local else source,
        library_name="transformers",
        tags=["calr", "compression"],
    )
    rows = "\n".join(f"| {n.replace('_', ' ')} | {_shown(value)} |" for n, value in results.items())
    name = (Path(source).resolve().name if local else source).replace("`", "'")
    name = "".join(c if c.isprintable() and c not in "<>" else "_" for c in name)
    command = command.format(model=name)
    made_with = "with" if command.startswith("calr compress") else "of a checkpoint made with"
    before, after = (f"{results[k] / 1e6:,.1f} MB" for k in ("source_bytes", "tensor_bytes"))
    lines = ["import calr"] if needs_calr else []
    lines += ["from peft import PeftModel"] if adapter else []
    lines += ["from transformers import AutoModelForCausalLM", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained(".")']
    if adapter:
        lines += ["model.hf_quantizer.compressor.decompress_model(model)  # PEFT wants weights"]
        lines += [f'model = PeftModel.from_pretrained(model, "{adapter}")']
    loading = "\n".join(lines)
    first = f"{NEEDS_CALR}\n\n" if needs_calr else ""
    return ModelCard(
        f"""---
{data.to_yaml()}
---

{first}# {name}, compressed

A compression of `{name}`, {before}, to {after}: {what}.

```python
{loading}
```

## Measured

| | |
|---|---|
{rows}

## Recipe

`{command}` {made_with}

```yaml
{recipe_yaml.strip()}
```
"""
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
