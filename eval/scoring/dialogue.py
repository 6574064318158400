"""How turns follow each other: gaps between speakers, where there is a gap at all.

A change of speaker is looked for around the time at which the next speaker's first word is reported
to start: the longest pause there is the gap. Where there is none, the turns run into each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dia2_jax.audio import window_levels
from eval.scoring.levels import pauses
from eval.scoring.metric import Figure, Metric, Options, Row, Scores, ratio
from eval.scoring.takes import Take

#: How far from the reported time a gap may begin or end, in seconds.
REACH = 0.5

#: Quieter than the take's loud parts by this is a pause, in dB, from this length in seconds.
DEPTH, SHORTEST = 30.0, 0.04


class Dialogue(Metric):
    """Gaps between turns."""

    name = "dialogue"
    figures = (
        Figure("gap", "s", "", "silence between two speakers, where there is any",
               ratio("gap_seconds", "gaps")),
        Figure("gap_spread", "s", "", "mean distance of a gap from the mean gap",
               ratio("gap_distance", "gaps")),
        Figure("run_on", "% of changes", "lower", "changes of speaker without a pause",
               ratio("run_on", "changes", 100)),
    )  # fmt: skip

    @classmethod
    def open(cls, options: Options) -> Dialogue:
        """Needs nothing."""
        return cls()

    def identity(self) -> dict[str, Any]:
        return {"reach": REACH, "depth": DEPTH, "shortest": SHORTEST}

    def score(self, take: Take) -> dict[str, Any] | None:
        pairs = zip(take.words, take.words[1:], strict=False)
        changes = [after.start for before, after in pairs if before.speaker != after.speaker]
        changes = [time for time in changes if time < take.seconds]
        levels = window_levels(take.wave, take.rate)
        if not changes or len(levels) == 0:
            return None
        below = float(np.quantile(levels, 0.95)) - DEPTH
        quiet = pauses(levels, 0.0, take.seconds, below=below, shortest=SHORTEST)
        gaps: list[float | None] = []
        for time in changes:
            near = [b - a for a, b in quiet if a < time + REACH and b > time - REACH]
            gaps.append(round(max(near), 3) if near else None)
        return {"gaps_at": [round(time, 3) for time in changes], "gap_lengths": gaps}

    @classmethod
    def relate(cls, rows: Sequence[Row]) -> list[Scores]:
        every: dict[str, list[float]] = {}
        for row in rows:
            found = every.setdefault(row["source"], [])
            found += [gap for gap in row["scores"][cls.name]["gap_lengths"] if gap is not None]
        means = {source: float(np.mean(gaps)) if gaps else 0.0 for source, gaps in every.items()}
        related: list[Scores] = []
        for row in rows:
            scores = row["scores"][cls.name]
            gaps = [gap for gap in scores["gap_lengths"] if gap is not None]
            changes = len(scores["gap_lengths"])
            related.append(
                {
                    **scores,
                    "gaps": len(gaps),
                    "gap_seconds": sum(gaps),
                    "gap_distance": sum(abs(gap - means[row["source"]]) for gap in gaps),
                    "changes": changes,
                    "run_on": changes - len(gaps),
                }
            )
        return related
