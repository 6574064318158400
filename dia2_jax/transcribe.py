"""Speech recognition by the optional faster-whisper: words and their times, as plain tuples.

For voice prefixes that come without a transcript, and for measuring. faster-whisper is imported
when a transcript is asked for and not before; everything else works without it.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import soxr
from jaxtyping import Float

from dia2_jax.errors import AudioError, Dia2Error, HubError

#: Rate that Whisper models expect of an array, in samples per second.
_WHISPER_RATE = 16_000

#: A recognised word: text without surrounding white space, start and end in seconds.
TimedWord = tuple[str, float, float]


def load_recognizer(model: str | os.PathLike[str] = "base") -> Any:
    """Load a faster-whisper model, for several calls of :func:`transcribe`.

    Args:
      model: a size such as "base" or "small.en", which is downloaded on first use, or the folder
        of a model in faster-whisper's (CTranslate2's) layout.

    Raises:
      Dia2Error: faster-whisper is not installed.
      HubError: the model cannot be downloaded or loaded.
    """
    try:
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise Dia2Error(
            f"transcribing needs faster-whisper, which cannot be imported ({error}); install it "
            'with: pip install "dia2-jax[transcribe]" - or give the transcript yourself'
        ) from error
    try:
        return WhisperModel(os.fspath(model), device="auto", compute_type="auto")
    except Exception as error:  # the libraries below raise a dozen unrelated types here
        raise HubError(
            f"speech recognition model {os.fspath(model)!r} cannot be loaded "
            f"({type(error).__name__}: {error}); give a size that faster-whisper knows while "
            "online, or the folder of a downloaded model"
        ) from error


def transcribe(
    audio: Float[np.ndarray, " W"] | str | os.PathLike[str],
    model: Any = "base",
    *,
    sample_rate: int = 24_000,
    language: str | None = "en",
) -> list[TimedWord]:
    """Recognise the words of a recording and when each is spoken.

    Args:
      audio: a mono waveform at `sample_rate`, full scale ±1, or the path of an audio file.
      model: what :func:`load_recognizer` takes, or what it returned.
      sample_rate: samples per second of a waveform; a file says its own.
      language: the language spoken (Dia2 speaks English); None lets Whisper guess.

    Returns:
      ``(text, start, end)`` for each word, in order, times in seconds from the start of the audio,
      ``start <= end`` and starts never falling; empty when no speech is recognised. Pieces that
      Whisper times apart within one written word ("twenty", "-one") are joined.

    Raises:
      AudioError: `audio` is not a mono waveform or a readable file.
      Dia2Error, HubError: as :func:`load_recognizer`.
    """
    if isinstance(audio, (str, os.PathLike)):
        source: Any = os.fspath(audio)
        if not os.path.isfile(source):
            raise AudioError(f"{source}: no such audio file; give the path of a recording")
    else:
        source = np.asarray(audio, np.float32)
        if source.ndim != 1 or source.size == 0:
            raise AudioError(
                f"expected a mono waveform [W] with samples, got shape {source.shape}; average "
                "its channels first"
            )
        if sample_rate != _WHISPER_RATE:
            source = soxr.resample(source, sample_rate, _WHISPER_RATE)
    if isinstance(model, (str, os.PathLike)):
        model = load_recognizer(model)
    try:
        segments, _ = model.transcribe(
            source,
            language=language,
            word_timestamps=True,
            # Fed with its own output, Whisper can repeat a sentence until the end of the take.
            condition_on_previous_text=False,
        )
        # Recognition happens while this generator is read.
        pieces = [(word, i == 0) for segment in segments for i, word in enumerate(segment.words)]
    except Exception as error:
        where = source if isinstance(source, str) else "waveform"
        raise AudioError(
            f"{where}: cannot be transcribed ({type(error).__name__}: {error}); check that it "
            "is an audio file with speech, or give the transcript yourself"
        ) from error
    return _join(pieces)


def _join(pieces: list[tuple[Any, bool]]) -> list[TimedWord]:
    """Words out of Whisper's timed pieces; a piece without a leading space continues a word."""
    words: list[TimedWord] = []
    for piece, opens_segment in pieces:
        text = piece.word.strip()
        if not text:
            continue
        if words and not opens_segment and not piece.word[0].isspace():
            head, start, end = words[-1]
            words[-1] = (head + text, start, max(end, float(piece.end)))
            continue
        start = float(piece.start)
        if words:
            start = max(start, words[-1][1])
        words.append((text, start, max(start, float(piece.end))))
    return words
