"""Loudness: levels of windows of 20 ms, of which several metrics speak."""

from __future__ import annotations

import numpy as np

from dia2_jax.typing import Float

#: Length and distance of the windows, in seconds.
WINDOW, HOP = 0.020, 0.010

#: No window is quieter than this, in dB below full scale.
SILENCE = -100.0


def window_levels(wave: Float[np.ndarray, " W"], rate: int) -> Float[np.ndarray, " T"]:
    """RMS of every window in dB of full scale; window t begins at ``t * HOP`` seconds."""
    window, hop = max(2, round(WINDOW * rate)), max(1, round(HOP * rate))
    if len(wave) < window:
        return np.zeros(0)
    power = np.concatenate([[0.0], np.cumsum(np.square(wave, dtype=np.float64))])
    starts = np.arange(0, len(wave) - window + 1, hop)
    mean = (power[starts + window] - power[starts]) / window
    return 10 * np.log10(np.maximum(mean, 10 ** (SILENCE / 10)))


def span_levels(
    levels: Float[np.ndarray, " T"], start: float, end: float
) -> Float[np.ndarray, " T"]:
    """The windows that lie between two times in seconds."""
    first, last = int(np.ceil(start / HOP - 1e-6)), int((end - WINDOW) / HOP + 1e-6) + 1
    return levels[max(first, 0) : max(last, 0)]


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
