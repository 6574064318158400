"""Loudness: stretches of the levels of windows (`dia2_jax.audio.window_levels`), and pauses."""

from __future__ import annotations

import numpy as np

from dia2_jax.audio import HOP, WINDOW
from dia2_jax.typing import Float


def span_levels(
    levels: Float[np.ndarray, " T"], start: float, end: float
) -> Float[np.ndarray, " T"]:
    """The windows that lie between two times in seconds."""
    first, last = int(np.ceil(start / HOP - 1e-6)), int((end - WINDOW) / HOP + 1e-6) + 1
    return levels[max(first, 0) : max(last, 0)]


def stretch_level(wave: Float[np.ndarray, " W"], rate: int, start: float, end: float) -> float:
    """RMS between two times in seconds, in dB of full scale; -100 at the least."""
    part = wave[int(start * rate) : int(end * rate)]
    power = float(np.mean(np.square(part, dtype=np.float64)))
    return 10 * float(np.log10(max(power, 1e-10)))


def pauses(
    levels: Float[np.ndarray, " T"], start: float, end: float, *, below: float, shortest: float
) -> list[tuple[float, float]]:
    """Stretches between two times in which every window is quieter than `below` dB.

    Args:
      shortest: length of a stretch in seconds from which it counts.

    Returns:
      start and end of each, in seconds.
    """
    found: list[tuple[float, float]] = []
    first = max(int(np.ceil(start / HOP - 1e-6)), 0)
    quiet = np.concatenate([[False], span_levels(levels, start, end) < below, [False]])
    edges = np.flatnonzero(np.diff(quiet.astype(np.int8)))
    for begin, stop in zip(edges[::2], edges[1::2], strict=True):
        # The last quiet window begins at `stop - 1`.
        span = ((first + begin) * HOP, (first + stop - 1) * HOP + WINDOW)
        if span[1] - span[0] >= shortest:
            found.append(span)
    return found
