"""Bound blocks take nothing but what fits them."""

import pytest
import torch

from calr.inference import optimize_for_inference
from calr.testing import tiny_llama
from calr_kernels import native
from calr_kernels.layout import Factors


def test_what_does_not_fit_the_blocks_is_refused():
    blocks = native.Blocks([])
    x = torch.zeros(1, 32)
    assert blocks.decode(x, blocks.pasts(x, []), []) is x
    model = tiny_llama()
    fast = optimize_for_inference(model)
    with torch.no_grad():
        bound = vars(fast.model)["forward"]._bound.blocks(fast.model, torch.zeros(1, 32))
    full = torch.zeros(1, 2, 4, 8)
    turn = torch.zeros(1, 8)
    for keys in (full.half(), full[:, :1], full.mT.contiguous().mT):
        with pytest.raises(ValueError, match=r"a past of .* does not fit"):
            bound.pasts(x, [(keys, full, 1, 0)] * 2)
    for count, fits in ((3, True), (4, False), (-1, False)):
        pasts = bound.pasts(x, [(full, full, 2, 0), (full, full, count, 0)])
        if fits:
            bound.decode(x.clone(), pasts, [(turn, turn)])
            pasts.advance()
        with pytest.raises(ValueError, match="no room for another token"):
            bound.decode(x.clone(), pasts, [(turn, turn)])
    pasts = bound.pasts(x, [(full, full, 1, 0)] * 2)
    for others in (x.expand(2, 32).contiguous(), x.bfloat16()):
        turns = turn.to(others.dtype)
        with pytest.raises(ValueError, match=r"pasts of .* do not fit"):
            bound.decode(others, pasts, [(turns, turns)])
    for blocks, width in ((native.Blocks([]), 32), (bound, 31)):
        head = native.Binding([Factors(torch.zeros(5, width))])
        with pytest.raises(ValueError, match="does not follow 32"):
            blocks.decode(x.clone(), pasts, [(turn, turn)], head=head)
    for wrong, turns in [
        (torch.zeros(1, 24), [(turn, turn)]),
        (x, []),
        (x, [(turn.half(), turn)]),
        (x, [(turn[:, :4], turn)]),
        (torch.zeros(3, 32), [(turn.expand(2, 8), turn.expand(2, 8))]),
    ]:
        with pytest.raises(ValueError, match="do not fit the blocks"):
            bound.decode(wrong, pasts, turns)
