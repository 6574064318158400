"""Melody and pace: speaking rate and its drift, pauses, pitch, loudness.

Pitch is librosa's pYIN (Mauch and Dixon, 2014) in frames of 64 ms every 16 ms at 16 kHz. Range and
declination are taken turn by turn, in semitones about the turn's own median, because speakers
differ; medians are per speaker. What is said of voiced frames is said from half a second of them
on, of the turn, the speaker or the take: of fewer frames there is no figure. The rate and its drift
count words that begin before the last sound, without sounds such as ``(laughs)``: words that were
cut off, or whose time comes when all is silent, were not spoken.

A codec can hum, and where its voices are noisy pitch is found in the hum alone. ``one_tone`` tells:
a voice moves, so only some of its voiced frames lie within half a semitone; of a hum nearly all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dia2_jax.audio import HOP, resample, window_levels
from dia2_jax.typing import Float
from eval.latency_machine import package_versions
from eval.scoring.levels import pauses, span_levels
from eval.scoring.metric import Figure, Metric, Options, Scores, Unavailable, mean, ratio
from eval.scoring.scripts import SpokenWord, spoken_text
from eval.scoring.takes import Take, Turn

_RATE, _FRAME, _HOP = 16_000, 1024, 256

#: Pitches that are looked for, in Hz.
LOWEST, HIGHEST = 60.0, 400.0

#: Voiced frames from which something is said of them: half a second.
_VOICED = 32

#: A pause within speech: quieter than its loud parts by so many dB, for so many seconds.
DEPTH, SHORTEST = 30.0, 0.15

#: Per cent of the voiced frames within half a semitone from which they are a hum.
ONE_TONE = 50.0

#: Words from which a take is long enough to drift.
LONG = 30


class Prosody(Metric):
    """Rate, pauses, pitch, energy."""

    name = "prosody"
    figures = (
        Figure("rate", "words/s", "",
               "words begun before the last sound, over the time from first sound to last",
               ratio("words", "seconds")),
        Figure("pauses", "% of time", "", f"silences of {SHORTEST:g} s and more within speech",
               ratio("pause_seconds", "seconds", 100)),
        Figure("drift", "× rate", "near 1", f"last third over first, takes of {LONG} words and up",
               mean("drift")),
        Figure("f0_s1", "Hz", "", "median pitch of [S1]", mean("f0_s1")),
        Figure("f0_s2", "Hz", "", "median pitch of [S2]", mean("f0_s2")),
        Figure("one_tone", "% of voiced", "lower",
               f"within one half semitone; above {ONE_TONE:g} a take's f0 is a hum's",
               mean("one_tone")),
        Figure("f0_range", "semitones", "", "10th to 90th percentile of pitch in a turn",
               ratio("range_sum", "turns")),
        Figure("declination", "semitones/s", "", "slope of pitch over a turn",
               ratio("slope_sum", "turns")),
        Figure("energy_range", "dB", "", "10th to 90th percentile of voiced frames",
               mean("energy_range")),
    )  # fmt: skip

    def __init__(self, pitch: Any, identity: dict[str, Any]) -> None:
        """`pitch` gives F0 in Hz of each frame of a 16 kHz waveform, NaN where it is unvoiced."""
        self._pitch, self._identity = pitch, identity

    @classmethod
    def open(cls, options: Options) -> Prosody:
        """With librosa."""
        try:
            import librosa
        except ImportError as error:
            raise Unavailable(f'needs librosa ({error}): pip install "dia2-jax[eval]"') from error

        def pitch(wave: Float[np.ndarray, " W"]) -> Float[np.ndarray, " T"]:
            found, _, _ = librosa.pyin(
                wave, fmin=LOWEST, fmax=HIGHEST, sr=_RATE, frame_length=_FRAME, hop_length=_HOP
            )
            return np.asarray(found)

        return cls(pitch, package_versions("librosa"))

    def identity(self) -> dict[str, Any]:
        return {
            **self._identity,
            "f0": [LOWEST, HIGHEST],
            "depth": DEPTH,
            "pause": SHORTEST,
            "long": LONG,
        }

    def score(self, take: Take) -> dict[str, Any] | None:
        start, end = take.audible
        if end - start < 2 * _FRAME / _RATE:
            return None
        levels = window_levels(take.wave, take.rate)
        inside = span_levels(levels, start, end)
        below = float(np.quantile(inside, 0.95)) - DEPTH
        quiet = pauses(levels, start, end, below=below, shortest=SHORTEST)
        hertz = self._pitch(resample(take.wave, take.rate, _RATE))
        times = np.arange(len(hertz)) * (_HOP / _RATE)
        places = np.minimum((times / HOP).astype(int), max(len(levels) - 1, 0))
        # A codec's silence may hum, and has a pitch then.
        hertz = np.where(levels[places] < below, np.nan, hertz)
        voiced = np.isfinite(hertz)
        scores: dict[str, Any] = {
            "words": len(_spoken(take)) or None,
            "seconds": end - start,
            "pause_seconds": sum(b - a for a, b in quiet),
            "drift": drift(take),
            "energy_range": _spread(levels[places[voiced]]) if voiced.sum() >= _VOICED else None,
            **_commonest(hertz[voiced]),
            **_melody(hertz, times, take.turns() or [Turn("[S1]", start, end)]),
        }
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in scores.items()
        }

    def failures(self, scores: Scores) -> list[str]:
        found, reasons = scores["drift"], []
        if found is not None and not 0.75 <= found <= 1.33:
            reasons.append(f"its last third is {found:.2f} × as fast as its first")
        if (scores["one_tone"] or 0) > ONE_TONE:
            reasons.append(
                f"{scores['one_tone']:.0f} % of its pitch is one tone of {scores['tone']:.0f} Hz, "
                "as of a hum"
            )
        return reasons


def drift(take: Take) -> float | None:
    """Words a second in the last third of the words over those in the first; None in short takes.

    Time between turns counts, as a listener hears it.
    """
    starts = [word.start for word in _spoken(take)]
    third = len(starts) // 3
    if len(starts) < LONG:
        return None
    first, last = starts[third] - starts[0], starts[-1] - starts[-1 - third]
    return first / last if min(first, last) > 0 else None


def _spoken(take: Take) -> list[SpokenWord]:
    """Its words that begin before the last sound, without sound tags and punctuation alone."""
    begun = [word for word in take.words if word.start < take.audible[1]]
    return [w for w in begun if any(letter.isalnum() for letter in spoken_text(w.text))]


def _melody(hertz: np.ndarray, times: np.ndarray, turns: list[Turn]) -> dict[str, Any]:
    """Medians of the speakers, sums over turns of range and slope; of enough frames each."""
    found: dict[str, Any] = {"range_sum": 0.0, "slope_sum": 0.0, "turns": 0}
    by_speaker: dict[str, list[np.ndarray]] = {}
    for turn in turns:
        mine = (times >= turn.start) & (times < turn.end) & np.isfinite(hertz)
        by_speaker.setdefault(turn.speaker, []).append(hertz[mine])
        if mine.sum() < _VOICED:
            continue
        semitones = 12 * np.log2(hertz[mine] / np.median(hertz[mine]))
        found["range_sum"] += _spread(semitones)
        found["slope_sum"] += float(np.polyfit(times[mine], semitones, 1)[0])
        found["turns"] += 1
    for number in (1, 2):
        voiced = np.concatenate([np.zeros(0), *by_speaker.get(f"[S{number}]", [])])
        found[f"f0_s{number}"] = float(np.median(voiced)) if len(voiced) >= _VOICED else None
    return found


def _commonest(hertz: np.ndarray) -> dict[str, float | None]:
    """Per cent of the voiced frames in the fullest half semitone, and their median in Hz."""
    if len(hertz) < _VOICED:
        return {"one_tone": None, "tone": None}
    semitones = np.sort(12 * np.log2(hertz))
    inside = np.searchsorted(semitones, semitones + 0.5, side="right") - np.arange(len(hertz))
    place = int(inside.argmax())
    tone = 2 ** (np.median(semitones[place : place + inside[place]]) / 12)
    return {"one_tone": float(100 * inside[place] / len(hertz)), "tone": float(tone)}


def _spread(values: np.ndarray) -> float:
    low, high = np.quantile(values, [0.1, 0.9])
    return float(high - low)
