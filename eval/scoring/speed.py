"""How fast the model spoke: seconds of audio a second of computing, compiling apart.

Two runs are not judged by it: what else the machine did meanwhile is in no interval over prompts.
"""

from __future__ import annotations

from typing import Any

from eval.scoring.metric import Figure, Metric, Options, Scores
from eval.scoring.takes import Take

_UNJUDGED = "depends on the machine's load, see eval.latency"


def _steady(scores: Scores) -> tuple[float, float] | None:
    return None if scores["compiled"] else (scores["audio_seconds"], scores["compute_seconds"])


def _compiling(scores: Scores) -> tuple[float, float] | None:
    return (scores["compute_seconds"], 1.0) if scores["compiled"] else None


class Speed(Metric):
    """Of generation, codec included, one take at a time."""

    name = "speed"
    figures = (
        Figure(
            "realtime", "× real time", "higher", "audio over computing, warm", _steady, _UNJUDGED
        ),
        Figure(
            "compiling", "s", "lower", "a take that compiled something", _compiling, _UNJUDGED
        ),
    )  # fmt: skip

    @classmethod
    def open(cls, options: Options) -> Speed:
        """Needs nothing."""
        return cls()

    def identity(self) -> dict[str, Any]:
        return {}

    def score(self, take: Take) -> dict[str, Any] | None:
        if take.compute_seconds is None:
            return None
        return {
            "audio_seconds": take.seconds,
            "compute_seconds": take.compute_seconds,
            "compiled": take.compiled,
        }
