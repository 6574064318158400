"""A stand-in for a voice: each letter a tone of its own length. For trying the recipe in seconds,
where no synthesiser is installed; nothing that is trained on it can speak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dia2_jax.typing import Float
from train.corpus_making.config import VoiceConfig
from train.corpus_making.speech import CLASSES, Phoneme, Utterance

_RATE = 16_000
_LETTER, _GAP, _EDGE = 0.07, 0.03, 0.05


class ToneSynthesiser:
    """Letters as tones; the second speaker an octave higher."""

    def __init__(self, config: VoiceConfig) -> None:
        self._scale = config.length_scale

    def settings(self) -> dict[str, Any]:
        """See :class:`Synthesiser`."""
        return {"voice": "tones"}

    def speak(self, text: str, rng: np.random.Generator) -> Utterance:
        """See :class:`Synthesiser`."""
        time = _EDGE
        phonemes = [Phoneme("", 0.0, time)]
        for group, word in enumerate(text.split()):
            for letter in self.pronounce(word):
                end = time + _LETTER * self._scale * float(rng.uniform(0.9, 1.1))
                phonemes.append(Phoneme(letter, time, end, group))
                time = end
            phonemes.append(Phoneme(" ", time, time + _GAP, group + 1))
            time += _GAP
        phonemes.append(Phoneme("", time, time + _EDGE))
        wave = np.zeros(round((time + _EDGE) * _RATE), np.float32)
        for phoneme in phonemes:
            if phoneme.base:
                begin, end_sample = round(phoneme.start * _RATE), round(phoneme.end * _RATE)
                pitch = 150 + 20 * CLASSES.index(phoneme.base)
                seconds = np.arange(end_sample - begin) / _RATE
                wave[begin:end_sample] = 0.3 * np.sin(2 * np.pi * pitch * seconds)
        return Utterance(wave, _RATE, tuple(phonemes))

    def pronounce(self, word: str) -> Sequence[str]:
        """See :class:`Synthesiser`."""
        return [letter for letter in word.lower() if letter in CLASSES]

    def second_speaker(
        self, wave: Float[np.ndarray, " W"], sample_rate: int
    ) -> Float[np.ndarray, " W"]:
        """See :class:`Synthesiser`."""
        return (2 * wave * np.abs(wave)).astype(np.float32)
