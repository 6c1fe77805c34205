"""Calibration statistics: second moments of inputs, and of the loss's gradients at the outputs."""

from calr.statistics.collection import (
    Statistics,
    described,
    known_statistics,
    open_statistics,
)
from calr.statistics.gradients import LOGITS
from calr.statistics.inputs import HELD_BYTES, block_influence

__all__ = [
    "HELD_BYTES",
    "LOGITS",
    "Statistics",
    "block_influence",
    "described",
    "known_statistics",
    "open_statistics",
]
