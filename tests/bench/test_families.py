"""The sweep over families, on some of every kind: bench/families.py runs all of them."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import families

KINDS = {
    "llama": "loads",
    "gpt_neox": "loads",
    "gemma3_text": "loads",
    "qwen3": "loads",
    "phi": "loads",
    "opt": "loads",
    "mamba": "loads",
    "ctrl": "loads",
    "qwen2_moe": "loads",
    "rwkv": "refused: .* run one by one",
    "falcon": "refused: .*FalconLinear is not nn.Linear",
    "gpt2": "refused: .*Conv1D",
    "qwen3_moe": "loads",
    "gpt_oss": "loads",
    "jetmoe": "refused: .*stacked weights of experts",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_loads_or_is_refused_by_reason(kind):
    found = families.outcome(kind)
    if "(" in found and found.startswith(families.BUILT):
        pytest.skip(found)  # another transformers wants other settings
    assert re.match(KINDS[kind], found), found
