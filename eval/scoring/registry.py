"""Which metrics there are."""

from __future__ import annotations

from collections.abc import Callable

from eval.scoring.intelligibility import Intelligibility
from eval.scoring.metric import Metric, Options, Unavailable
from eval.scoring.speakers import Speakers
from eval.scoring.speed import Speed
from eval.scoring.stopping import Stopping
from eval.scoring.voice_activity import VoiceActivity

#: In the order of reports.
METRICS: tuple[type[Metric], ...] = (Intelligibility, Stopping, VoiceActivity, Speakers, Speed)


def open_metrics(options: Options, tell: Callable[[str], None]) -> list[Metric]:
    """All metrics that can be had here; `tell` gets a line for each other one: what it needs."""
    found: list[Metric] = []
    for kind in METRICS:
        try:
            found.append(kind.open(options))
        except Unavailable as error:
            tell(f"{kind.name} is left out: {' '.join(str(error).split())}")
    return found
