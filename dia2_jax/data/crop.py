"""Recordings, and pieces of them that begin with a word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dia2_jax.data.alignment import Pace, SpokenWord
from dia2_jax.typing import Int


@dataclass(frozen=True)
class Recording:
    """A prepared recording.

    Attributes:
      codes: ``[C, T]`` aligned codes.
      words: what is said, in order.
    """

    codes: Int[np.ndarray, "C T"]
    words: tuple[SpokenWord, ...]


def crop(recording: Recording, first: int, max_steps: int, pace: Pace, ahead: int) -> Recording:
    """The recording from word ``first`` on, as far as a row of ``max_steps`` steps needs it.

    It begins in the frame in which the word starts to sound, so that the machine takes the word
    as soon as it takes any. Words behind the row's end are kept as far as the second text stream
    (``ahead`` words) and the length of the last gap depend on them.
    """
    origin = recording.words[first].start
    frame = min(round(origin * pace.frame_rate), max(recording.codes.shape[1] - 1, 0))
    offset = frame / pace.frame_rate
    kept: list[SpokenWord] = []
    beyond = 0
    for word in recording.words[first:]:
        start, end = max(0.0, word.start - offset), max(0.0, word.end - offset)
        kept.append(SpokenWord(word.text, start, end, word.speaker))
        beyond += pace.step(start) > max_steps
        if beyond > ahead + 1:
            break
    return Recording(codes=recording.codes[:, frame : frame + max_steps + 1], words=tuple(kept))


def first_words(words: Sequence[SpokenWord], start: float, end: float) -> range:
    """Indices of the words that start in ``[start, end)`` seconds; of the nearest if none does."""
    inside = [index for index, word in enumerate(words) if start <= word.start < end]
    if inside:
        return range(inside[0], inside[-1] + 1)
    distances = [min(abs(word.start - start), abs(word.start - end)) for word in words]
    nearest = int(np.argmin(distances))
    return range(nearest, nearest + 1)
