"""What passes between the stages of a preparation: items, words, prepared rows, rejections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dia2_jax.errors import Dia2Error
from dia2_jax.typing import Float, Int

#: Why a row may be left out: the codes that ``rejected.jsonl`` uses.
REASONS: Mapping[str, str] = {
    "bad_record": "the record cannot be read: no JSON, a wrong type, a field that is missing",
    "missing_audio": "the audio file that the record names is not there",
    "unreadable_audio": "the audio is damaged, empty, or of a format that is not read",
    "duration_mismatch": "the audio is not as long as its record says",
    "too_short": "shorter than --min-seconds",
    "too_long": "longer than --max-seconds",
    "clipped": "more samples at full scale than --max-clipping allows",
    "silent": "nothing in it is as loud as --min-level",
    "no_transcript": "neither text nor words belong to the audio",
    "empty_transcript": "the transcript has no word that could be spoken",
    "text_ratio": "too little or too much text for the length of the speech",
    "bad_words": "a word time is negative, not a number, or ends before it starts",
    "words_out_of_order": "words are not listed in the order in which they start",
    "words_beyond_audio": "a word lies behind the end of the audio",
    "no_times": "no word times in the data, and no aligner was chosen",
    "transcript_mismatch": "the words that have times are not those of the transcript",
    "alignment_failed": "the aligner could not place the words in the audio",
    "too_many_speakers": "more than the two speakers that the model knows",
    "unusable_words": "the words cannot be made entries of the word machine",
    "drift": "a word comes later than --max-drift allows when it is fed at the machine's pace",
}


class Rejected(Dia2Error):
    """A row is left out, with a code of :data:`REASONS` and a message for its owner."""

    def __init__(self, reason: str, message: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}")
        super().__init__(message)
        self.reason = reason


#: Which channel of a recording is meant; "mix" averages them.
Channel = Literal["mix", "left", "right"]


@dataclass(frozen=True)
class Recording:
    """Decoded audio as it was stored.

    Attributes:
      samples: ``[W, channels]`` float32, full scale ±1.
      rate: samples per second.
    """

    samples: Float[np.ndarray, "W channels"]
    rate: int

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.rate


@dataclass(frozen=True)
class TimedWord:
    """A word as written, when it sounds in seconds, and its speaker's label if one is known."""

    text: str
    start: float
    end: float
    speaker: str | None = None


@dataclass(frozen=True)
class Turn:
    """A stretch of one transcript: text, words with times, or both.

    Attributes:
      text: what is said, in the script grammar; ``[S1]`` and ``[S2]`` in it name speakers.
      words: words with times; None where the data has none.
      speaker: label of who speaks where neither tags nor words say.
      start, end: where the turn lies in the recording, in seconds; None where that is not known.
    """

    text: str | None = None
    words: tuple[TimedWord, ...] | None = None
    speaker: str | None = None
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Item:
    """A recording of a source and what is known about it.

    Attributes:
      id: unique within the source.
      source: a path or row that its owner recognises.
      read: decodes the audio; given the longest length in seconds that is of use.
      turns: the transcript; empty where there is none.
      seconds: the length that the record states, if it does.
      channel: which channel the transcript is about.
    """

    id: str
    source: str
    read: Callable[[float], Recording]
    turns: tuple[Turn, ...]
    seconds: float | None = None
    channel: Channel = "mix"


@dataclass(frozen=True)
class SourceRow:
    """One row of a source: an item, or why there is none."""

    id: str
    source: str
    item: Item | None
    rejected: Rejected | None = None


@dataclass(frozen=True)
class PreparedRow:
    """A row that was kept, before it is written.

    Attributes:
      script: the text that generation takes, breaks and speaker tags included.
      seconds: length of the audio before the silent tail.
      words: the words with times, speakers as "1" and "2".
      drift: frames that the latest word lags behind its sound.
      breaks: number of break entries in the script.
      codes: ``[T, C]``.
    """

    id: str
    source: str
    script: str
    seconds: float
    words: tuple[TimedWord, ...]
    drift: int
    breaks: int
    codes: Int[np.ndarray, "T C"]

    def as_columns(self) -> dict[str, Any]:
        """The row under the column names of the data set."""
        return {
            # Names of files need not be UTF-8, Arrow's strings are.
            "id": _as_utf8(self.id),
            "source": _as_utf8(self.source),
            "text": self.script,
            "duration": self.seconds,
            "frames": self.codes.shape[0],
            "codes": np.ascontiguousarray(self.codes, np.uint16).reshape(-1),
            "word_text": [word.text for word in self.words],
            "word_start": [word.start for word in self.words],
            "word_end": [word.end for word in self.words],
            "word_speaker": [int(word.speaker or 1) for word in self.words],
            "drift": self.drift,
            "breaks": self.breaks,
        }


def _as_utf8(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
