"""Calibration statistics: second moments of inputs, and of the loss's gradients at the outputs."""

from calr.statistics.collection import Statistics, open_statistics
from calr.statistics.inputs import block_influence

__all__ = ["Statistics", "block_influence", "open_statistics"]
