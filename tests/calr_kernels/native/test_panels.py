"""Quantised layers in panels: products against float64, on every instruction set."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calr_kernels import Form, QuantizedLinear, eligible, native, records
from calr_kernels.forms import BITS, CORRECTIVE, TABLES
from calr_kernels.layout import Factors, Records
from calr_kernels.native import Bound
from calr_kernels.native.panels import packed

pytestmark = pytest.mark.usefixtures("isa")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 6e-4,
}  # of the outputs' scale


def filled(rows, columns, form, generator):
    """Records of random codes and scales of both signs, some of them 0."""
    codes = torch.randint(1 << form.bits, (rows, columns), generator=generator).to(torch.uint8)
    scales = torch.randn(rows, form.groups(columns), generator=generator) / 50
    scales[::7, 0] = 0
    return records.pack(codes, scales, form)


def test_another_default_device_changes_nothing():
    form = Form(5, "formula", 32)
    layer = QuantizedLinear(40, 24, form, bias=False)
    layer.weight.copy_(filled(24, 40, form, torch.Generator().manual_seed(0)))
    x, expected = torch.ones(2, 40), layer(torch.ones(2, 40))
    numbers = records.dequantize(layer.weight, form, 40, torch.float32)
    native.quantized.table.cache_clear()
    with torch.device("meta"):
        again = copy.deepcopy(layer)
        assert torch.equal(again(x), expected)
        found = records.dequantize(again.weight, form, 40, torch.float32)
        assert torch.equal(found, numbers)


def layer(n, k, form, rank=0, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    paths = [filled(rank, side, CORRECTIVE, generator) for side in (k, n)] if rank else []
    added = torch.randn(n, generator=generator).to(dtype) if bias else None
    return Records(filled(n, k, form, generator), form, k, added, *paths)


def exact(x, made):
    """The layer in float64."""
    x, form = x.double(), made.form
    y = x @ records.dequantize(made.weight, form, made.in_features, torch.float32).double().mT
    if made.corrective_down is not None:
        down, up = made.corrective_down.double(), made.corrective_up.double()
        if made.corrective_down.dtype is torch.uint8:
            down = records.dequantize(made.corrective_down, CORRECTIVE, x.shape[-1], torch.float64)
            up = records.dequantize(made.corrective_up, CORRECTIVE, y.shape[-1], torch.float64)
        y = y + x @ down.mT @ up
    return y if made.bias is None else y + made.bias.double()


def check(found, x, made):
    """Compare with what sums of such terms come to: those of a single output may cancel."""
    expected = exact(x, made)
    numbers = records.dequantize(made.weight, made.form, made.in_features, torch.float32).double()
    terms = (x.double().square() @ numbers.square().mT).sqrt()
    scale = float(expected.abs().max().maximum(terms.max())) + 1e-30
    tolerance = TOLERANCE[x.dtype] * (2 if made.corrective_down is not None else 1)
    tolerance *= max(1.0, (made.form.scale_group / 128) ** 0.5)  # a group's terms: one long sum
    assert float((found.double() - expected).abs().max()) <= tolerance * scale


FORMS = [
    Form(bits, levels, group)
    for bits in BITS
    for levels in ("uniform", "formula", "table")
    for group in (32, 96)
    if not (levels == "table" and bits not in TABLES) and not (levels == "formula" and bits == 8)
]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products_are_those_of_the_numbers(form, dtype):
    for rows, n, k in [(1, 16, 96), (1, 37, 100), (3, 15, 200), (11, 33, 72), (16, 20, 130)]:
        made = layer(n, k, form, dtype=dtype)
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
        check(Bound().linears(x, (made,))[0], x, made)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 16, 40])
def test_the_corrective_path_is_added(rank, dtype):
    for n, k in [(16, 64), (75, 100)]:
        made = layer(n, k, Form(4, "table", 64), rank, bias=False, dtype=dtype)
        x = torch.randn(5, k, generator=torch.Generator().manual_seed(rank)).to(dtype)
        check(Bound().linears(x, (made,))[0], x, made)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_a_corrective_path_of_numbers_is_added(rank, dtype):
    for n, k in [(16, 64), (75, 100), (200, 33)]:
        generator = torch.Generator().manual_seed(rank)
        paths = [torch.randn(rank, side, generator=generator).to(dtype) / 8 for side in (k, n)]
        made = layer(n, k, Form(5, "formula", 64), dtype=dtype)
        made = made._replace(corrective_down=paths[0], corrective_up=paths[1])
        packed = layer(n, k, Form(4, "table", 32), 8, dtype=dtype)
        for rows in (1, 5):
            x = torch.randn(rows, k, generator=generator).to(dtype)
            for found, own in zip(Bound().linears(x, (made, packed)), (made, packed), strict=True):
                check(found, x, own)
            bound = Bound()
            bound.linears(x, (made,))
            paths[1].mul_(2)  # what is written to them is followed
            check(bound.linears(x, (made,))[0], x, made)


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from([32, 64, 160, 512]),
    n=st.integers(1, 40),
    k=st.integers(1, 600),
    rows=st.integers(1, 16),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
)
@torch.no_grad()
def test_any_shape(bits, group, n, k, rows, scale):
    made = layer(n, k, Form(bits, "uniform", group), seed=n * k)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(k)) * scale
    for dtype in (torch.float32, torch.bfloat16):
        own = made._replace(bias=made.bias.to(dtype))
        check(Bound().linears(x.to(dtype), (own,))[0], x.to(dtype), own)


@torch.no_grad()
def test_an_outlier_costs_its_group_no_more_than_16_bits_do():
    """One input of a thousand times the others, as models have them."""
    made = layer(64, 256, Form(8, "uniform", 64), bias=False)
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    x[:, 70] = 1000
    check(Bound().linears(x.bfloat16(), (made,))[0], x.bfloat16(), made)


@torch.no_grad()
@pytest.mark.parametrize("code", [0, 255])
def test_the_largest_sums_fit(code):
    """Of a group of 512, levels and inputs as large as they can be."""
    form, codes = Form(8, "uniform", 512), torch.full((20, 1024), code, dtype=torch.uint8)
    made = Records(records.pack(codes, torch.ones(20, 2), form), form, 1024)
    x = torch.ones(3, 1024, dtype=torch.bfloat16) * torch.tensor([[1.0], [-1.0], [3.0]])
    check(Bound().linears(x.bfloat16(), (made,))[0], x.bfloat16(), made)


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_so(value, dtype):
    made = layer(20, 128, Form(5, "formula", 64), dtype=dtype)
    x = torch.ones(2, 128, dtype=dtype)
    x[1, 100] = value
    found = Bound().linears(x, (made,))[0]
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads_and_rows(dtype, monkeypatch):
    made = [layer(n, 512, Form(4, "table", 64), 8, dtype=dtype) for n in (300, 80)]
    dense = Factors(torch.randn(90, 512, generator=torch.Generator().manual_seed(1)).to(dtype))
    x = torch.randn(13, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(Bound().linears(x, [*made, dense]))
        for again, first in zip(found[-1], found[0], strict=True):
            assert torch.equal(again, first)
    for row in range(len(x)):
        alone = Bound().linears(x[row : row + 1], [*made, dense])
        assert all(torch.equal(y[0], whole[row]) for y, whole in zip(alone, found[0], strict=True))


@torch.no_grad()
def test_panels_are_shared_and_follow_what_is_written():
    made, x = layer(33, 64, Form(4, "table", 64)), torch.randn(1, 64)
    bound = Bound()
    check(bound.linears(x, (made,))[0], x, made)
    first = packed(made.weight, made.form, 64)
    assert packed(made.weight, made.form, 64) is first
    other = layer(33, 64, made.form, seed=5)
    made.weight.copy_(other.weight)
    check(bound.linears(x, (made,))[0], x, made)
    assert packed(made.weight, made.form, 64) is not first
    assert pickle.loads(pickle.dumps(bound))._binding is None
    assert copy.deepcopy(bound)._binding is None


@torch.no_grad()
def test_records_of_inference_mode_are_read_as_they_are():
    with torch.inference_mode():
        made, x = layer(33, 64, Form(4, "table", 64)), torch.randn(1, 64)
        bound = Bound()
        check(bound.linears(x, (made,))[0], x, made)
        made.weight.copy_(layer(33, 64, made.form, seed=5).weight)
        check(bound.linears(x, (made,))[0], x, made)


def test_what_panels_do_not_hold_is_not_eligible():
    x = torch.randn(1, 64)
    fine = layer(33, 64, Form(4, "table", 64), 8)
    assert eligible.native_packed(x, fine)
    assert not eligible.native_packed(torch.randn(17, 64), fine)
    assert not eligible.native_packed(torch.randn(1, 60), fine)
    assert not eligible.native_packed(x.double(), fine)
    assert not eligible.native_packed(x, layer(33, 64, Form(8, "uniform", 1024)))
    wide = fine._replace(corrective_down=torch.randn(8, 64), corrective_up=torch.randn(8, 33))
    assert eligible.native_packed(x, wide)
    assert not eligible.native_packed(x, wide._replace(corrective_down=fine.corrective_down))
    assert not eligible.native_packed(x, wide._replace(corrective_up=torch.randn(33, 8).mT))
    assert not eligible.native_packed(x, wide._replace(corrective_up=torch.randn(8, 33).double()))
    assert not eligible.native_packed(x.bfloat16(), wide._replace(bias=None))


def test_a_layer_gives_its_tensors_only_where_nothing_is_bypassed():
    x = torch.randn(1, 64)
    quantised = QuantizedLinear(64, 32, Form(4, "table", 64, corrective_rank=8))
    assert quantised.fusible(x)
    assert quantised.records().corrective_down is quantised.corrective.down
    assert not quantised.fusible(x.bfloat16())  # its bias is float32
    handle = quantised.corrective.register_forward_hook(lambda *given: None)
    assert not quantised.fusible(x)
    handle.remove()
    quantised.append(torch.randn(2, 64), torch.randn(32, 2))  # numbers now
    assert quantised.fusible(x)
    quantised.corrective.bfloat16()
    assert not quantised.fusible(x)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_numbers_give_what_rows_do(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 64, 16, 1), (75, 33, 7, 1), (31, 100, 20, 3), (48, 7, 1, 9), (40, 65, 9, 15)]
    for n, k, rank, rows in shapes:
        dense, down, up = (
            torch.randn(shape, generator=generator).to(dtype)
            for shape in ((n, k), (rank, k), (n - rank, rank))
        )
        pivots = torch.randperm(n, generator=generator)[:rank].sort()[0].int()
        layers = Factors(dense), Factors(up, down, pivots)
        x = torch.randn(rows, k, generator=generator).to(dtype)
        bound = Bound()
        from_rows = bound.linears(x, layers)
        for weight in (dense, down, up):
            assert native.pack(weight) is (weight.numel() > 0)
        columns = k + k % 2 if dtype is torch.bfloat16 else k  # two lie together
        assert native.packed_bytes([dense]) == -(-n // 16) * 16 * columns * dtype.itemsize
        packed_rows = bound.linears(x, layers)  # bound anew
        exact = x.double() @ dense.double().mT
        for found in (from_rows[0], packed_rows[0]):
            error = (found.double() - exact).norm() / exact.norm()
            assert float(error) <= 4 * torch.finfo(dtype).eps
        difference = (packed_rows[1].double() - from_rows[1].double()).norm()
        assert float(difference) <= 4 * torch.finfo(dtype).eps * float(from_rows[1].double().norm())
        for row in range(rows):  # one at a time gives the same bits
            alone = bound.linears(x[row : row + 1], layers)
            for y, whole in zip(alone, packed_rows, strict=True):
                assert torch.equal(y[0], whole[row])


@torch.no_grad()
def test_packed_numbers_are_read_until_they_are_written_to():
    weight, x = torch.randn(20, 33), torch.randn(1, 33)
    bound = Bound()
    assert native.pack(weight)
    torch.testing.assert_close(bound.linears(x, (Factors(weight),))[0], x @ weight.mT)
    assert bound._binding._packed
    weight.mul_(2)
    torch.testing.assert_close(bound.linears(x, (Factors(weight),))[0], x @ weight.mT)
    assert not bound._binding._packed
    assert native.pack(weight)
    torch.testing.assert_close(bound.linears(x, (Factors(weight),))[0], x @ weight.mT)
    assert bound._binding._packed


def test_what_cannot_be_packed_is_not():
    with torch.inference_mode():
        assert not native.pack(torch.randn(16, 16))
    assert not native.pack(torch.randn(16, 16).double())
    assert not native.pack(torch.randn(16))
    assert not native.pack(torch.randn(0, 16))
    assert not native.pack(torch.randn(16, 16, device="meta"))
