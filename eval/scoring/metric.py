"""What every metric is: scores of one take, and figures that sum them up.

A metric is a module here with a class derived from :class:`Metric`. It scores a take by itself, and
its figures are **ratios of sums** over takes (errors over words, seconds over seconds, hits over
takes), so one bootstrap serves all of them. Add the class to ``eval.scoring.registry.METRICS`` and
it is in every run, summary and report.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from eval.scoring.takes import Take

#: What a metric says of a take: JSON values.
Scores = Mapping[str, Any]

#: A row of a run: ``set``, ``id``, ``seed``, ``kind``, ``source``, ``scores`` by metric, …
Row = Mapping[str, Any]


class Unavailable(Exception):
    """A metric cannot be had here; the message says what it needs and how to get it."""


@dataclass(frozen=True)
class Figure:
    """A number over many takes: the sum of numerators over the sum of denominators.

    Attributes:
      name: unique in its metric.
      unit: of the number; "" for a bare ratio.
      better: which way it should go; "" where neither is better.
      about: what it is, in a line.
      parts: numerator and denominator of one take's scores; None where it does not apply.
      unjudged: why `eval.compare` gives no verdict on it; "" where it does.
    """

    name: str
    unit: str
    better: Literal["lower", "higher", "near 1", ""]
    about: str
    parts: Callable[[Scores], tuple[float, float] | None]
    unjudged: str = ""


@dataclass(frozen=True)
class Options:
    """What the user chose about metrics.

    Attributes:
      asr: Whisper model: a size, or a folder.
      speaker_model: ``resemblyzer``, or a hub repository or folder of WavLM for speaker
        verification.
      utmos: file of UTMOS's weights; None to have its package download them.
    """

    asr: str = "base"
    speaker_model: str = "resemblyzer"
    utmos: Path | None = None


class Metric(abc.ABC):
    """One aspect of speech."""

    name: ClassVar[str]
    figures: ClassVar[tuple[Figure, ...]]

    @classmethod
    @abc.abstractmethod
    def open(cls, options: Options) -> Metric:
        """The metric, with what it needs loaded.

        Raises:
          Unavailable: an optional package or a model is missing.
        """

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """What its scores depend on besides the audio; a run goes on only with the same."""

    @abc.abstractmethod
    def score(self, take: Take) -> dict[str, Any] | None:
        """JSON values of one take; None where the metric does not apply to it."""

    @classmethod
    def relate(cls, rows: Sequence[Row]) -> list[Scores]:
        """Each row's scores, completed by what only shows beside the other rows of the run."""
        return [row["scores"][cls.name] for row in rows]

    def failures(self, scores: Scores) -> list[str]:
        """What went wrong in a take, in a few words each."""
        return []


def mean(name: str) -> Callable[[Scores], tuple[float, float] | None]:
    """The mean of a score over the takes that have it; of a truth value, the share in %."""

    def parts(scores: Scores) -> tuple[float, float] | None:
        value = scores.get(name)
        if value is None:
            return None
        return (100.0 if value else 0.0, 1.0) if isinstance(value, bool) else (float(value), 1.0)

    return parts


def ratio(
    above: str, below: str, scale: float = 1.0
) -> Callable[[Scores], tuple[float, float] | None]:
    """The sum of one score over the sum of another, times `scale`."""

    def parts(scores: Scores) -> tuple[float, float] | None:
        if scores.get(above) is None or scores.get(below) is None:
            return None
        return scale * float(scores[above]), float(scores[below])

    return parts
