"""Several layers at once, gated blocks and bound weights, on every instruction set."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from calr_kernels import LowRankLinear, gram, grouped_linear, lowrank_linear, reference
from calr_kernels.layout import Factors
from calr_kernels.native import Bound, attend, rms_norm, rotate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


pytestmark = pytest.mark.usefixtures("isa")


def layers(k, dtype, seed=0):
    """A two-factor, a pivoted and a dense layer of one input, with and without biases."""
    torch.manual_seed(seed)
    made = [
        LowRankLinear(k, 37, 9, "two_factor", dtype=dtype),
        LowRankLinear(k, 50, 17, "pivoted", bias=False, dtype=dtype),
        nn.Linear(k, 23, dtype=dtype),
    ]
    made[1].pivots.copy_(torch.randperm(50)[:17].sort()[0])
    for layer in made:
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    return made


def factors(made):
    return [
        m.factors() if isinstance(m, LowRankLinear) else Factors(m.weight, bias=m.bias)
        for m in made
    ]


def close(found, layer, x):
    exact = copy.deepcopy(layer).double()(x.double())
    scale = float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=TOLERANCE[x.dtype] * scale)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 8])
def test_several_layers_in_one_call(m, dtype):
    made = layers(41, dtype)
    x = torch.randn(2, m, 41).to(dtype) if m < 8 else torch.randn(m, 41).to(dtype)
    found = Bound().linears(x, factors(made))
    for y, layer in zip(found, made, strict=True):
        close(y, layer, x)
        alone = Bound().linears(x, factors([layer]))[0]
        assert torch.equal(y, alone)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("activation", "function"),
    [(0, nn.functional.silu), (1, lambda x: nn.functional.gelu(x, approximate="tanh"))],
    ids=["silu", "gelu_tanh"],
)
def test_gated_block(activation, function, dtype):
    gate, up = layers(41, dtype)[1], layers(41, dtype, seed=1)[1]
    torch.manual_seed(2)
    for down in (LowRankLinear(50, 41, 11, "two_factor", dtype=dtype), nn.Linear(50, 41).to(dtype)):
        x = 3 * torch.randn(5, 41).to(dtype)
        found = Bound().gated(x, factors([gate, up, down]), activation)
        wide = [copy.deepcopy(layer).double() for layer in (gate, up, down)]
        exact = wide[2](function(wide[0](x.double())) * wide[1](x.double()))
        scale = float(exact.abs().max())
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=TOLERANCE[dtype] * scale)


@torch.no_grad()
def test_activations_over_the_whole_range():
    """Against float64, through an identity: values from far below to far above exp's range."""
    x = torch.cat(
        [torch.linspace(-200, 200, 4001), torch.tensor([0.0, 1e-30, -1e-30, 88.0, -88.0])]
    )
    n = len(x)
    for activation, function in (
        (0, nn.functional.silu),
        (1, lambda v: nn.functional.gelu(v, approximate="tanh")),
    ):
        gate = Factors(x[:, None].contiguous())
        up, down = Factors(torch.ones(n, 1)), Factors(torch.eye(n))
        found = Bound().gated(torch.ones(1, 1), [gate, up, down], activation)[0]
        exact = function(x.double())
        assert float((found - exact).abs().div(exact.abs().clamp(min=1e-6)).max()) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 576), (3, 41), (65, 7), (2, 5, 128), (1,)], ids=str)
def test_rms_norm(shape, dtype):
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    x.view(-1, shape[-1])[-1] *= 1e-3  # where epsilon counts
    wide = x.double()
    exact = weight.double() * wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    relative = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    found = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(found.double(), exact, rtol=relative, atol=1e-6)
    transposed = x.expand(2, *shape).mT.contiguous().mT
    assert torch.equal(rms_norm(transposed, weight, 1e-5)[0], found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [1, 3], ids=["one position", "a position each"])
def test_rotate_is_bit_for_bit_what_transformers_does(turned, dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 18).to(dtype)
    cosines, sines = torch.randn(2, turned, 1, 36).to(dtype)[..., ::2]
    expected, _ = apply_rotary_pos_emb(x[:, :, None], x[:, :, None], cosines, sines)
    rotate(x, cosines, sines)
    assert torch.equal(x, expected[:, :, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "count", "d"), [(1, 1, 8), (3, 131, 64), (5, 40, 83)])
def test_attend(group, count, d, dtype):
    torch.manual_seed(0)
    q = (3 * torch.randn(2, 2 * group, d)).to(dtype)
    keys, values = torch.randn(2, 2, 2, count, d).to(dtype)
    wide = [t.double().repeat_interleave(group, 1) for t in (keys, values)]
    scores = torch.einsum("bhd,bhcd->bhc", q.double(), wide[0]) * 0.1
    exact = torch.einsum("bhc,bhcd->bhd", scores.softmax(-1), wide[1])
    relative = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    found = attend(q, keys, values, 0.1)
    torch.testing.assert_close(found.double(), exact, rtol=relative, atol=1e-5)
    spread = keys.mT.contiguous().mT
    assert torch.equal(attend(q, spread, values, 0.1), found)
    assert attend(q, keys, values.fill_(torch.nan), 0.1).isnan().all()
    for bad in ((q[..., 1:], keys, values), (q, keys.double(), values), (q, keys, values[1:])):
        with pytest.raises(ValueError, match="do not fit"):
            attend(*bad, 0.1)


@torch.no_grad()
def test_nan_stays_nan():
    gate, up = Factors(torch.full((3, 1), torch.nan)), Factors(torch.ones(3, 1))
    assert Bound().gated(torch.ones(1, 1), [gate, up, Factors(torch.ones(2, 3))], 0).isnan().all()


@torch.no_grad()
def test_replaced_moved_and_rewritten_tensors_are_noticed():
    layer = layers(41, torch.float32)[1]
    x = torch.randn(1, 41)
    close(layer(x), layer, x)
    layer.weight.mul_(2)  # in place
    close(layer(x), layer, x)
    layer.weight.data = torch.randn_like(layer.weight)  # moved
    close(layer(x), layer, x)
    layer.down.weight = nn.Parameter(torch.randn_like(layer.down.weight))  # replaced
    close(layer(x), layer, x)
    layer.pivots.copy_(torch.randperm(50)[:17].sort()[0])  # rewritten
    close(layer(x), layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        layer.weight.zero_()
        other.weight.add_(1)
        close(other(x), other, x)
    layer.pivots[0] = 50
    with pytest.raises(ValueError, match="pivots: must be 17 distinct rows below 50"):
        layer(x)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_corrective_path_runs_in_the_same_call(dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 33).to(dtype)
    down, up, bias = torch.randn(9, 33) / 6, torch.randn(20, 9) / 3, torch.randn(20)
    a, b = torch.randn(4, 33) / 6, torch.randn(20, 4) / 2
    arguments = [t.to(dtype) for t in (down, up, bias, a, b)]
    found = lowrank_linear(x, *arguments)
    exact = reference.lowrank_linear(x.double(), *(t.double() for t in arguments))
    scale = float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("gradients", [False, True])
def test_grouped_linear(m, gradients):
    two, pivoted, _ = layers(41, torch.float32)
    x = torch.randn(m, 41)
    down = torch.cat([two.down.weight, pivoted.down.weight]).detach().requires_grad_(gradients)
    ups = [two.weight.detach(), pivoted.weight.detach()]
    found = grouped_linear(x, down, ups, [two.bias.detach(), None], [None, pivoted.pivots])
    for y, layer in zip(found, (two, pivoted), strict=True):
        close(y.detach(), layer.requires_grad_(False), x)
        assert y.requires_grad == gradients


def test_grouped_linear_names_what_does_not_fit():
    x, ups = torch.ones(1, 4), [torch.ones(2, 3), torch.ones(5, 2)]
    with pytest.raises(ValueError, match=r"down \[4, 4\]: must have 5 rows, the ups' ranks"):
        grouped_linear(x, torch.ones(4, 4), ups)
    with pytest.raises(ValueError, match="2 ups, 1 biases, 2 pivots: give as many"):
        grouped_linear(x, torch.ones(5, 4), ups, [None])


@pytest.mark.parametrize("rows", [30, 300])
@pytest.mark.parametrize("side", [17, 256, 257, 700])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram(dtype, side, rows, device):
    x = torch.randn(rows, side).to(device, dtype)
    exact = x.double().T @ x.double()
    torch.testing.assert_close(gram(x).double(), exact, rtol=1e-5, atol=1e-4)
    total = gram(x)
    assert gram(x, total) is total
    torch.testing.assert_close(total.double(), 2 * exact, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"out \[3, 3\]"):
        gram(x, torch.ones(3, 3, device=device))
    with pytest.raises(ValueError, match=rf"x \[{rows}\]"):
        gram(x[:, 0])


@torch.no_grad()
def test_threads_share_a_layer():
    from concurrent.futures import ThreadPoolExecutor

    layer = layers(41, torch.float32)[1]
    xs = [torch.randn(1, 41, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    expected = [layer(x) for x in xs]

    def work(i):
        with torch.no_grad():
            return all(torch.equal(layer(xs[i]), expected[i]) for _ in range(300))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


@torch.no_grad()
def test_another_dtype_at_the_same_address_is_noticed():
    layer = LowRankLinear(8, 4, 2, "two_factor", bias=False)
    storage = layer.weight.detach().clone()
    layer.weight.data = storage
    layer(torch.ones(1, 8))
    down = layer.down.weight.detach().clone()
    layer.down.weight.data = down.view(torch.bfloat16).view(4, 8)[:2]
    layer.weight.data = storage.view(torch.bfloat16).view(8, 2)[:4]
    layer.weight.fill_(1)
    layer.down.weight.fill_(1)
    assert layer(torch.ones(1, 8, dtype=torch.bfloat16)).tolist() == [[16.0] * 4]
