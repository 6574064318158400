"""Whether the words arrive: errors of a transcript by Whisper against the script.

The transcript is faster-whisper's with beam 5, language English, temperature 0, and no text carried
from one window to the next. Script and transcript go through Whisper's English normaliser (numbers
as digits, no punctuation, one spelling). Errors are those of the alignment with fewest; rates are
of all errors over all words (characters) of the takes.

What the normaliser leaves apart, such as "St." and "Street" or "555-0147" and its digits as words,
a prompt may accept: it lists further transcripts (``also``), and a transcript is compared with the
script or that one of them to which it has the fewest word errors.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dia2_jax.audio import resample
from dia2_jax.errors import Dia2Error
from dia2_jax.transcribe import load_recognizer
from dia2_jax.typing import Float
from eval.latency_machine import package_versions
from eval.scoring.metric import Figure, Metric, Options, Scores, Unavailable, mean, ratio
from eval.scoring.scripts import spoken_text
from eval.scoring.takes import Take

#: Text of a waveform at a rate.
Transcriber = Callable[[Float[np.ndarray, " W"], int], str]

_WHISPER_RATE = 16_000
_DECODING = {
    "beam_size": 5,
    "language": "en",
    "temperature": 0.0,
    "condition_on_previous_text": False,
}

#: Words in a row that are a phrase. One or two are said again in passing, or heard so.
_PHRASE = 3


class Intelligibility(Metric):
    """Word and character errors."""

    name = "intelligibility"
    figures = (
        Figure("wer", "%", "lower", "word errors of all words", ratio("errors", "words", 100)),
        Figure(
            "cer", "%", "lower", "character errors of all characters",
            ratio("character_errors", "characters", 100),
        ),
        Figure(
            "insertions", "% of words", "lower", "words heard that the script lacks",
            ratio("insertions", "words", 100),
        ),
        Figure(
            "deletions", "% of words", "lower", "words of the script not heard",
            ratio("deletions", "words", 100),
        ),
        Figure(
            "substitutions", "% of words", "lower", "words heard as others",
            ratio("substitutions", "words", 100),
        ),
        Figure("perfect", "% of takes", "higher", "without a word error", mean("perfect")),
        Figure(
            "repeating", "% of takes", "lower",
            f"say {_PHRASE} words in a row again, more often than the script does",
            mean("repeating"),
        ),
    )  # fmt: skip

    def __init__(self, transcribe: Transcriber, identity: dict[str, Any]) -> None:
        """
        Raises:
          Unavailable: jiwer or whisper-normalizer is not installed.
        """
        try:
            import jiwer
            from whisper_normalizer.english import EnglishTextNormalizer
        except ImportError as error:
            raise Unavailable(
                f'needs jiwer and whisper-normalizer ({error}): pip install "dia2-jax[eval]"'
            ) from error
        self._jiwer, self._normalise = jiwer, EnglishTextNormalizer()
        self._transcribe = transcribe
        self._identity = {**identity, **package_versions("jiwer", "whisper-normalizer")}

    @classmethod
    def open(cls, options: Options) -> Intelligibility:
        """With faster-whisper."""
        try:
            recogniser = load_recognizer(options.asr)
        except Dia2Error as error:
            raise Unavailable(
                f"{error} (`--asr FOLDER` takes a model that is on this machine)"
            ) from error

        def transcribe(wave: Float[np.ndarray, " W"], rate: int) -> str:
            audio = resample(wave, rate, _WHISPER_RATE)
            if len(audio) == 0:
                return ""
            segments, _ = recogniser.transcribe(audio, **_DECODING)
            return " ".join(segment.text.strip() for segment in segments)

        weights = Path(options.asr) / "model.bin"
        model = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None
        found = package_versions("faster-whisper", "ctranslate2")
        name = Path(options.asr).name
        return cls(transcribe, {"asr": name, "asr_sha256": model, **_DECODING, **found})

    def identity(self) -> dict[str, Any]:
        return self._identity

    def score(self, take: Take) -> dict[str, Any]:
        heard = self._transcribe(take.wave, take.rate)
        return self.compare(take.prompt.script, heard, take.prompt.also)

    def compare(self, script: str, transcript: str, also: Sequence[str] = ()) -> dict[str, Any]:
        """Scores of a transcript.

        Args:
          also: transcripts that are as right as the script. ``words``, ``characters`` and
            ``script_normalised`` are of the one that was compared with.
        """
        accepted = [self._plain(spoken_text(script))]
        # One that normalises to nothing, such as "Hmm.", would accept silence.
        accepted += [text for text in map(self._plain, also) if text]
        tried = [self._scores(text, transcript) for text in accepted]
        return min(tried, key=lambda scores: (scores["errors"], scores["character_errors"]))

    def _plain(self, text: str) -> str:
        return " ".join(self._normalise(text).split())

    def _scores(self, written: str, transcript: str) -> dict[str, Any]:
        heard = self._plain(transcript)
        words = self._count(self._jiwer.process_words, written, heard, len(heard.split()))
        letters = self._count(self._jiwer.process_characters, written, heard, len(heard))
        phrase, again = repeated(written, heard)
        return {
            "transcript": transcript,
            "script_normalised": written,
            "transcript_normalised": heard,
            "words": len(written.split()),
            **words,
            "errors": sum(words.values()),
            "characters": len(written),
            "character_errors": sum(letters.values()),
            "perfect": not any(words.values()),
            "repeating": again > 0,
            "repeated": phrase,
        }

    @staticmethod
    def _count(align: Any, written: str, heard: str, size: int) -> dict[str, int]:
        if not written:  # jiwer refuses it; all that is heard is too much
            return {"substitutions": 0, "deletions": 0, "insertions": size}
        found = align(written, heard)
        return {name: getattr(found, name) for name in ("substitutions", "deletions", "insertions")}

    def failures(self, scores: Scores) -> list[str]:
        found = []
        if scores["words"] and not scores["transcript_normalised"]:
            found.append("nothing recognised")
        if scores["repeating"]:
            found.append(f"repeats {scores['repeated']!r}")
        return found


def repeated(written: str, heard: str) -> tuple[str | None, int]:
    """The phrase of three words that is heard most often beyond what the script asks for.

    Heard once is never a repetition, whatever the script says: the least is the same three words
    twice, where the script has them once or not at all. So of the script "Yes." four are one and
    three are none, as is "Hello there." said twice: what is too much in them are insertions.

    Returns:
      The phrase (None if there is none) and how many times more often than it should be.
    """

    def phrases(text: str) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + _PHRASE]) for i in range(len(words) - _PHRASE + 1))

    wanted = phrases(written)
    surplus = {p: n - max(1, wanted[p]) for p, n in phrases(heard).items()}
    most = max(surplus, key=lambda p: surplus[p], default=())
    times = surplus.get(most, 0)
    return (" ".join(most), times) if times > 0 else (None, 0)
