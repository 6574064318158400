"""What a recording must be to be learned from, and the limits that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dia2_jax.audio import voiced_span
from dia2_jax.typing import Float
from train.preparation.recordings import too_long
from train.preparation.records import Recording, Rejected, TimedWord

#: A sample this close to full scale counts as clipped: MP3 and resampling round the flat tops.
_FULL_SCALE = 0.999


def _limit(default: float, text: str, low: float | None = 0, high: float | None = None) -> Any:
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True)
class Limits:
    """Thresholds of the checks; each is an option of the command line under its own name."""

    min_seconds: float = _limit(0.5, "Shortest recording.")
    max_seconds: float = _limit(120.0, "Longest recording; the published models' context is 120 s.")
    max_clipping: float = _limit(0.01, "Largest share of samples at full scale.", high=1)
    min_level: float = _limit(
        -45.0,
        "Level in dB of full scale that the loudest tenth of a second must reach.",
        low=None,
        high=0,
    )
    min_text_rate: float = _limit(
        2.0, "Fewest letters and digits of transcript a second, from first to last sound."
    )
    max_text_rate: float = _limit(35.0, "Most letters and digits of transcript a second.")
    max_length_error: float = _limit(
        0.5, "Seconds by which audio and the length that its record states may differ."
    )
    min_agreement: float = _limit(
        0.6,
        "Smallest share of the transcript's words that timed or recognised words agree with.",
        high=1,
    )
    max_drift: int = _limit(
        6, "Frames (80 ms) that a word may be late when fed at the machine's pace."
    )


def check_recording(recording: Recording, stated: float | None, limits: Limits, name: str) -> None:
    """Refuse audio by its length, clipping and level.

    Raises:
      Rejected: the first check that fails.
    """
    seconds = recording.seconds
    if stated is not None and abs(seconds - stated) > limits.max_length_error:
        raise Rejected(
            "duration_mismatch", f"{name}: {seconds:.2f} s long, its record says {stated:.2f} s"
        )
    if seconds < limits.min_seconds:
        raise Rejected(
            "too_short", f"{name}: {seconds:.2f} s, --min-seconds is {limits.min_seconds:g}"
        )
    if seconds > limits.max_seconds:
        raise too_long(name, seconds, limits.max_seconds)
    clipped = float(np.mean(np.abs(recording.samples) >= _FULL_SCALE))
    if clipped > limits.max_clipping:
        raise Rejected(
            "clipped",
            f"{name}: {100 * clipped:.2f} % of the samples are at full scale, --max-clipping is "
            f"{limits.max_clipping:g}",
        )
    level = loudest_level(recording)
    if level < limits.min_level:
        raise Rejected(
            "silent",
            f"{name}: nothing in its {seconds:.1f} s is louder than {level:.0f} dB of full scale, "
            f"--min-level is {limits.min_level:g}",
        )


def loudest_level(recording: Recording) -> float:
    """RMS of the loudest tenth of a second of any channel, in dB of full scale; at least -120.

    A constant offset, which some recorders add, is no sound.
    """
    window = min(len(recording.samples), max(1, recording.rate // 10))
    sound = recording.samples - np.median(recording.samples, axis=0).astype(np.float64)
    power = np.cumsum(np.square(sound), axis=0)
    power = np.concatenate([np.zeros_like(power[:1]), power])
    loudest = float(np.max(power[window:] - power[:-window])) / window
    return 10 * float(np.log10(max(loudest, 1e-12)))


def check_channel(wave: Float[np.ndarray, " W"], rate: int, limits: Limits, name: str) -> None:
    """Refuse a channel, or a mix in which the channels cancel, without sound.

    Raises:
      Rejected: all sound of the recording is elsewhere.
    """
    if loudest_level(Recording(wave[:, None], rate)) < limits.min_level:
        raise Rejected(
            "silent",
            f"{name}: its sound is not in the channel that is taken, or its channels cancel each "
            "other when they are mixed; see --channel",
        )


def check_text_rate(
    words: Sequence[str], wave: Float[np.ndarray, " W"], rate: int, limits: Limits, name: str
) -> None:
    """Refuse a transcript that cannot belong to that much speech.

    Raises:
      Rejected: too few or too many letters a second.
    """
    letters = sum(c.isalnum() for word in words for c in word)
    start, end = voiced_span(wave, rate)
    seconds = max(end - start, 0.1)
    if not limits.min_text_rate <= letters / seconds <= limits.max_text_rate:
        raise Rejected(
            "text_ratio",
            f"{name}: {letters} letters in {seconds:.1f} s of sound, {letters / seconds:.1f} a "
            f"second; {limits.min_text_rate:g} to {limits.max_text_rate:g} are taken for speech",
        )


def check_span(words: Sequence[TimedWord], seconds: float, name: str) -> tuple[TimedWord, ...]:
    """The words with ends inside the audio, their times as the data set will hold them.

    Raises:
      Rejected: a word starts behind the end of the audio.
    """
    late = next((word for word in words if word.start >= seconds), None)
    if late is not None:
        raise Rejected(
            "words_beyond_audio",
            f"{name}: word {late.text!r} starts at {late.start:g} s, the audio ends at "
            f"{seconds:.2f} s",
        )
    # Annotations round; an end a little behind the audio does no harm.
    return tuple(
        replace(word, start=_stored(word.start), end=_stored(min(word.end, seconds)))
        for word in words
    )


def _stored(seconds: float) -> float:
    """As the data set's float32 columns give it back: who reads them must find the same frames."""
    return float(np.float32(seconds))
