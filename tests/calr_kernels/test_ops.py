"""The operations against the float64 reference, on every instruction set that the machine has."""

import itertools

import pytest
import torch
from torch import nn

from calr_kernels import LowRankLinear, lowrank_linear, ops, pivoted_linear, reference
from calr_kernels.native import loader

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # M, K, N, r: odd sizes, tiles and tails, more rows than the native kernel takes
    (1, 576, 1536, 208),
    (1, 1536, 576, 200),
    (3, 33, 17, 5),
    (4, 100, 65, 40),
    (16, 64, 64, 1),
    (17, 40, 24, 8),
    (65, 31, 19, 7),
    (1, 1, 1, 1),
]
LAYOUTS = ["two_factor", "pivoted"]


def problem(m, k, n, r, layout, dtype, device="cpu", factor_dtype=None):
    """Arguments of the operation: x, down, up, pivots or None, bias."""
    generator = torch.Generator().manual_seed(m * 1000 + n)
    rows = n - r if layout == "pivoted" else n
    shapes = ((m, k), (r, k), (rows, r), (n,))
    scales = (1, k**-0.5, r**-0.5, 1)
    x, down, up, bias = (
        (torch.randn(s, generator=generator, dtype=torch.float64) * c).to(device)
        for s, c in zip(shapes, scales, strict=True)
    )
    pivots = None
    if layout == "pivoted":
        pivots = torch.randperm(n, generator=generator)[:r].int().to(device)
        if torch.device(device).type != "cpu":
            pivots = pivots.sort()[0]
    factor_dtype = factor_dtype or dtype
    return x.to(dtype), down.to(factor_dtype), up.to(factor_dtype), pivots, bias.to(dtype)


def plain(x, down, up, pivots, bias):
    """The same in plain PyTorch."""
    if pivots is None:
        return reference.lowrank_linear(x, down, up, bias)
    return reference.pivoted_linear(x, down, up, pivots, bias)


def run(x, down, up, pivots, bias):
    if pivots is None:
        return lowrank_linear(x, down, up, bias)
    return pivoted_linear(x, down, up, pivots, bias)


def wide(arguments):
    return [t.double() if t is not None and t.is_floating_point() else t for t in arguments]


def assert_as_accurate_as_torch(found, arguments):
    """Error to float64 at most twice what PyTorch itself makes in this dtype."""
    exact = plain(*wide(arguments))
    torch_error = (plain(*arguments).double() - exact).norm()
    floor = 1e-7 if found.dtype == torch.float32 else 0.0
    assert (found.double() - exact).norm() <= 2 * torch_error + floor * exact.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_torch(shape, dtype, layout, isa, device):
    arguments = problem(*shape, layout, dtype, device)
    found = run(*arguments)
    assert found.shape == (shape[0], shape[2])
    assert found.dtype == dtype
    assert_as_accurate_as_torch(found, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_float32_inputs_with_16_bit_factors(dtype, layout, isa, device):
    if device.type != "cpu":
        pytest.skip("on the CPU only")
    for shape in SHAPES:
        x, down, up, pivots, bias = problem(*shape, layout, torch.float32, factor_dtype=dtype)
        found = run(x, down, up, pivots, bias)
        assert found.dtype == torch.float32
        exact = plain(*wide((x, down, up, pivots, bias)))
        assert (found.double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_whatever_the_threads_and_the_batch(dtype, isa, device):
    x, down, up, pivots, bias = problem(8, 577, 1030, 210, "pivoted", dtype, device)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results += [run(x, down, up, pivots, bias) for _ in range(3)]
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results)
    if device.type == "cpu":
        alone = torch.cat([run(row[None], down, up, pivots, bias) for row in x])
        assert torch.equal(results[0], alone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_strided_and_many_dimensional_inputs(layout, device):
    x, down, up, pivots, bias = problem(12, 20, 14, 6, layout, torch.float32, device)
    expected = run(x, down, up, pivots, bias)
    assert run(x[:0], down, up, pivots, bias).shape == (0, 14)
    torch.testing.assert_close(
        run(x.reshape(3, 4, 20), down, up, pivots, bias), expected.reshape(3, 4, 14)
    )
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(run(strided, down, up, pivots, bias), expected)
    strided_down = down.mT.contiguous().mT
    torch.testing.assert_close(run(x[:1], strided_down, up, pivots, bias), expected[:1])
    torch.testing.assert_close(run(x[0], down, up, pivots, bias), expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_pass_through(dtype, isa):
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [1e-7, -0.0]]).to(dtype)
    down = up = torch.eye(2, dtype=dtype)
    expected = reference.lowrank_linear(x, down, up)
    found = lowrank_linear(x, down, up)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


def test_every_16_bit_value_is_read_and_rounded_like_torch(isa):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    one = torch.ones(1, 1)
    for dtype in DTYPES[1:]:
        values = bits.view(dtype)[:, None].contiguous()  # [65536, 1] as rows of `up`
        found = lowrank_linear(one.to(dtype), one.to(dtype), values)[0]
        torch.testing.assert_close(found, values[:, 0], equal_nan=True, rtol=0, atol=0)
        sums = torch.linspace(-70000, 70000, 4001)[:, None]  # rounds, and overflows float16
        found = lowrank_linear(sums[:16], one, one)
        torch.testing.assert_close(found, sums[:16])
        halves = torch.tensor([[1.0]], dtype=dtype)
        bias = torch.full((1,), 2.0**-9, dtype=dtype)
        expected = (halves.float() + bias.float()).to(dtype)
        torch.testing.assert_close(lowrank_linear(halves, halves, halves, bias), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_corrective_path_is_more_rank(layout, device):
    x, down, up, _, bias = problem(3, 20, 14, 6, "two_factor", torch.float64, device)
    a, b = down[:2] * 2, up[:, :2] * 3
    joined = lowrank_linear(x, torch.cat([down, a]), torch.cat([up, b], 1), bias)
    torch.testing.assert_close(lowrank_linear(x, down, up, bias, a, b), joined)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_operator_contract(layout, device):
    for frozen in itertools.product([True, False], repeat=2):
        arguments = problem(3, 6, 7, 4, layout, torch.float64, device)
        x, down, up, pivots, bias = arguments
        x.requires_grad_()
        down.requires_grad_(frozen[0])
        up.requires_grad_(frozen[1])
        bias.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda *t, pivots=pivots: ops.apply(t[0], t[1], t[2], pivots, t[3]),
            (x, down, up, bias),
        )
        run(*arguments).sum().backward()
        assert (down.grad is not None, up.grad is not None) == frozen
    arguments = problem(3, 6, 7, 4, layout, torch.float32, device)
    torch.library.opcheck(torch.ops.calr.lowrank_linear.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 40])
def test_compiles_as_one_graph_with_gradients(layout, m, device):
    torch.manual_seed(0)
    torch.compiler.reset()
    layer = LowRankLinear(20, 14, 6, layout, device=device)
    x = torch.randn(m, 20, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    found = layer.down.weight.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(found, layer.down.weight.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_module_runs_the_operation_only_where_nothing_is_bypassed(layout, monkeypatch):
    torch.manual_seed(0)
    layer, x = LowRankLinear(20, 14, 6, layout), torch.randn(2, 20)
    calls = []
    real = ops.apply
    monkeypatch.setattr(ops, "apply", lambda *a: calls.append(1) or real(*a))
    expected = layer(x)
    assert len(calls) == 1
    seen = []
    handle = layer.down.register_forward_hook(lambda m, a, y: seen.append(1))
    torch.testing.assert_close(layer(x), expected)
    handle.remove()
    assert (len(calls), len(seen)) == (1, 1)
    layer.down.forward = lambda x: nn.functional.linear(x, layer.down.weight)
    torch.testing.assert_close(layer(x), expected)
    del layer.down.forward
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert len(calls) == 1


BAD = [
    ({"x": (2, 7)}, "x: has size 7"),
    ({"up": (14, 5)}, "up: has size 5"),
    ({"bias": (13,)}, r"bias: has size \(13,\)"),
    ({"down": (20,)}, r"must be \[..., K\]"),
    ({"x": torch.float16}, "down: is torch.float32, but must be torch.float16"),
    ({"up": torch.bfloat16}, "up: is torch.bfloat16, but must be torch.float32"),
    ({"bias": torch.float64}, "bias: is torch.float64"),
    ({"x": torch.int64}, "down: is torch.float32"),
    ({"down": "meta"}, "down: is on meta"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_malformed_calls_are_refused_by_name(change, message):
    shapes = {"x": (2, 20), "down": (6, 20), "up": (14, 6), "bias": (14,)}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    for name, value in change.items():
        tensors[name] = torch.ones(value) if isinstance(value, tuple) else tensors[name].to(value)
    with pytest.raises(ValueError, match=message):
        lowrank_linear(**tensors)
    with pytest.raises(ValueError, match=message):
        torch.ops.calr.lowrank_linear(
            *(tensors[n] for n in ("x", "down", "up")), None, tensors["bias"]
        )


@pytest.mark.parametrize(
    ("pivots", "message"),
    [
        ([0, 1, 2, 3, 4, 99], "distinct rows below 14"),
        ([0, 1, 2, 3, 4, -1], "distinct rows below 14"),
        ([0, 1, 2, 3, 4, 4], "distinct rows below 14"),
        ([0, 1, 2], r"pivots: has size \(3,\)"),
    ],
)
def test_impossible_pivots_never_write_out_of_bounds(pivots, message):
    x, down, up = torch.ones(1, 20), torch.ones(6, 20), torch.ones(8, 6)
    with pytest.raises(ValueError, match=message):
        pivoted_linear(x, down, up, torch.tensor(pivots, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"must be torch\.int32"):
        pivoted_linear(x, down, up, torch.arange(6))


def test_without_the_native_kernel_there_is_one_warning_and_the_same_result(monkeypatch):
    arguments = problem(2, 20, 14, 6, "pivoted", torch.float32)
    expected = run(*arguments)
    monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: None)
    loader.library.cache_clear()
    with pytest.warns(UserWarning, match="no native CPU kernel") as caught:
        found = [run(*arguments) for _ in range(3)]
    assert len(caught) == 1
    torch.testing.assert_close(found[0], expected)
    monkeypatch.undo()
    loader.library.cache_clear()


@pytest.mark.parametrize("m", [1, 40])
def test_rank_zero_gives_the_bias(m, device):
    x, down, up = (torch.zeros(s, device=device) for s in ((m, 8), (0, 8), (4, 0)))
    bias = torch.arange(4.0, device=device)
    assert torch.equal(lowrank_linear(x, down, up, bias), bias.expand(m, 4))
    corrective = torch.ones(2, 8, device=device), torch.ones(4, 2, device=device)
    found = lowrank_linear(x + 1, down, up, bias, *corrective)
    assert torch.equal(found, (bias + 16).expand(m, 4))
    pivots = torch.zeros(0, dtype=torch.int32, device=device)
    assert torch.equal(pivoted_linear(x, down, up, pivots, bias), bias.expand(m, 4))


def test_strided_bias_and_pivots(device):
    x, down, up, pivots, bias = problem(3, 40, 24, 8, "pivoted", torch.float32, device)
    wanted = run(x, down, up, pivots, bias)
    table = torch.stack([bias, -bias], 1)
    doubled = torch.stack([pivots, pivots], 1)
    assert torch.equal(run(x, down, up, doubled[:, 0], table[:, 0]), wanted)


def test_the_corrective_path_is_named_in_errors():
    with pytest.raises(ValueError, match="corrective_up: has size 3 where corrective_down"):
        lowrank_linear(*(torch.ones(s) for s in ((1, 4), (2, 4), (5, 2), (5,), (2, 4), (5, 3))))


def test_a_corrective_path_of_other_outputs_is_refused():
    x, down, up, _, _ = problem(1, 64, 4096, 8, "two_factor", torch.float32)
    for rows in (1, 5):
        with pytest.raises(ValueError, match=f"corrective_up: has {rows} rows, up 4096"):
            lowrank_linear(x, down, up, None, torch.ones(4, 64), torch.ones(rows, 4))


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_leaves_types_and_values_alone(layout, m, device):
    x, down, up, pivots, bias = problem(m, 33, 17, 5, layout, torch.float32, device)
    expected, total = ops.apply(x, down, up, pivots, bias), ops.gram(x)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert torch.equal(ops.apply(x, down, up, pivots, bias), expected)
        assert torch.equal(ops.gram(x), total)


def test_grouped_calls_without_matrices_are_refused():
    with pytest.raises(ValueError, match="give as many, and any"):
        ops.grouped_linear(torch.ones(1, 3), torch.ones(0, 3), [])
    with pytest.raises(ValueError, match="must be"):
        ops.grouped_linear(torch.ones(1, 3), torch.ones(0, 3), [torch.tensor(1.0)])


@pytest.mark.parametrize("rows", [4, 7])
def test_a_sum_in_the_memory_of_its_input_is_refused(rows):
    memory = torch.zeros(64)
    x = memory[:16].view(4, 4).t()[:, :4]
    with pytest.raises(ValueError, match="out: lies in the memory of x"):
        ops.gram(x, memory[rows : rows + 16].view(4, 4))
    beside = ops.gram(x, memory[16:32].view(4, 4))
    assert torch.equal(beside, x.mT @ x)


@pytest.mark.parametrize("name", ["x", "down", "up", "bias"])
def test_what_is_no_tensor_is_named(name):
    tensors = {"x": torch.ones(1, 2), "down": torch.ones(1, 2), "up": torch.ones(3, 1)}
    with pytest.raises(TypeError, match=f"{name}: is list, must be a tensor"):
        lowrank_linear(**(tensors | {name: [1.0, 2.0]}))
