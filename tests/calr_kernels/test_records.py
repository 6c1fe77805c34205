"""Quantised matrices as bytes: what is packed comes back, in the planes that the docs describe."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from calr_kernels import Form, records
from calr_kernels.forms import BITS, LEVELS


def forms():
    """Every combination that exists, in groups of 32 and 96."""
    for bits in BITS:
        for levels in LEVELS:
            for group in (32, 96):
                try:
                    yield Form(bits, levels, group)
                except ValueError:
                    assert bits == 8 or levels == "table"


FORMS = list(forms())


def test_there_are_eleven_kinds_of_levels():
    assert len(FORMS) == 2 * 11


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_levels_are_distinct_ascending_int8(form):
    assert len(form.values) == 1 << form.bits
    assert list(form.values) == sorted(set(form.values))
    assert -128 <= form.values[0] < 0 < form.values[-1] <= 127


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMS), st.integers(0, 4), st.integers(1, 200), st.integers(0, 2**31))
def test_what_is_packed_comes_back(form, rows, columns, seed):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << form.bits, (rows, columns), generator=draw).to(torch.uint8)
    scales = torch.randn(rows, form.groups(columns), generator=draw).half()
    packed = records.pack(codes, scales, form)
    records.check(packed, form, rows, columns)
    assert packed.shape == form.shape(rows, columns)
    assert packed.numel() == form.bytes(rows, columns, 2)
    assert packed.shape != (rows, columns)
    found = records.unpack(packed, form, columns)
    assert torch.equal(found[0], codes)
    assert torch.equal(found[1], scales)
    levels = torch.tensor(form.values, dtype=torch.float64)[codes.long()]
    spread = scales.double().repeat_interleave(form.scale_group, 1)[:, :columns]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wanted = (levels * spread).float().to(dtype)  # the product is exact in float64
        assert torch.equal(records.dequantize(packed, form, columns, dtype), wanted)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_nearest_level_is_the_nearest(form):
    ratios = torch.linspace(-300, 300, 4801) + 0.01  # no ties
    values = torch.tensor(form.values, dtype=torch.float64)
    wanted = (ratios.double()[:, None] - values).abs().argmin(1)
    codes = records.nearest(ratios, records.code_cells(form, ratios.device))
    assert torch.equal(codes.long(), wanted)
    levels = records.nearest(ratios, records.level_cells(form, ratios.device))
    assert torch.equal(levels.double(), values[wanted])


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (Form(4, "uniform", 32), GGMLQuantizationType.Q4_0),
        (Form(4, "table", 32), GGMLQuantizationType.IQ4_NL),
    ],
)
def test_four_bits_in_groups_of_32_are_the_bytes_of_gguf(form, kind):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (3, 64), generator=draw).to(torch.uint8)
    packed = records.pack(codes, torch.randn(3, 2, generator=draw), form)
    theirs = gguf_dequantize(packed.flatten(1).numpy(), kind)
    assert np.array_equal(theirs, records.dequantize(packed, form, 64, torch.float32).numpy())


def test_what_no_matrix_has_is_refused():
    form = Form(5, "formula", 32)
    codes = torch.zeros(2, 40, dtype=torch.uint8)
    good = records.pack(codes, torch.ones(2, 2), form)
    with pytest.raises(ValueError, match=r"must be .* torch\.uint8"):
        records.check(good.to(torch.int8), form, 2, 40)
    with pytest.raises(ValueError, match=r"must be \[2, 3"):
        records.check(good, form, 2, 70)
    bad = good.clone()
    bad[0, 0, :2] = torch.tensor([0, 0x7C])  # infinity
    with pytest.raises(ValueError, match="NaN or infinity"):
        records.check(bad, form, 2, 40)
    bad = good.clone()
    bad[1, 1, -1] ^= 0x80  # the high bit of the last padded place
    with pytest.raises(ValueError, match="pad a scale group"):
        records.check(bad, form, 2, 40)
    with pytest.raises(ValueError, match="has more than 5 bits"):
        records.pack(codes + 32, torch.ones(2, 2), form)
    with pytest.raises(ValueError, match="not finite"):
        records.pack(codes, torch.full((2, 2), 1e9), form)


@pytest.mark.parametrize(
    "wrong",
    [(2, "uniform", 32), (4, "x", 32), (5, "table", 32), (8, "formula", 32), (4, "table", 48)],
)
def test_forms_that_do_not_exist(wrong):
    with pytest.raises(ValueError, match=r"bits=|levels=|scale_group="):
        Form(*wrong)
