"""A take: audio of a prompt, from a model, a microphone or a codec; and where its turns are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from dia2_jax.audio import voiced_span
from dia2_jax.typing import Float
from eval.scoring.prompts import Prompt
from eval.scoring.scripts import SpokenWord

GENERATED, RECORDING, RESYNTHESIS = SOURCES = ("generated", "recording", "resynthesis")

#: A last word of n letters is given this long where only its start is known, in seconds: 0.2 and
#: 0.08 a letter. Of the 260 recordings of nano's test split, 251 end their last word within it.
_WORD_SECONDS, _LETTER_SECONDS = 0.2, 0.08


@dataclass(frozen=True)
class Turn:
    """What one speaker says without a break, in seconds from the start of the take."""

    speaker: str
    start: float
    end: float


@dataclass(frozen=True, eq=False)
class Take:
    """Audio of a prompt and what its maker says about it.

    Attributes:
      source: ``generated``, ``recording`` or ``resynthesis`` (a recording through the codec).
      wave: ``[W]``, mono, full scale at ±1, `rate` samples a second.
      words: with the times at which they sound, in order; may be empty. A model's are those that
        it reports less the steps that it is trained to take a word late
        (`eval.scoring.sources.sounding_starts`).
      truncated: the model's context ended before the speech did.
      reference_seconds: how long the reference speaks, first sound to last; None without one.
      compute_seconds: how long the model took; None for what no model made.
      compiled: whether programs were compiled meanwhile, which happens once.
      original: ``[W]`` as long as `wave`, at the same rate: what a codec was given; else None.
      about: JSON values that are kept in the take's row.
    """

    source: str
    prompt: Prompt
    wave: Float[np.ndarray, " W"]
    rate: int
    words: tuple[SpokenWord, ...] = ()
    truncated: bool = False
    reference_seconds: float | None = None
    compute_seconds: float | None = None
    compiled: bool = False
    original: Float[np.ndarray, " W"] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return len(self.wave) / self.rate

    @cached_property
    def audible(self) -> tuple[float, float]:
        """First and last sound, in seconds, by energy; (0, 0) for a silent take."""
        return voiced_span(self.wave, self.rate)

    @property
    def text_end(self) -> float | None:
        """When the last word ends, or should have; None where the words are not known."""
        if not self.words:
            return None
        last = self.words[-1]
        if last.end is not None:
            return last.end
        letters = sum(character.isalnum() for character in last.text)
        return last.start + _WORD_SECONDS + _LETTER_SECONDS * letters

    def turns(self) -> list[Turn]:
        """Stretches of words of one speaker; each ends where its last word does, or else where
        the next turn's first word begins, the last one with the audio."""
        turns: list[Turn] = []
        for index, word in enumerate(self.words):
            following = self.words[index + 1].start if index + 1 < len(self.words) else None
            end = word.end if word.end is not None else following
            end = self.seconds if end is None else min(end, self.seconds)
            if turns and turns[-1].speaker == word.speaker:
                turns[-1] = Turn(word.speaker, turns[-1].start, max(end, turns[-1].end))
            else:
                turns.append(Turn(word.speaker, word.start, end))
        return [turn for turn in turns if turn.end > turn.start]

    def cut(self, turn: Turn) -> Float[np.ndarray, " W"]:
        """The audio of a turn, from its first sound to its last."""
        piece = self.wave[int(turn.start * self.rate) : int(turn.end * self.rate)]
        if len(piece) == 0:
            return piece
        start, end = voiced_span(piece, self.rate)
        return piece[int(start * self.rate) : int(end * self.rate)]
