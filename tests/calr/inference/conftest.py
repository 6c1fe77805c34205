"""What the tests of decoding share."""

import pytest

from calr_kernels import native


@pytest.fixture
def heads(monkeypatch):
    """With which head the blocks ran natively, every time."""
    seen, decode = [], native.Blocks.decode

    def watched(self, x, pasts, rotations, starts=None, head=None):
        seen.append(head)
        return decode(self, x, pasts, rotations, starts, head)

    monkeypatch.setattr(native.Blocks, "decode", watched)
    return seen
