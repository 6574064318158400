"""Whether words are where the model says: starts against those of forced alignment.

The aligner is pocketsphinx with the English model that it ships (the one of ``train.prepare``). It
is given the words that were reported, in order, and finds where they start in the audio; on the
speech of this repository's tests it repeats itself within 50 ms. It takes the words for granted:
where the audio says something else, times differ or the words do not fit at all, and
`intelligibility` tells why. A model reports whole frames of 80 ms, so a perfect one still differs
by 20 ms on average.

Models are trained to take a word two frames after it begins to sound, and report that: what is
compared is the reported time less those 160 ms (`eval.scoring.sources.sounding_starts`). A
checkpoint that was trained with another `word_step_offset` shows it in ``offset``. What a reader
of the reported times would find is ``reported_offset``.

Words without a sound, such as ``(laughs)``, are left out. Words of a take that does not fit count
as not aligned, and as out of reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dia2_jax.errors import Dia2Error
from dia2_jax.typing import Float
from eval.scoring.metric import Figure, Metric, Options, Scores, Unavailable, mean, ratio
from eval.scoring.takes import Take
from train.preparation.forced import PocketsphinxAligner
from train.preparation.records import Rejected

#: A start within so many milliseconds of the aligned one is near: one frame, and two.
REACHES = (80, 160)

#: A take whose median difference is larger is a failure, in milliseconds: three frames.
FAR = 240


class Aligner(Protocol):
    """What places given words in speech."""

    def is_silent(self, word: str) -> bool:
        """Whether a word has no sound to look for."""

    def place(
        self, wave: Float[np.ndarray, " W"], sample_rate: int, words: Sequence[str], where: str
    ) -> list[tuple[float, float]]:
        """Start and end of each word in seconds.

        Raises:
          Rejected: the words do not fit the audio.
        """


class WordTimes(Metric):
    """Starts of words against aligned ones."""

    name = "word_times"
    figures = (
        Figure("difference", "ms", "lower", "from a start to the aligned one, median of a take",
               mean("difference")),
        Figure("offset", "ms", "", "the same with its sign: above 0 is later than it sounds",
               mean("offset")),
        Figure("reported_offset", "ms", "", "the same of the times as the model reports them",
               mean("reported_offset")),
        *(
            Figure(f"within_{reach}", "% of words", "higher",
                   f"starting within {reach} ms of the aligned start",
                   ratio(f"within_{reach}", "words", 100))
            for reach in REACHES
        ),
        Figure("aligned", "% of words", "higher", "that could be aligned: a take's all or none",
               ratio("aligned", "words", 100)),
    )  # fmt: skip

    def __init__(self, aligner: Aligner, identity: dict[str, Any]) -> None:
        self._aligner, self._identity = aligner, identity

    @classmethod
    def open(cls, options: Options) -> WordTimes:
        """With pocketsphinx."""
        try:
            aligner = PocketsphinxAligner()
        except Dia2Error as error:
            raise Unavailable(
                f'needs pocketsphinx ({error.__cause__}): pip install "dia2-jax[align]"'
            ) from error
        return cls(aligner, aligner.settings())

    def identity(self) -> dict[str, Any]:
        return {**self._identity, "reaches": list(REACHES)}

    def score(self, take: Take) -> dict[str, Any] | None:
        heard = [not self._aligner.is_silent(word.text) for word in take.words]
        words = [word for word, there in zip(take.words, heard, strict=True) if there]
        if not words:
            return None
        scores: dict[str, Any] = {"words": len(words), "aligned": 0, "starts": []}
        scores |= {"difference": None, "offset": None, "reported_offset": None}
        scores |= {f"within_{reach}": 0 for reach in REACHES}
        if take.audible[1] <= take.audible[0]:
            return scores
        texts = [word.text for word in words]
        try:
            spans = self._aligner.place(take.wave, take.rate, texts, take.prompt.id)
        except Rejected:
            return scores
        starts = np.array([start for start, _ in spans])
        late = 1000 * (np.array([word.start for word in words]) - starts)
        scores["aligned"] = len(words)
        scores["starts"] = [round(float(start), 3) for start in starts]
        scores["difference"] = round(float(np.median(np.abs(late))), 1)
        scores["offset"] = round(float(np.median(late)), 1)
        if reported := take.about.get("reported_starts"):
            said = np.array([start for start, there in zip(reported, heard, strict=True) if there])
            scores["reported_offset"] = round(float(np.median(1000 * (said - starts))), 1)
        for reach in REACHES:
            scores[f"within_{reach}"] = int((np.abs(late) <= reach).sum())
        return scores

    def failures(self, scores: Scores) -> list[str]:
        if not scores["aligned"]:
            return ["its words do not fit what is heard"]
        if scores["difference"] > FAR:
            return [f"words start {scores['difference']:.0f} ms from where they are heard"]
        return []
