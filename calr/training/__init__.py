"""Training what compression lost: recorded outputs, the loop, what moves, block by block."""

from calr.training.blockwise import BlockFit
from calr.training.correction import (
    check_trainable,
    corrected,
    corrected_students,
    norm_parameters,
    recorded_outputs,
    windows_drawn,
    windows_used,
)
from calr.training.loop import Trained, train
from calr.training.precision import mixed
from calr.training.students import Primary, StudentEmbedding, StudentLinear
from calr.training.targets import PART_TOKENS, TARGET_BYTES, Targets

__all__ = [
    "PART_TOKENS",
    "TARGET_BYTES",
    "BlockFit",
    "Primary",
    "StudentEmbedding",
    "StudentLinear",
    "Targets",
    "Trained",
    "check_trainable",
    "corrected",
    "corrected_students",
    "mixed",
    "norm_parameters",
    "recorded_outputs",
    "train",
    "windows_drawn",
    "windows_used",
]
