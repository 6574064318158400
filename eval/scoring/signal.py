"""What a meter shows: clipping, level, and the floor in pauses."""

from __future__ import annotations

from typing import Any

import numpy as np

from dia2_jax.audio import window_levels
from eval.scoring.levels import stretch_level
from eval.scoring.metric import Figure, Metric, Options, Scores, mean, ratio
from eval.scoring.takes import Take

#: Samples from here on count as clipped, of full scale.
CLIPPED = 0.999

#: Take with more clipped samples than this are failures, as a share.
_CLIPPING = 1e-3

#: The floor is the level that this share of all windows stays below.
_FLOOR = 0.05


class Signal(Metric):
    """Levels, in dB of full scale."""

    name = "signal"
    figures = (
        Figure(
            "clipping", "% of samples", "lower", f"at {CLIPPED} of full scale or beyond",
            ratio("clipped", "samples", 100),
        ),
        Figure("level", "dBFS", "", "RMS from first sound to last", mean("level")),
        Figure("peak", "dBFS", "", "largest sample", mean("peak")),
        Figure("floor", "dBFS", "lower", "what 5 % of all 20 ms stay below", mean("floor")),
    )  # fmt: skip

    @classmethod
    def open(cls, options: Options) -> Signal:
        """Needs nothing."""
        return cls()

    def identity(self) -> dict[str, Any]:
        return {"clipped": CLIPPED, "floor": _FLOOR}

    def score(self, take: Take) -> dict[str, Any] | None:
        if len(take.wave) == 0:
            return None
        levels = window_levels(take.wave, take.rate)
        size = np.abs(take.wave)
        start, end = take.audible
        scores: dict[str, Any] = {
            "samples": len(size),
            "clipped": int((size >= CLIPPED).sum()),
            "peak": float(20 * np.log10(max(float(size.max()), 1e-5))),
            "level": None,
            "floor": float(np.quantile(levels, _FLOOR)) if len(levels) else None,
        }
        if end > start:
            scores["level"] = stretch_level(take.wave, take.rate, start, end)
        return scores

    def failures(self, scores: Scores) -> list[str]:
        found = []
        if scores["clipped"] > _CLIPPING * scores["samples"]:
            found.append(f"{100 * scores['clipped'] / scores['samples']:.1f} % clipped")
        return found
