"""Recordings, and pieces of them that begin with a word."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dia2_jax.data.alignment import Pace, SpokenWord
from dia2_jax.typing import Int

_EDGE = 0.15


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
    rate = pace.frame_rate
    frame = min(round(recording.words[first].start * rate), max(recording.codes.shape[1] - 1, 0))

    def shifted(seconds: float) -> float:
        # Whole frames: a time near the middle of two, less an offset, might round to the other,
        # and the crop would take the word in another step than the whole recording does.
        return max(0, round(seconds * rate) - frame) / rate

    kept: list[SpokenWord] = []
    beyond = 0
    for word in recording.words[first:]:
        start, end = shifted(word.start), shifted(word.end)
        kept.append(SpokenWord(word.text, start, end, word.speaker))
        beyond += pace.step(start) > max_steps
        if beyond > ahead + 1:
            break
    return Recording(codes=recording.codes[:, frame : frame + max_steps + 1], words=tuple(kept))


def crop_start(words: Sequence[SpokenWord], seconds: float, place: float) -> int:
    """The word from which a crop goes on: the first that starts behind a random point.

    Args:
      words: of the recording.
      seconds: where the last crop of full length starts.
      place: in [0, 1), where between the recording's start and there. A little at both ends
        stands for the end itself, so that beginnings and ends are seen as often as middles.
    """
    target = min(max(place * (1 + 2 * _EDGE) - _EDGE, 0.0), 1.0) * max(seconds, 0.0)
    index = bisect_left(words, target, key=lambda word: word.start)
    return min(index, len(words) - 1)
