"""The quantised operation and its modules."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from calr_kernels import (
    Form,
    QuantizedEmbedding,
    QuantizedLinear,
    eligible,
    native,
    quantized,
    quantized_linear,
    records,
    reference,
)
from calr_kernels.forms import CORRECTIVE

FORMS = [Form(3, "table", 32), Form(4, "table", 64), Form(5, "formula", 32), Form(8, "uniform", 64)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def matrix(form, rows, columns, device="cpu"):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(1 << form.bits, (rows, columns), generator=draw).to(torch.uint8)
    scales = torch.randn(rows, form.groups(columns), generator=draw) / 500
    return records.pack(codes, scales, form).to(device)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(7, 100), (1, 32), (33, 64)])
def test_it_multiplies_by_the_weights_that_are_stored(form, rows, columns, dtype, device):
    packed = matrix(form, rows, columns, device)
    x = torch.randn(2, 3, columns, dtype=torch.float64, device=device).to(dtype)
    bias = torch.randn(rows, dtype=torch.float64, device=device).to(dtype)
    weight = records.dequantize(packed, form, columns, dtype).double()
    wanted = nn.functional.linear(x.double(), weight, bias.double())
    found = quantized_linear(x, packed, form, bias)
    assert found.dtype == dtype
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert float(error) < TOLERANCE[dtype]


@pytest.mark.parametrize("path", ["none", "8 bits", "16 bits"])
def test_the_operator_is_a_good_citizen(path):
    form, draw = FORMS[1], torch.Generator().manual_seed(1)
    packed = matrix(form, 5, 64)
    x, bias, *factors = (
        torch.randn(*shape, generator=draw, requires_grad=True)
        for shape in [(3, 64), (5,), (2, 64), (2, 5)]
    )
    given = {
        "none": (None, None),
        "8 bits": (matrix(CORRECTIVE, 2, 64), matrix(CORRECTIVE, 2, 5)),
        "16 bits": tuple(factors),
    }[path]
    numbers = given
    if path == "8 bits":
        numbers = [
            records.dequantize(factor, CORRECTIVE, columns, torch.float32)
            for factor, columns in zip(given, (64, 5), strict=True)
        ]
    arguments = (x, packed, form.bits, form.levels, form.scale_group, bias, *given)
    torch.library.opcheck(torch.ops.calr.quantized_linear, arguments)
    trained = [x, bias, *(factors if path == "16 bits" else ())]
    found = torch.autograd.grad(
        quantized_linear(x, packed, form, bias, *given).square().sum(), trained
    )
    down, up = numbers
    wanted = reference.quantized_linear(x, packed, form, bias, down, None if up is None else up.mT)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), trained))


@pytest.mark.parametrize("bits", [0, 8, 16])
def test_it_compiles(bits):
    form = replace(FORMS[1], corrective_rank=3 if bits else 0, corrective_bits=bits or 8)
    layer = QuantizedLinear(64, 5, form)
    layer.weight.data = matrix(form, 5, 64)
    if bits == 16:
        layer.corrective.down.data, layer.corrective.up.data = torch.randn(3, 64), torch.randn(3, 5)
    elif bits == 8:
        path = layer.corrective
        path.down.data, path.up.data = matrix(CORRECTIVE, 3, 64), matrix(CORRECTIVE, 3, 5)
    x, seen = torch.randn(2, 64), []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if "function" in node.op)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
    assert seen == ["calr.quantized_linear"], "the path is in the operator"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 65)}, "weight .*: must be"),
        ({"x": torch.ones(2, 64).int()}, "x .*: must be"),
        ({"weight": torch.ones(5, 64)}, "weight .*: must be"),
        ({"bias": torch.ones(4)}, "bias .*: must be"),
        ({"bias": torch.ones(5).half()}, "bias .*: must be"),
        ({"bias": torch.ones(5, device="meta")}, "bias: is on meta"),
        ({"corrective_up": None}, "give both or neither"),
        ({"corrective_down": torch.ones(2, 63)}, r"corrective_down .* must be \[2, 64\]"),
        ({"corrective_up": torch.ones(3, 5)}, r"corrective_up .* must be \[2, 5\]"),
        ({"corrective_up": torch.ones(2, 5).half()}, "corrective_up .*float16: must be"),
        ({"corrective_down": matrix(CORRECTIVE, 2, 64)}, "corrective_up .*float32: must be"),
        ({"corrective_up": torch.ones(2, 5, device="meta")}, "corrective_up: is on meta"),
    ],
)
def test_malformed_calls_are_refused_by_name(change, message):
    given = {"x": torch.ones(2, 64), "weight": matrix(FORMS[1], 5, 64), "bias": torch.ones(5)}
    given |= {"corrective_down": torch.ones(2, 64), "corrective_up": torch.ones(2, 5)}
    with pytest.raises(ValueError, match=message):
        quantized_linear(**(given | change), form=FORMS[1])


def test_records_survive_a_change_of_dtype():
    form = FORMS[2]
    layer, packed = QuantizedLinear(64, 5, form), matrix(form, 5, 64)
    layer.weight.data = packed.clone()
    assert torch.equal(layer.to(torch.bfloat16).half().weight, packed)
    assert layer.bias.dtype == torch.float16
    assert layer(torch.ones(2, 64).half()).dtype == torch.float16
    dense = layer.to_dense(torch.float32)
    torch.testing.assert_close(dense.weight, records.dequantize(packed, form, 64, torch.float32))


@pytest.mark.parametrize("scale", [1.0, 24.0])
def test_an_embedding_looks_its_rows_up(scale):
    form = FORMS[0]
    module = QuantizedEmbedding(9, 40, form, scale=scale)
    module.weight.data = matrix(form, 9, 40)
    ids = torch.tensor([[0, 8, 3], [3, 3, 1]])
    rows = module.to_dense().weight[ids]
    assert torch.equal(module(ids), rows * scale)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids), module(ids))
    arguments = (module.weight.data, form.bits, form.levels, form.scale_group, 40, torch.float32)
    torch.library.opcheck(torch.ops.calr.dequantize, arguments)
    assert module.bfloat16()(ids).dtype == torch.bfloat16
    assert module.weight.dtype == torch.uint8


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("rank", [1, 8, 33])
@pytest.mark.parametrize(("rows", "grad"), [(5, True), (5, False), (20, False), (40, False)])
def test_the_corrective_path_is_added(rows, grad, rank, bits, dtype, device, monkeypatch):
    """To the outputs, in the native kernel, or of many rows to the numbers of the weights."""
    form = Form(4, "table", 32, corrective_rank=rank, corrective_bits=bits)
    layer, draw = QuantizedLinear(100, 37, form), torch.Generator().manual_seed(0)
    layer.weight.data = matrix(form, 37, 100)
    layer.bias.data = torch.randn(37, generator=draw)
    path = layer.corrective
    if bits == 8:
        path.down.data, path.up.data = matrix(CORRECTIVE, rank, 100), matrix(CORRECTIVE, rank, 37)
    else:
        path.down.data = torch.randn(rank, 100, generator=draw) / 10
        path.up.data = torch.randn(rank, 37, generator=draw) / 10
    layer = layer.to(device, dtype)
    x = torch.randn(rows, 100, generator=draw, dtype=torch.float64).to(device, dtype)
    down, up = path.factors(torch.float64)
    arguments = (layer.weight, form, layer.bias.double(), down, up)
    wanted = reference.quantized_linear(x.double(), *arguments)
    whole, added = layer._whole, []
    monkeypatch.setattr(layer, "_whole", lambda *given: added.append(1) or whole(*given))
    with torch.set_grad_enabled(grad):
        found = layer(x)
    assert added == ([1] if rows == 40 and x.is_cpu else [])
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert float(error) < 2 * TOLERANCE[dtype]
    dense = layer.to_dense(torch.float64)
    torch.testing.assert_close(dense(x.double()), wanted, rtol=1e-6, atol=1e-6)
    stored = sum(t.numel() * t.element_size() for t in (layer.weight, path.down, path.up))
    if bits == 8 or dtype.itemsize == 2:
        assert stored == form.bytes(37, 100, 2)


@pytest.mark.parametrize("rank", [0, 3])
def test_terms_are_appended_to_the_corrective_path(rank):
    draw = torch.Generator().manual_seed(2)
    form = Form(5, "formula", 32, corrective_rank=rank)
    layer = QuantizedLinear(64, 7, form, bias=False)
    layer.weight.data = matrix(form, 7, 64)
    if rank:
        layer.corrective.down.data = matrix(CORRECTIVE, rank, 64)
        layer.corrective.up.data = matrix(CORRECTIVE, rank, 7)
    before, x = layer.dense_weight(torch.float64), torch.randn(3, 64, generator=draw)
    down, up = torch.randn(2, 64, generator=draw), torch.randn(7, 2, generator=draw)
    layer.append(down, up)
    assert layer.form == Form(5, "formula", 32, corrective_rank=rank + 2, corrective_bits=16)
    wanted = x.double() @ (before + up.double() @ down.double()).mT
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("change", [{"corrective_rank": -1}, {"corrective_rank": True},
                                    {"corrective_rank": 2, "corrective_bits": 4}])  # fmt: skip
def test_corrective_paths_that_no_layer_has_are_refused(change):
    with pytest.raises(ValueError, match=next(reversed(change))):
        Form(4, "table", 32, **change)
    with pytest.raises(ValueError, match="an embedding has no corrective path"):
        QuantizedEmbedding(9, 40, Form(4, "table", 32, corrective_rank=1))


ALL_FORMS = [
    Form(3, "table", 32), Form(3, "formula", 96), Form(4, "table", 64), Form(4, "uniform", 32),
    Form(5, "formula", 64), Form(5, "uniform", 32), Form(6, "formula", 128), Form(8, "uniform", 64),
]  # fmt: skip


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
@pytest.mark.parametrize("columns", [32, 100, 576])
def test_the_native_kernel_reads_the_same_numbers(form, columns):
    packed = matrix(form, 37, columns)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = native.dequantize(packed, form, columns, dtype, None)
        assert torch.equal(found, records.dequantize(packed, form, columns, dtype))
    for rows in (1, 3, 4, 7):
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        bias = torch.randn(37, generator=torch.Generator().manual_seed(3))
        weight = records.dequantize(packed, form, columns, torch.float32).double()
        wanted = nn.functional.linear(x.double(), weight, bias.double())
        found = native.quantized_linear(x, packed, form, bias)
        error = (found.double() - wanted).abs().max()
        plain = (nn.functional.linear(x, weight.float(), bias).double() - wanted).abs().max()
        assert float(error) <= 2 * float(plain) + 1e-6
        for one in range(rows):  # the same bits whatever else is in the batch
            assert torch.equal(
                native.quantized_linear(x[one : one + 1], packed, form, bias)[0], found[one]
            )


def test_threads_change_nothing():
    form = ALL_FORMS[4]
    packed, x = matrix(form, 300, 576), torch.randn(2, 576)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(native.quantized_linear(x, packed, form, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_without_the_native_kernel_there_is_the_same_result(monkeypatch):
    form = ALL_FORMS[2]
    packed, x = matrix(form, 9, 64), torch.randn(2, 64)
    fast = quantized_linear(x, packed, form)
    monkeypatch.setattr(eligible, "library", lambda: None)
    torch.testing.assert_close(quantized_linear(x, packed, form), fast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows_are_multiplied_in_float32_where_16_bit_is_slow(dtype, monkeypatch):
    """The same weights, rounded to the dtype; what is between the products is not."""
    form, draw = FORMS[1], torch.Generator().manual_seed(0)
    packed = matrix(form, 33, 64)
    x = torch.randn(40, 64, generator=draw).to(dtype).requires_grad_()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    seen = []
    linear = nn.functional.linear
    monkeypatch.setattr(quantized, "linear", lambda *a: seen.append(a[0].dtype) or linear(*a))
    found = quantized_linear(x, packed, form)
    assert (seen, found.dtype) == ([torch.float32], dtype)
    weight = records.dequantize(packed, form, 64, dtype).double()
    wanted = linear(x.detach().double(), weight)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2)
    found.float().sum().backward()
    torch.testing.assert_close(x.grad.double(), weight.sum(0).expand(40, 64), rtol=1e-2, atol=1e-2)
