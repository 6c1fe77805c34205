"""Where models run in 16-bit products."""

import pytest
import torch

from calr.testing import tiny_llama
from calr.training.precision import in_sixteen_bits, mixed

MACHINES = [  # what torch says of the CPU, and whether it multiplies bfloat16 faster than float32
    ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
    ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
    ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
    ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, False),
    ({}, False),
]


@pytest.mark.parametrize(("capabilities", "fast"), MACHINES)
def test_float32_runs_in_bfloat16_where_that_is_faster(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    model = tiny_llama()
    assert in_sixteen_bits(model) is fast
    with mixed(model), torch.no_grad():
        logits = model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits
    assert logits.dtype == (torch.bfloat16 if fast else torch.float32)


def test_a_16_bit_model_stays_one_everywhere(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert in_sixteen_bits(tiny_llama().bfloat16())
