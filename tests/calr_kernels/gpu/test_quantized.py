"""Quantised layers against float64: in the interpreter, or on a GPU (--device cuda)."""

import pytest
import torch

from calr_kernels import records
from calr_kernels.forms import CORRECTIVE, TABLES, Form
from calr_kernels.gpu import linears
from calr_kernels.gpu.dequantize import run_dequantize
from calr_kernels.gpu.packing import pack, span_of
from calr_kernels.layout import Records

FORMS = [
    Form(3, "table", 96), Form(3, "formula", 64), Form(3, "uniform", 32), Form(4, "table", 32),
    Form(4, "formula", 160), Form(4, "uniform", 128), Form(5, "formula", 64),
    Form(5, "uniform", 32), Form(6, "formula", 96), Form(6, "uniform", 256), Form(8, "uniform", 32),
]  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@pytest.fixture
def made(draw, device):
    """Records of a form for [N, K]."""

    def of(form: Form, n: int, k: int):
        generator = torch.Generator().manual_seed(n * k + form.bits)
        codes = torch.randint(1 << form.bits, (n, k), generator=generator).byte()
        return records.pack(codes.to(device), draw(n, form.groups(k)) / 50, form)

    return of


def test_forms_are_all_that_there_are():
    """Every bits and levels, so that each level below is compared."""
    every = {(b, x) for b in (3, 4, 5, 6, 8) for x in ("uniform", "formula", "table")}
    every -= {(8, "formula")} | {(b, "table") for b in (3, 4, 5, 6, 8) if b not in TABLES}
    assert {(form.bits, form.levels) for form in FORMS} == every


@DTYPES
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_numbers_are_those_of_the_reference_bit_for_bit(form, dtype, made, draw):
    weight = made(form, 7, 1100)
    wanted = records.dequantize(weight, form, 1100, dtype)
    assert torch.equal(run_dequantize(weight, form, 1100, dtype), wanted)
    other = draw(7, form.groups(1100))
    wanted = records.dequantize(weight, form, 1100, dtype, other)
    assert torch.equal(run_dequantize(weight, form, 1100, dtype, other), wanted)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("k", [32, 200, 576])
def test_packed_words_hold_the_codes_in_their_places(form, k, made):
    """Field i of word c of a block is its weight 16 i + c."""
    weight = made(form, 5, k)
    found, (codes, scales) = (
        pack(weight, form.bits, form.levels, form.scale_group, k),
        records.unpack(weight, form, k),
    )
    low = {3: 2, 5: 4, 6: 4}.get(form.bits, form.bits)
    span, block = span_of(form)
    for n, at in ((0, 0), (3, k // 2), (4, k - 1)):
        (s, j), (i, c) = divmod(at, block), divmod(at % block, 16)
        code = int(found.words[n, s, c]) >> (i * low) & ((1 << low) - 1)
        if found.high is not None:
            more = form.bits - low
            code |= (int(found.high[n, s, c]) >> (i * more) & ((1 << more) - 1)) << low
        assert code == codes[n, at]
        assert found.scales[n, (s * block + j) // span] == scales[n, at // form.scale_group]


@DTYPES
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 6, 2200), (3, 37, 200), (17, 70, 200), (70, 9, 96)])
def test_matches_the_reference(m, n, k, form, dtype, made, draw, close):
    x, weight, bias = draw(m, k, dtype=dtype), made(form, n, k), draw(n, dtype=dtype)
    wanted = x.double() @ records.dequantize(weight, form, k, dtype).double().T
    for b in (None, bias):
        layer = Records(weight, form, k, b)
        y = linears.quantized_linear(x, layer)
        assert y.dtype == dtype
        close(y, wanted if b is None else wanted + b.double())
        assert torch.equal(y, linears.quantized_linear(x, layer))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 6, 80])
def test_adds_the_corrective_path(m, rank, bits, made, draw, close):
    form, n, k = Form(4, "table", 32, corrective_rank=rank, corrective_bits=bits), 37, 200
    weight, x = made(form, n, k), draw(m, k)
    if bits == 8:
        stored = made(CORRECTIVE, rank, k), made(CORRECTIVE, rank, n)
        ends = zip(stored, (k, n), strict=True)
        factors = [records.dequantize(f, CORRECTIVE, c, x.dtype) for f, c in ends]
    else:
        factors = stored = draw(rank, k) / 20, draw(rank, n) / 20
    down, up = (factor.double() for factor in factors)
    wanted = x.double() @ records.dequantize(weight, form, k, x.dtype).double().T
    wanted += x.double() @ down.T @ up
    close(linears.quantized_linear(x, Records(weight, form, k, None, *stored)), wanted)


@pytest.mark.parametrize("m", [1, 4, 20])
def test_rounds_to_bfloat16(m, made, draw, close):
    """In float32 tensors that hold bfloat16 values: the interpreter cannot compute in bfloat16."""
    form = Form(5, "formula", 64)
    x, weight = draw(m, 200).bfloat16(), made(form, 20, 200)
    y = linears.quantized_linear(x.float(), Records(weight, form, 200), emulate_bf16=True)
    assert torch.equal(y, y.bfloat16().float())
    close(y, x.double() @ records.dequantize(weight, form, 200, x.dtype).double().T, 1.6e-2)


def test_sees_records_that_were_written_to(made, draw, close):
    form, x = Form(4, "table", 32), draw(2, 64)
    weight = made(form, 8, 64)
    linears.quantized_linear(x, Records(weight, form, 64))
    weight.copy_(records.rescaled(weight, records.scales_of(weight) * 2))
    wanted = x.double() @ records.dequantize(weight, form, 64, x.dtype).double().T
    close(linears.quantized_linear(x, Records(weight, form, 64)), wanted)


def test_a_scale_of_zero_silences_whatever_its_codes(made, draw):
    form = Form(4, "table", 32)
    weight = records.rescaled(made(form, 8, 64), torch.zeros_like(draw(8, 2), dtype=torch.float16))
    assert not linears.quantized_linear(draw(1, 64), Records(weight, form, 64)).any()


@pytest.mark.parametrize("m", [2, 17, 70])
def test_takes_a_bias_that_is_a_view(m, made, draw, close):
    form, x, bias = Form(4, "table", 32), draw(m, 64, dtype=torch.float16), draw(16).half()[::2]
    weight = made(form, 8, 64)
    wanted = x.double() @ records.dequantize(weight, form, 64, x.dtype).double().T + bias.double()
    close(linears.quantized_linear(x, Records(weight, form, 64, bias)), wanted)


def test_many_rows_are_multiplied_a_part_of_the_weights_at_a_time(made, draw, close, monkeypatch):
    monkeypatch.setattr(linears, "BUFFER", 3 * 64 * 4)  # three rows of float32
    form, x, bias = Form(4, "table", 32), draw(70, 64), draw(8)
    weight = made(form, 8, 64)
    wanted = x.double() @ records.dequantize(weight, form, 64, x.dtype).double().T + bias.double()
    close(linears.quantized_linear(x, Records(weight, form, 64, bias)), wanted)


def test_records_made_under_inference_mode_are_not_packed(made, draw, close, monkeypatch):
    """Nobody counts who writes to them: a packed copy would be made anew with every call."""
    form, x = Form(4, "table", 32), draw(2, 64)
    monkeypatch.setattr(linears, "pack", None)
    with torch.inference_mode():
        weight = made(form, 8, 64)
        wanted = x.double() @ records.dequantize(weight, form, 64, x.dtype).double().T
        close(linears.quantized_linear(x, Records(weight, form, 64)), wanted)


@pytest.mark.parametrize("m", [2, 70])
def test_autocast_rounds_what_is_multiplied_and_not_the_result(m, made, draw, close, device):
    form, x, bias = Form(4, "table", 32), draw(m, 64), draw(8)
    weight = made(form, 8, 64)
    with torch.autocast(device.type, torch.float16):
        y = linears.quantized_linear(x, Records(weight, form, 64, bias))
    assert y.dtype == torch.float32
    assert torch.equal(y, y.half().float())
    x, bias = x.half(), bias.half()
    wanted = x.double() @ records.dequantize(weight, form, 64, x.dtype).double().T + bias.double()
    close(y, wanted, 2e-3)
