"""An item's sentences, spoken one by one, as one recording with the times of all its words.

Where speakers are to be exchanged, a second recording of the same item has the other speaker in
every turn, and the same times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TypeVar

import numpy as np

from dia2_jax.audio import resample
from dia2_jax.data.alignment import SpokenWord
from dia2_jax.typing import Float
from train.corpus_making.config import CorpusConfig, PauseConfig
from train.corpus_making.scripts import Item
from train.corpus_making.speech import CLASSES, Phoneme, Synthesiser, Utterance
from train.corpus_making.word_times import word_times

#: Sound kept behind the last phoneme of a sentence, and how long its edges fade, in seconds.
_RELEASE, _FADE = 0.08, 0.02
#: Faint noise under everything, in dB below full scale: no recording is digitally silent.
_FLOOR = -75.0
_PEAK = 0.95

_Timed = TypeVar("_Timed", SpokenWord, Phoneme)


class Unclear(Exception):
    """A sentence whose words could not be found in its phonemes."""


@dataclass(frozen=True)
class Recording:
    """A recording ``[W]`` at the corpus's rate, its words and its phonemes, times in seconds."""

    wave: Float[np.ndarray, " W"]
    words: tuple[SpokenWord, ...]
    phonemes: tuple[Phoneme, ...]


@dataclass(frozen=True)
class _Piece:
    """A sentence cut to its speech; times count from the start of `waves`.

    Attributes:
      waves: by the speaker who says it; and by the other one, where both are wanted.
    """

    waves: tuple[np.ndarray, ...]
    words: tuple[SpokenWord, ...]
    phonemes: tuple[Phoneme, ...]


def record(
    item: Item,
    voice: Synthesiser,
    config: CorpusConfig,
    rng: np.random.Generator,
    *,
    exchange: bool = False,
) -> tuple[Recording, ...]:
    """Speaks an item.

    Returns:
      its recording; with `exchange` also that with speakers 1 and 2 exchanged.

    Raises:
      Unclear: names the sentence.
    """
    pauses, rate = config.pauses, config.sample_rate
    placed: list[tuple[float, _Piece]] = []
    due, last = pauses.lead, 0.0  # when the next word is to start; how long the last one was
    for turn in item.turns:
        for number, sentence in enumerate(turn.sentences):
            piece = _piece(sentence, turn.speaker, voice, config, rng, exchange=exchange)
            if placed:
                span = pauses.sentence if number else pauses.turn
                due += _pause(span, last, pauses, rng)
            at = due - piece.words[0].start
            placed.append((at, piece))
            final = piece.words[-1]
            due, last = at + final.end, final.end - final.start
    length = round((due + pauses.tail) * rate)
    floor = rng.standard_normal(length, np.float32) * np.float32(10 ** (_FLOOR / 20))
    words = tuple(_later(word, at) for at, piece in placed for word in piece.words)
    phonemes = tuple(_later(phoneme, at) for at, piece in placed for phoneme in piece.phonemes)
    recordings = [Recording(_mix(placed, 0, floor, rate), words, phonemes)]
    if exchange:
        others = tuple(replace(word, speaker=3 - word.speaker) for word in words)
        recordings.append(Recording(_mix(placed, 1, floor, rate), others, phonemes))
    return tuple(recordings)


def _mix(
    placed: list[tuple[float, _Piece]], version: int, floor: np.ndarray, rate: int
) -> np.ndarray:
    """One version of all pieces, at their times in seconds, over the noise `floor`."""
    wave = floor.copy()
    for at, piece in placed:
        # Pieces may overlap where a pause is short; only their faded edges do.
        begin, part = max(round(at * rate), 0), piece.waves[version]
        end = min(begin + len(part), len(wave))
        wave[begin:end] += part[: end - begin]
    wave *= min(1.0, _PEAK / max(float(np.abs(wave).max()), 1e-9))
    return wave


def phoneme_targets(recording: Recording, config: CorpusConfig) -> Float[np.ndarray, "T K"]:
    """Per code frame, the share of it that each class of `CLASSES` sounds; the rest is silence."""
    frames = ceil(len(recording.wave) * config.frame_rate / config.sample_rate)
    shares = np.zeros((frames, len(CLASSES)), np.float32)
    for phoneme in recording.phonemes:
        column = CLASSES.index(phoneme.base)
        begin, end = phoneme.start * config.frame_rate, phoneme.end * config.frame_rate
        for frame in range(max(int(begin), 0), min(ceil(end), frames)):
            shares[frame, column] += max(min(end, frame + 1) - max(begin, frame), 0.0)
    shares[:, 0] = np.maximum(1.0 - shares[:, 1:].sum(axis=1), 0.0)
    return shares


def _pause(
    span: tuple[float, float], last: float, pauses: PauseConfig, rng: np.random.Generator
) -> float:
    """Silence behind a word that was `last` seconds long."""
    drawn = float(rng.uniform(*span))
    return min(drawn, max(pauses.reach - last, pauses.least))


def _piece(
    sentence: str,
    speaker: int,
    voice: Synthesiser,
    config: CorpusConfig,
    rng: np.random.Generator,
    *,
    exchange: bool,
) -> _Piece:
    words = sentence.split()
    spoken = voice.speak(sentence, rng)
    times = word_times(words, [voice.pronounce(word) for word in words], spoken.phonemes)
    if times is None:
        raise Unclear(sentence)
    waves = [spoken.wave]
    if speaker == 2 or exchange:
        waves.append(voice.second_speaker(spoken.wave, spoken.sample_rate))
    sounding = tuple(phoneme for phoneme in spoken.phonemes if phoneme.base)
    begin = max(times[0][0] - config.pauses.lead, 0.0)
    end = sounding[-1].end + _RELEASE
    cuts = [_cut(replace(spoken, wave=wave), begin, end, config) for wave in waves]
    if speaker == 2:
        cuts.reverse()
    return _Piece(
        tuple(cuts) if exchange else (cuts[0],),
        tuple(
            SpokenWord(word, max(start - begin, 0.0), stop - begin, speaker)
            for word, (start, stop) in zip(words, times, strict=True)
        ),
        tuple(_later(phoneme, -begin) for phoneme in sounding),
    )


def _cut(spoken: Utterance, begin: float, end: float, config: CorpusConfig) -> np.ndarray:
    """The part from `begin` to `end` seconds, at the corpus's rate and level, its edges faded."""
    rate = spoken.sample_rate
    part = spoken.wave[round(begin * rate) : round(end * rate)]
    part = resample(part, rate, config.sample_rate).copy()
    loudness = float(np.sqrt(np.mean(np.square(part, dtype=np.float64))))
    part *= np.float32(10 ** (config.voice.level / 20) / max(loudness, 1e-6))
    fade = min(round(_FADE * config.sample_rate), len(part) // 2)
    ramp = np.linspace(0.0, 1.0, fade, dtype=np.float32)
    part[:fade] *= ramp
    part[len(part) - fade :] *= ramp[::-1]
    return part


def _later(timed: _Timed, by: float) -> _Timed:
    return replace(timed, start=max(timed.start + by, 0.0), end=timed.end + by)
