"""What a synthesiser is: a sentence in, its sound and the times of its phonemes out.

Also the phoneme classes that recordings are labelled with, the same for every synthesiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dia2_jax.typing import Float

#: Classes of the targets: silence, and the base symbols that espeak writes American English with.
CLASSES = ("", *"abdefhijklmnopstuvwzæðŋɐɑɔəɚɛɜɡɪɹɾʃʊʌʒʔθᵻ")


@dataclass(frozen=True)
class Phoneme:
    """A phoneme and when it sounds, in seconds.

    Attributes:
      symbol: with the marks that belong to it; empty for silence.
      start, end: from the beginning of the sound.
      group: number of the group of phonemes written without a space that it belongs to.
    """

    symbol: str
    start: float
    end: float
    group: int = 0

    @property
    def base(self) -> str:
        """The first letter of the symbol: without stress and length."""
        return next((c for c in self.symbol if c in CLASSES), "")


@dataclass(frozen=True)
class Utterance:
    """A sentence as spoken: the samples ``[W]`` at `sample_rate`, and its phonemes in order."""

    wave: Float[np.ndarray, " W"]
    sample_rate: int
    phonemes: tuple[Phoneme, ...]


class Synthesiser(Protocol):
    """Speaks. The same text and randomness give the same sound."""

    def settings(self) -> dict[str, Any]:
        """What decides the sound besides text and randomness: versions, files, numbers."""

    def speak(self, text: str, rng: np.random.Generator) -> Utterance:
        """A sentence."""

    def pronounce(self, word: str) -> Sequence[str]:
        """Base symbols of a word said alone, for matching."""

    def second_speaker(
        self, wave: Float[np.ndarray, " W"], sample_rate: int
    ) -> Float[np.ndarray, " W"]:
        """The same speech, at the same times, by the other speaker."""
