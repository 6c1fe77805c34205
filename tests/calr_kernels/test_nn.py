"""The module: layouts, storage names, errors."""

import copy

import pytest
import torch
from torch import nn

from calr_kernels import LowRankLinear

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


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_impossible_rank_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank {rank} of a 4x6 layer.*between 1 and 4"):
        LowRankLinear(6, 4, rank)


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


@torch.inference_mode()
def test_pivots_written_in_inference_mode_are_used():
    layer, x = LowRankLinear(6, 4, 2, "pivoted"), torch.randn(1, 6)
    layer(x)
    layer.pivots.copy_(torch.tensor([1, 3]))
    expected = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected)
