"""The module: layouts, storage names, errors."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from calr_kernels import Form, LowRankLinear, QuantizedLinear, lowrank_linear, warmup

LAYOUTS = ["two_factor", "pivoted"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("k", "n", "r"), [(5, 7, 3), (7, 5, 5), (1, 1, 1), (40, 33, 8)])
def test_forward_is_the_dense_weight_applied(k, n, r, layout, bias, device):
    torch.manual_seed(0)
    layer = LowRankLinear(k, n, r, layout, bias=bias, dtype=torch.float64, device=device)
    if bias:
        nn.init.normal_(layer.bias)
    if layout == "pivoted":
        layer.pivots.copy_(torch.randperm(n)[:r])
    x = torch.randn(2, 3, k, dtype=torch.float64, device=device)
    expected = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert layer.dense_weight().shape == (n, k)
    assert torch.linalg.matrix_rank(layer.dense_weight()) <= r


@pytest.mark.parametrize("layout", LAYOUTS)
def test_storage_names_and_dense_sizes(layout):
    layer = LowRankLinear(6, 4, 2, layout)
    names = {"weight", "down.weight", "bias"} | ({"pivots"} if layout == "pivoted" else set())
    assert set(layer.state_dict()) == names
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (6, 4)
    stored = layer.weight.numel() + layer.down.weight.numel()
    assert stored == (2 * (6 + 4 - 2) if layout == "pivoted" else 2 * (6 + 4))


def test_casting_leaves_pivots_alone():
    layer = LowRankLinear(6, 4, 2, "pivoted").to(torch.bfloat16)
    assert layer.pivots.dtype == torch.int32
    assert copy.deepcopy(layer)(torch.ones(1, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("rank", [0, -1, 6])
@pytest.mark.parametrize(("layout", "most"), [("pivoted", 4), ("two_factor", 5)])
def test_impossible_rank_is_refused(rank, layout, most):
    with pytest.raises(ValueError, match=f"rank {rank} of a 4x6 layer.*between 1 and {most}"):
        LowRankLinear(6, 4, rank, layout)
    assert LowRankLinear(6, 4, most, layout).rank == most


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout 'three'"):
        LowRankLinear(6, 4, 2, "three")  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_as_one_graph(layout):
    torch.manual_seed(0)
    layer = LowRankLinear(6, 4, 2, layout)
    x = torch.randn(3, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("width", [3, 16, 100])
@pytest.mark.parametrize("gradients", [True, False])
def test_an_input_of_another_width_is_refused(layout, rows, width, gradients, device):
    layer = LowRankLinear(64, 32, 8, layout).to(device)
    with torch.set_grad_enabled(gradients), pytest.raises((RuntimeError, ValueError)):
        layer(torch.randn(rows, width, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_rank_and_one_dimensional_inputs_have_gradients(layout):
    layer = LowRankLinear(6, 4, 4, layout, dtype=torch.float64)
    for x in (torch.randn(3, 6), torch.randn(6)):
        x = x.double().requires_grad_()
        assert torch.autograd.gradcheck(layer, x)
        layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_tracers_and_transforms_see_the_layer(layout):
    layer, x, tangent = LowRankLinear(6, 4, 2, layout), torch.randn(3, 6), torch.randn(3, 6)
    expected = layer(tangent) - layer.bias
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (tangent,))[1], expected)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    traced = torch.jit.trace(layer, x, check_trace=False)
    torch.testing.assert_close(traced(tangent), layer(tangent))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 40])
def test_compiled_transforms_see_the_layer(layout, rows):
    layer, x, tangent = LowRankLinear(6, 4, 2, layout), torch.randn(rows, 6), torch.randn(rows, 6)

    @torch.compile(backend="eager", fullgraph=True)
    def pushed(x, tangent):
        return torch.func.jvp(layer, (x,), (tangent,))[1]

    @torch.compile(backend="eager", fullgraph=True)
    def pulled(x):
        return torch.func.grad(lambda x: layer(x).square().sum())(x)

    with torch.no_grad():
        torch.testing.assert_close(pushed(x, tangent), layer(tangent) - layer.bias)
    expected = 2 * layer(x) @ layer.dense_weight()
    torch.testing.assert_close(pulled(x), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 40])
@torch.no_grad()
def test_dispatch_modes_see_the_layer(layout, rows):
    layer, x = LowRankLinear(6, 4, 2, layout), torch.randn(rows, 6)
    graph = make_fx(layer)(x)
    other = torch.randn(rows, 6)
    torch.testing.assert_close(graph(other), layer(other))
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * rows * (6 * 2 + 2 * layer.weight.shape[0])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (rows, 4)


class Wrapped(torch.Tensor):
    """Numbers that are elsewhere: nothing may read at its address."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments, options=None):
        unwrap = partial(tree_map_only, cls, lambda t: t.inner)
        return function(*unwrap(arguments), **unwrap(options or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 40])
@torch.no_grad()
def test_inputs_that_are_not_plain_run_in_torch(layout, rows):
    layer, x = LowRankLinear(6, 4, 2, layout), torch.randn(rows, 6)
    torch.testing.assert_close(layer(Wrapped(x)), layer(x))
    nested = torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged)
    if layout == "two_factor":  # torch has no index_select of one
        torch.testing.assert_close(layer(nested).values(), layer(torch.cat([x, x[:1]])))
    with pytest.raises(ValueError, match="x: is nested or sparse"):
        lowrank_linear(x.to_sparse(), layer.down.weight, layer.weight)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", lambda t: t[:, :-1]),
        ("down.weight", lambda t: t[:-1]),
        ("bias", lambda t: t[:-1]),
        ("bias", lambda t: t.to("meta")),
        ("pivots", lambda t: t[:-1]),
        ("pivots", lambda t: t.to("meta")),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, change, gradients, rows):
    layer = LowRankLinear(12, 10, 4, "pivoted")
    home, _, last = name.rpartition(".")
    module = layer.get_submodule(home)
    old = getattr(module, last)
    new = change(old.detach())
    setattr(module, last, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    with torch.set_grad_enabled(gradients), pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(rows, 12))


def test_a_pruned_bias_is_applied():
    layer, x = LowRankLinear(6, 4, 2), torch.randn(1, 6)
    nn.init.ones_(layer.bias)
    with torch.no_grad():
        expected = layer(x)
        prune.custom_from_mask(layer, "bias", torch.tensor([1, 0, 1, 0]))
        torch.testing.assert_close(layer(x), expected - torch.tensor([0.0, 1, 0, 1]))


@torch.inference_mode()
def test_pivots_written_in_inference_mode_are_used():
    layer, x = LowRankLinear(6, 4, 2, "pivoted"), torch.randn(1, 6)
    layer(x)
    layer.pivots.copy_(torch.tensor([1, 3]))
    expected = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 40])
@torch.no_grad()
def test_tensors_without_numbers_of_their_own(layout, rows):
    """Views that negate, tensors that are zero without storage: what torch makes of them."""
    layer, x = LowRankLinear(6, 4, 2, layout), torch.randn(rows, 6)
    torch.testing.assert_close(layer(torch._neg_view(x)), layer(-x))
    zero = torch._efficientzerotensor((rows, 6))
    torch.testing.assert_close(layer(zero), layer(torch.zeros(rows, 6)))
    layer.weight = nn.Parameter(torch._neg_view(layer.weight.detach()))
    dense = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(layer(x), dense)


@pytest.mark.parametrize("part", ["x", "weight", "down", "bias"])
@pytest.mark.parametrize("rows", [1, 40])
@torch.no_grad()
def test_freed_storage_is_never_read(part, rows):
    layer, x = LowRankLinear(6, 4, 2), torch.randn(rows, 6)
    layer(x)
    freed = {"x": x, "weight": layer.weight, "down": layer.down.weight, "bias": layer.bias}[part]
    freed.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError)):
        layer(x)


@pytest.mark.parametrize("rows", [1, 40])
def test_pivots_that_do_not_fit_are_refused_where_down_is_hooked(rows):
    layer = LowRankLinear(6, 4, 2, "pivoted")
    layer.down.register_forward_hook(lambda module, arguments, y: y)
    layer.pivots = layer.pivots[:1]
    with pytest.raises((RuntimeError, ValueError)), torch.no_grad():
        layer(torch.randn(rows, 6))


def test_warmup_runs_every_layer_with_every_number_of_rows(device):
    made = {"dtype": torch.float16, "device": device}
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8, **made),
        LowRankLinear(8, 8, 2, **made),
        QuantizedLinear(8, 8, Form(4, "table", 32), bias=False, device=device),
    )
    seen = []
    for layer in model:
        layer.register_forward_hook(lambda layer, x, y: seen.append((layer, x[0].shape, y.dtype)))
    warmup(model, rows=(1, 5))
    assert [(layer, shape[0]) for layer, shape, _ in seen] == [
        (model[i], rows) for i in (1, 2) for rows in (1, 5)
    ]
    assert {dtype for *_, dtype in seen} == {torch.float16}
    warmup(model[2])
    assert seen[-1][2] == torch.get_default_dtype()
