"""Bound blocks take nothing but what fits them."""

import pytest
import torch

from calr.inference import optimize_for_inference
from calr.testing import tiny_llama
from calr_kernels import native


def test_what_does_not_fit_the_blocks_is_refused():
    blocks = native.Blocks([])
    assert blocks.decode(torch.zeros(1, 32), [], []) is None
    model = tiny_llama()
    fast = optimize_for_inference(model)
    with torch.no_grad():
        bound = vars(fast.model)["forward"]._bound.blocks(fast.model, torch.zeros(1, 32))
    full = torch.zeros(1, 2, 4, 8)
    turn = torch.zeros(1, 8)
    x = torch.zeros(1, 32)
    for past in ((full, full, 4, 0), (full.half(), full.half(), 1, 0), (full[:, :1], full, 1, 0)):
        for seen in (False, True):  # before and after others that fit
            with pytest.raises(ValueError, match=r"a past of .*(no room|does not fit)"):
                bound.decode(x, [past] * 2, [(turn, turn)])
            if not seen:
                bound.decode(x.clone(), [(full, full, 3, 0)] * 2, [(turn, turn)])
    for wrong, turns in [
        (torch.zeros(1, 24), [(turn, turn)]),
        (x, []),
        (x, [(turn.half(), turn)]),
        (x, [(turn[:, :4], turn)]),
        (torch.zeros(3, 32), [(turn.expand(2, 8), turn.expand(2, 8))]),
    ]:
        with pytest.raises(ValueError, match="do not fit the blocks"):
            bound.decode(wrong, [(full, full, 1, 0)] * 2, turns)
