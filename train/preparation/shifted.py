"""More rows from the same recordings: each also with a little silence before it.

Codes depend on where the edges of the frames fall. A recording that is shifted by a part of a frame
has other codes for the same speech, so a model that would learn the codes of few recordings by
heart sees them less often.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from dia2_jax.errors import DataError
from train.preparation.records import Item, Recording, SourceRow, Turn
from train.preparation.sources import Source


class ShiftedSource:
    """The rows of a source, each ``shifts`` times: late by 0, 1, … of so many parts of a frame.

    A row that is late by k parts is called ``ID+k``.
    """

    def __init__(self, source: Source, shifts: int, frame_rate: float) -> None:
        """
        Args:
          source: whose rows.
          shifts: how often each comes.
          frame_rate: of the codec, in Hz.
        """
        if shifts < 1:
            raise DataError(f"shifts: each recording comes at least once, got {shifts}")
        self._source, self._shifts, self._frame = source, shifts, 1 / frame_rate
        self.kind = source.kind

    def __len__(self) -> int:
        return len(self._source) * self._shifts

    def row(self, index: int) -> SourceRow:
        """See :class:`Source`."""
        place, part = divmod(index, self._shifts)
        row = self._source.row(place)
        if part == 0:
            return row
        name = f"{row.id}+{part}"
        item = row.item
        if item is not None:
            item = later(replace(item, id=name), part / self._shifts * self._frame)
        return replace(row, id=name, item=item)

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        own = self._source.fingerprint()
        return hashlib.sha256(f"{own} {self._shifts} {self._frame}".encode()).hexdigest()


def later(item: Item, seconds: float) -> Item:
    """The item with so much silence before it, and its times accordingly."""
    return replace(
        item,
        read=_padded(item.read, seconds),
        turns=tuple(_later_turn(turn, seconds) for turn in item.turns),
        seconds=None if item.seconds is None else item.seconds + seconds,
    )


def _padded(read: Callable[[float], Recording], seconds: float) -> Callable[[float], Recording]:
    def padded(longest: float) -> Recording:
        recording = read(longest)
        silence = round(seconds * recording.rate)
        return replace(recording, samples=np.pad(recording.samples, ((silence, 0), (0, 0))))

    return padded


def _later_turn(turn: Turn, by: float) -> Turn:
    words = turn.words
    if words is not None:
        words = tuple(replace(w, start=w.start + by, end=w.end + by) for w in words)
    return replace(
        turn,
        words=words,
        start=None if turn.start is None else turn.start + by,
        end=None if turn.end is None else turn.end + by,
    )
