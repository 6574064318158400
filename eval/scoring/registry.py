"""Which metrics there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dia2_jax.errors import ConfigError, suggest
from eval.scoring.dialogue import Dialogue
from eval.scoring.fidelity import Fidelity, Perceived
from eval.scoring.intelligibility import Intelligibility
from eval.scoring.metric import Metric, Options, Unavailable
from eval.scoring.prosody import Prosody
from eval.scoring.quality import Quality
from eval.scoring.signal import Signal
from eval.scoring.speakers import Speakers
from eval.scoring.speed import Speed
from eval.scoring.stopping import Stopping
from eval.scoring.utmos import Utmos
from eval.scoring.voice_activity import VoiceActivity
from eval.scoring.word_times import WordTimes

#: In the order of reports.
METRICS: tuple[type[Metric], ...] = (
    Intelligibility,
    Quality,
    Utmos,
    Fidelity,
    Perceived,
    Signal,
    Stopping,
    VoiceActivity,
    WordTimes,
    Speakers,
    Dialogue,
    Prosody,
    Speed,
)


def require_known(names: Sequence[str]) -> None:
    """That there are metrics of these names.

    Raises:
      ConfigError: there is none of one.
    """
    known = [kind.name for kind in METRICS]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"no metric {name!r}{suggest(name, known)}; known: {', '.join(known)}"
            )


def open_metrics(
    options: Options, tell: Callable[[str], None], names: Sequence[str] = ()
) -> list[Metric]:
    """The metrics of these names (all without any) that can be had here.

    Args:
      tell: gets a line for each one that cannot: what it needs.

    Raises:
      ConfigError: there is no metric of a name.
    """
    require_known(names)
    found: list[Metric] = []
    for kind in METRICS:
        if names and kind.name not in names:
            continue
        try:
            found.append(kind.open(options))
        except Unavailable as error:
            tell(f"{kind.name} is left out: {' '.join(str(error).split())}")
    return found
