"""When the words of a transcript are spoken: aligners by name, and how turns go through them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from dia2_jax.audio import voiced_span
from dia2_jax.errors import AudioError, PrefixError
from dia2_jax.text.timing import estimate_word_times
from dia2_jax.transcribe import load_recognizer, transcribe
from dia2_jax.typing import Float
from train.preparation.forced import PocketsphinxAligner
from train.preparation.matching import match_words
from train.preparation.records import Item, Rejected, TimedWord, Turn
from train.preparation.transcripts import WrittenWord, check_order, has_speech, written_words

#: Seconds around a turn that its aligner hears too: the ends of turns are marked roughly.
_MARGIN = 0.1


class Aligner(Protocol):
    """Finds words whose order is known in a waveform."""

    name: str

    def settings(self) -> dict[str, Any]:
        """What decides the times besides words and audio, as JSON values."""

    def place(
        self, wave: Float[np.ndarray, " W"], sample_rate: int, words: Sequence[str], where: str
    ) -> list[tuple[float, float]]:
        """Start and end of each word in seconds from the start of ``wave``; starts never fall.

        Raises:
          Rejected: they cannot be found.
        """


class DataAligner:
    """Times come from the data, and recordings without them are left out."""

    name = "data"

    def settings(self) -> dict[str, Any]:
        """Nothing but the name."""
        return {"name": self.name}

    def place(
        self, wave: Float[np.ndarray, " W"], sample_rate: int, words: Sequence[str], where: str
    ) -> list[tuple[float, float]]:
        """Always refused: this is asked only for words without times."""
        raise Rejected(
            "no_times",
            f"{where}: has text but no word times; choose --aligner whisper or pocketsphinx",
        )


class EstimateAligner:
    """Spreads the words over the sounding part by their syllables: rough, needs no model."""

    name = "estimate"

    def settings(self) -> dict[str, Any]:
        """Nothing but the name."""
        return {"name": self.name}

    def place(
        self, wave: Float[np.ndarray, " W"], sample_rate: int, words: Sequence[str], where: str
    ) -> list[tuple[float, float]]:
        """See :class:`Aligner`."""
        start, end = voiced_span(wave, sample_rate)
        # A sound of several words, "(clears throat)", is one to the estimate without its spaces.
        text = " ".join("_".join(word.split()) for word in words)
        try:
            times = estimate_word_times(text, start, end)
        except PrefixError as error:
            raise Rejected("alignment_failed", f"{where}: {error}") from None
        return [(word.start, word.end) for word in times]


class _Greedy:
    """A recogniser that never draws at random, so that a row is the same each time.

    Whisper's own way is to try again with sampling where it is unsure.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def transcribe(self, audio: Any, **options: Any) -> Any:
        """As faster-whisper's."""
        return self._model.transcribe(audio, temperature=0.0, **options)


class WhisperAligner:
    """Recognises the words with faster-whisper and gives their times to those of the transcript.

    Args:
      model: a size such as "base.en", or the folder of a model.
      min_agreement: smallest share of the transcript's words that must be recognised as written.
    """

    name = "whisper"

    def __init__(self, model: str, min_agreement: float) -> None:
        self._model, self._min_agreement = model, min_agreement
        self._recognizer = _Greedy(load_recognizer(model))

    def settings(self) -> dict[str, Any]:
        """Which model and version of the recogniser."""
        from importlib.metadata import version

        return {
            "name": self.name,
            "model": self._model,
            "faster-whisper": version("faster-whisper"),
        }

    def hear(
        self, wave: Float[np.ndarray, " W"], sample_rate: int, where: str
    ) -> tuple[TimedWord, ...]:
        """The words that are recognised; none where there is no speech."""
        try:
            found = transcribe(wave, self._recognizer, sample_rate=sample_rate)
        except AudioError as error:
            raise Rejected("alignment_failed", f"{where}: {error}") from None
        return tuple(TimedWord(*word) for word in found)

    def place(
        self, wave: Float[np.ndarray, " W"], sample_rate: int, words: Sequence[str], where: str
    ) -> list[tuple[float, float]]:
        """See :class:`Aligner`."""
        heard = self.hear(wave, sample_rate, where)
        span = voiced_span(wave, sample_rate)
        return _matched(words, heard, span, self._min_agreement, "recognised", where)


#: Aligners by name; each is made of the recogniser's name and the smallest agreement.
ALIGNERS: Mapping[str, Callable[[str, float], Aligner]] = {
    "data": lambda model, agreement: DataAligner(),
    "estimate": lambda model, agreement: EstimateAligner(),
    "whisper": WhisperAligner,
    "pocketsphinx": lambda model, agreement: PocketsphinxAligner(),
}


def time_words(
    item: Item,
    wave: Float[np.ndarray, " W"],
    sample_rate: int,
    aligner: Aligner,
    sound_tags: Sequence[str],
    min_agreement: float,
) -> tuple[TimedWord, ...]:
    """The words of a recording with times and speaker labels, in the order of their starts.

    Times in the data come first; the aligner is asked for the text that has none, turn by turn
    where the turns say where they lie, else for all of it in one go.

    Raises:
      Rejected: words out of order, times of other words than the transcript's, or what the
        aligner refuses.
    """
    where = item.source
    seconds = len(wave) / sample_rate
    timed: list[TimedWord] = []
    untimed: list[WrittenWord] = []
    several = len(item.turns) > 1
    loose = any(not t.words and t.text and _span(t) is None for t in item.turns)
    for turn in item.turns:
        written = written_words(turn, sound_tags)
        span = None if loose else _span(turn)
        if turn.words:
            check_order(turn.words, where)
            timed += _words_of_data(turn, written, seconds, min_agreement, where)
        elif written and span is None:
            untimed += written
        elif written and span is not None:
            if span[0] >= seconds:
                raise Rejected(
                    "words_beyond_audio",
                    f"{where}: a turn starts at {span[0]:g} s, the audio ends at {seconds:.2f} s",
                )
            first = int(max(0.0, span[0] - _MARGIN) * sample_rate)
            last = int((span[1] + _MARGIN) * sample_rate)
            timed += _place(aligner, wave[first:last], sample_rate, written, where, first)
    if untimed:
        timed += _place(aligner, wave, sample_rate, untimed, where, 0)
    # Turns may overlap, and the model reads one line of words.
    return tuple(sorted(timed, key=lambda word: word.start) if several else timed)


def transcript_words(item: Item, sound_tags: Sequence[str]) -> list[str]:
    """All words of an item's transcript.

    Raises:
      Rejected: it has no transcript, or none with a word that could be spoken.
    """
    if not item.turns:
        raise Rejected("no_transcript", f"{item.source}: has neither text nor words")
    found: list[WrittenWord | TimedWord] = []
    for turn in item.turns:
        found += written_words(turn, sound_tags) or turn.words or ()
    if not has_speech(found):
        raise Rejected("empty_transcript", f"{item.source}: its transcript has no word to speak")
    return [word.text for word in found]


def _span(turn: Turn) -> tuple[float, float] | None:
    if turn.start is None or turn.end is None or turn.end <= turn.start:
        return None
    return turn.start, turn.end


def _place(
    aligner: Aligner,
    wave: Float[np.ndarray, " W"],
    sample_rate: int,
    written: Sequence[WrittenWord],
    where: str,
    offset: int,
) -> list[TimedWord]:
    times = aligner.place(wave, sample_rate, [word.text for word in written], where)
    late = offset / sample_rate
    return [
        TimedWord(word.text, late + start, late + end, word.speaker)
        for word, (start, end) in zip(written, times, strict=True)
    ]


def _words_of_data(
    turn: Turn,
    written: Sequence[WrittenWord],
    seconds: float,
    min_agreement: float,
    where: str,
) -> list[TimedWord]:
    """Words with times of the data, as the text writes them if there is one too."""
    words = [replace(w, speaker=turn.speaker if w.speaker is None else w.speaker)
             for w in turn.words or ()]  # fmt: skip
    if not written:
        return words
    ends = (0.0, max(seconds, words[-1].end))
    times = _matched([w.text for w in written], words, ends, min_agreement, "timed", where)
    starts = [word.start for word in words]

    def speaker(label: str | None, start: float) -> str | None:
        return label or words[max(0, bisect_right(starts, start) - 1)].speaker

    return [
        TimedWord(word.text, start, end, speaker(word.speaker, start))
        for word, (start, end) in zip(written, times, strict=True)
    ]


def _matched(
    written: Sequence[str],
    heard: Sequence[TimedWord],
    span: tuple[float, float],
    min_agreement: float,
    kind: str,
    where: str,
) -> list[tuple[float, float]]:
    match = match_words(written, heard, *span)
    if match.agreement < min_agreement:
        said = " ".join(word.text for word in heard[:8]) or "nothing"
        raise Rejected(
            "transcript_mismatch",
            f"{where}: {100 * match.agreement:.0f} % of the transcript's words are among those "
            f"that are {kind} ({said!r}…), --min-agreement is {min_agreement:g}",
        )
    return match.times
