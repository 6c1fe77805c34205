"""Text for calibration, training and evaluation: from a source to windows of token ids."""

from calr.text.sampling import (
    CACHE_BYTES,
    MOST,
    NATIVE,
    cache_row,
    draw,
    hard_wrapped,
    panel_bytes,
    sample_from,
    sampled_in,
    sampling_batch,
)
from calr.text.sources import Source, content_of, describe, parts_of, read_text
from calr.text.windows import calibration_windows, evaluation_windows, spread, spread_windows

__all__ = [
    "CACHE_BYTES",
    "MOST",
    "NATIVE",
    "Source",
    "cache_row",
    "calibration_windows",
    "content_of",
    "describe",
    "draw",
    "evaluation_windows",
    "hard_wrapped",
    "panel_bytes",
    "parts_of",
    "read_text",
    "sample_from",
    "sampled_in",
    "sampling_batch",
    "spread",
    "spread_windows",
]
