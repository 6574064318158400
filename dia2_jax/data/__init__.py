"""Training data as the model sees it: alignment, rows of frames, crops, batches.

Pure numpy: what reads files and moves batches to devices lives in `train`.
"""

from dia2_jax.data.alignment import Alignment, Pace, SpokenWord, align
from dia2_jax.data.crop import Recording, crop
from dia2_jax.data.frames import Row, build_row

__all__ = ["Alignment", "Pace", "Recording", "Row", "SpokenWord", "align", "build_row", "crop"]
