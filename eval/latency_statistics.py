"""Arithmetic of the latency measurements: spreads, ratios, and taking turns. No clock in here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

#: Runs one side for a number of frames (or calls) and returns the milliseconds of each.
Timed = Callable[[int], Sequence[float]]


def summary(times_ms: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, tail and extremes of times in milliseconds.

    Percentiles are interpolated linearly between order statistics, so a p99 of fewer than 100
    times lies close to the slowest of them.
    """
    values = np.asarray(times_ms, np.float64)
    if values.size == 0:
        raise ValueError("no times to summarise")
    names = {"p25_ms": 25, "p50_ms": 50, "p75_ms": 75, "p95_ms": 95, "p99_ms": 99}
    result = {name: float(np.percentile(values, rank)) for name, rank in names.items()}
    return {
        **result,
        "min_ms": float(values.min()),
        "max_ms": float(values.max()),
        "count": int(values.size),
    }


def ratio(ours_ms: Sequence[float], theirs_ms: Sequence[float]) -> float:
    """Their median time over ours: above 1, ours is faster."""
    return float(np.median(theirs_ms) / np.median(ours_ms))


def alternate(
    sides: Mapping[str, Timed], count: int, block: int, *, settle: int = 1
) -> dict[str, list[float]]:
    """Times of all sides, measured in turns of ``block``, until each has ``count``.

    Sides run strictly one after another, in the order given. The first ``settle`` times of each
    turn are dropped on every side alike: they pay for waking threads and for caches that the
    other side filled.

    Returns:
      ``count`` milliseconds a side, in the order they were measured.
    """
    if count < 1 or block < 1:
        raise ValueError(f"needs at least one time a turn, got count {count}, block {block}")
    times: dict[str, list[float]] = {name: [] for name in sides}
    done = 0
    while done < count:
        turn = min(block, count - done)
        for name, run in sides.items():
            measured = list(run(turn + settle))
            if len(measured) != turn + settle:
                raise ValueError(f"{name}: asked for {turn + settle} times, got {len(measured)}")
            times[name] += measured[settle:]
        done += turn
    return times
