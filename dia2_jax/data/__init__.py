"""Training data as the model sees it: alignment, rows of frames, crops, batches.

Pure numpy: what reads files and moves batches to devices lives in `train`.
"""

from dia2_jax.data.alignment import Alignment, Pace, SpokenWord, align
from dia2_jax.data.batch import BatchPlan, Masking, PlannedRow, Slot, collate, real_share
from dia2_jax.data.crop import Recording, crop, crop_start
from dia2_jax.data.frames import Row, build_row

__all__ = [
    "Alignment",
    "BatchPlan",
    "Masking",
    "Pace",
    "PlannedRow",
    "Recording",
    "Row",
    "Slot",
    "SpokenWord",
    "align",
    "build_row",
    "collate",
    "crop",
    "crop_start",
    "real_share",
]
