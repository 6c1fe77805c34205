"""Every causal language model that transformers builds small: does what calr writes come back?

    python bench/families.py [--only llama,mamba] [--output docs/families.md]

Each model of AutoModelForCausalLM is built with two small blocks and random weights, compressed on
random tokens, saved and loaded again: it gives the same bits, or calr refuses it in one sentence. A
family that transformers cannot build from the small configuration here is listed as such. Exits
with 1 where anything else happens. About 2 minutes on one core.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import calr
from calr.integrations.experts import put_together, take_apart

SMALL = {  # names that configurations know, each family some of them
    "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 8, "n_embd": 32, "n_layer": 2,
    "n_head": 4, "d_model": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 80, "dff": 80,
    "word_embed_proj_dim": 32, "max_position_embeddings": 64, "n_positions": 64, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 1, "state_size": 8, "rotary_dim": 4, "num_layers": 2,
    "attention_hidden_size": 32, "context_length": 64, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_groups": 1, "num_heads": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    "is_decoder": True,
}  # fmt: skip
BUILT = "could not be built from the small configuration here"
PARAMETERS = 3_000_000  # a model with more was not built small


def outcome(kind: str) -> str:
    """Compress one family and load it again; return what happened."""
    torch.manual_seed(0)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SMALL))
        if sum(p.numel() for p in skeleton.parameters()) > PARAMETERS:
            return f"{BUILT} (too large)"
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SMALL)).eval()
        ids = torch.randint(2, 90, (4, 24), generator=torch.Generator().manual_seed(1))
        model(input_ids=ids, use_cache=False)
    except Exception as error:  # of a configuration that does not fit the family
        return f"{BUILT} ({type(error).__name__})"
    recipe = calr.Recipe(keep=0.7, rank_step=2, correction_tokens=0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if not apart_is_alike(model, ids):
                return "FAULT: gives other logits when its experts are taken apart"
            model = calr.compress(model, recipe, calibration=ids)
            model.save_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                found, wanted = (m(input_ids=ids, use_cache=False).logits for m in (loaded, model))
                same = torch.equal(found, wanted)
        except calr.CalrError as error:
            return f"refused: {error}"
        except Exception as error:
            return f"FAULT: {type(error).__name__}: {str(error)[:200]}"
    return "loads" if same else "FAULT: gives other logits when it is loaded again"


@torch.no_grad()
def apart_is_alike(model: PreTrainedModel, ids: Tensor) -> bool:
    """Take a model's experts apart and put them together; tell whether its function stays."""
    wanted = model(input_ids=ids, use_cache=False).logits
    take_apart(model)
    found = model(input_ids=ids, use_cache=False).logits
    put_together(model)
    return bool((found - wanted).norm() <= 1e-4 * wanted.norm())


def main() -> int:
    """Try every family, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="families by model_type, comma-separated")
    parser.add_argument("--output", type=Path, default=Path("docs/families.md"))
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    chosen = (
        arguments.only.split(",") if arguments.only else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )
    rows = {}
    for number, kind in enumerate(chosen, 1):
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            rows[kind] = outcome(kind)
        print(f"[{number}/{len(chosen)}] {kind}: {rows[kind]}", flush=True)
    counts = Counter(found.split(":")[0].split(" (")[0] for found in rows.values())
    print(dict(counts))
    if not arguments.only:
        arguments.output.write_text(page(rows, counts))
    return 1 if any(found.startswith("FAULT") for found in rows.values()) else 0


def page(rows: dict[str, str], counts: Counter[str]) -> str:
    """Format the table as a page of the documentation."""
    lines = "\n".join(f"| {kind} | {found.replace('|', '/')} |" for kind, found in rows.items())
    return f"""# Families of models

Every causal language model of transformers that builds with two small blocks and random weights was
compressed, saved and loaded again; `python bench/families.py` does it and writes this page. Of
{len(rows)} families {counts["loads"]} come back with the same bits and {counts["refused"]} are
refused in one sentence; {counts[BUILT]} could not be built from one small configuration, which says
nothing about them.

| model_type | |
|---|---|
{lines}
"""


if __name__ == "__main__":
    sys.exit(main())
