"""The delay pattern: aligned codes of one instant <-> the shifted grid the model reads.

Codebook c of aligned frame a stands at delayed frame ``a + delays[c]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def delay(codes: np.ndarray, delays: Sequence[int], fill: int) -> np.ndarray:
    """Shift aligned ``[C, T]`` codes to ``[C, T + max(delays)]``; gaps hold ``fill``."""
    channels, frames = codes.shape
    shifted = np.full((channels, frames + max(delays)), fill, dtype=codes.dtype)
    for index, offset in enumerate(delays):
        shifted[index, offset : offset + frames] = codes[index]
    return shifted


def undelay(grid: np.ndarray, delays: Sequence[int]) -> np.ndarray:
    """Inverse of :func:`delay`: the ``T - max(delays)`` whole frames of a ``[C, T]`` grid."""
    frames = max(0, grid.shape[1] - max(delays))
    return np.stack(
        [grid[index, offset : offset + frames] for index, offset in enumerate(delays)]
    ).reshape(len(delays), frames)
