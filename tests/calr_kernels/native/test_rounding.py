"""Rounding on the native kernel: what the plain operations of `calr.rounding` choose."""

import pytest
import torch

from calr.rounding import gptq, scales
from calr_kernels import Form
from calr_kernels.forms import MOST_GROUP
from calr_kernels.native import rounding

pytestmark = pytest.mark.usefixtures("isa")

FORMS = [
    Form(3, "table", 32),
    Form(4, "table", 64),
    Form(4, "uniform", 64, scale_dtype="bfloat16"),
    Form(5, "formula", 96),
    Form(8, "uniform", 128),
    Form(4, "table", MOST_GROUP),
]


def problem(rows, columns, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw).to(dtype)
    weight[::5, : columns // 2] = 0  # groups without a scale
    x = torch.randn(2 * columns + 1, columns, generator=draw)
    return weight, x.mT @ x / len(x)


@pytest.fixture
def plainly(monkeypatch):
    """Turn the kernel off when it is called."""
    return lambda: monkeypatch.setattr(rounding, "can_round", lambda weight: False)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (33, 200), (50, 128), (15, 700)])
def test_scales_are_those_of_the_plain_search(shape, dtype, form, plainly):
    weight, moment = problem(*shape, dtype)
    found = scales.search(weight, moment.diagonal(), form)
    plainly()
    wanted = scales.search(weight, moment.diagonal(), form)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert float((found != wanted).float().mean()) <= 0.1  # among scales as good, any
    assert ((found == 0) == (wanted == 0)).all()
    spread = [s.repeat_interleave(form.scale_group, 1)[:, : shape[1]] for s in (found, wanted)]
    cells = gptq.level_cells(form, weight.device)
    errors = [
        float(((weight - gptq.nearest(weight / torch.where(s == 0, 1, s), cells) * s) ** 2).sum())
        for s in spread
    ]
    assert errors[0] <= errors[1] * 1.02 + 1e-9


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (33, 200), (50, 128)])
def test_codes_are_those_of_the_plain_choice(shape, dtype, form, plainly):
    weight, moment = problem(*shape, dtype)
    spread = scales.search(weight, moment.diagonal(), form)
    found = gptq.choose(weight, spread, gptq.ordered(moment), form)
    plainly()
    wanted = gptq.choose(weight, spread, gptq.ordered(moment), form)
    different = (found != wanted).float().mean(1)  # a tie decided otherwise moves what follows it
    assert float((different > 0).float().mean()) <= 0.1
