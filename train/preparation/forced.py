"""Forced alignment by pocketsphinx and the English model that it ships.

Owns the pronunciations that the aligner is given: words of its dictionary as they are; numbers,
signs and compounds by the words in which they are spoken; what the dictionary lacks by its
letters. pocketsphinx is imported when an aligner is made and not before.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dia2_jax.audio import resample, to_pcm16
from dia2_jax.errors import Dia2Error
from dia2_jax.typing import Float
from train.preparation.matching import spread_unknown
from train.preparation.phones import guess_phones, letter_names
from train.preparation.records import Rejected
from train.preparation.spoken import spoken_forms

#: Rate of the shipped model, and frames a second of its features.
_RATE, _FRAMES = 16_000, 100

#: Features of frame t look at 25.6 ms from t · 10 ms on: what a frame says happens in its middle.
_FRAME_CENTRE = 0.0078

_INSTALL = 'install it with: pip install "dia2-jax[align]", or choose another --aligner'


class PocketsphinxAligner:
    """Places the words of a transcript in a recording of English speech.

    The same words and audio give the same times, whatever was aligned before.
    """

    name = "pocketsphinx"

    def __init__(self) -> None:
        """
        Raises:
          Dia2Error: pocketsphinx is not installed.
        """
        try:
            import pocketsphinx
        except ImportError as error:
            raise Dia2Error(
                f"the aligner needs pocketsphinx, which cannot be imported ({error}); {_INSTALL}"
            ) from error
        pocketsphinx.set_loglevel("FATAL")
        self._decoder = pocketsphinx.Decoder(
            lm=None,
            # Over the recording itself: the default carries on from one recording to the next.
            cmn="batch",
            # A search through the lattice afterwards, which loses words at the end.
            bestpath=False,
            # The default of 0.005 lets words swallow the pause in front of them.
            silprob=0.5,
            # The words are given and few paths compete.
            beam=1e-100,
            wbeam=1e-100,
            pbeam=1e-100,
            loglevel="FATAL",
        )
        self._keys: dict[str, str | None] = {}

    def settings(self) -> dict[str, Any]:
        """What decides the times besides words and audio."""
        from importlib.metadata import version

        return {"name": self.name, "pocketsphinx": version("pocketsphinx")}

    def is_silent(self, word: str) -> bool:
        """Whether a word has no sound to look for ("-", "(laughs)")."""
        return self._key(word) is None

    def place(
        self, wave: Float[np.ndarray, " W"], sample_rate: int, words: Sequence[str], where: str
    ) -> list[tuple[float, float]]:
        """Start and end of each word, in seconds from the start of ``wave``.

        Words without a sound ("-", "(laughs)") lie between their neighbours.

        Raises:
          Rejected: the words do not fit the audio.
        """
        keys = [self._key(word) for word in words]
        spoken = [key for key in keys if key is not None]
        if not spoken:
            raise Rejected("alignment_failed", f"{where}: no word of it has a sound to look for")
        # Below a tenth of a second there are no frames to search.
        pcm = to_pcm16(resample(wave, sample_rate, _RATE))
        found = iter(self._search(pcm, spoken, where))
        times = [next(found) if key is not None else None for key in keys]
        return spread_unknown(words, times, 0.0, len(wave) / sample_rate)

    def _search(self, pcm: bytes, keys: Sequence[str], where: str) -> list[tuple[float, float]]:
        decoder = self._decoder
        try:
            # Its front end goes on from the recording before; times must depend on this one alone.
            decoder.reinit_feat()
            decoder.set_align_text(" ".join(keys))
            decoder.start_utt()
            decoder.process_raw(pcm, full_utt=True)
            decoder.end_utt()
            # A second pass, over phones, keeps these word boundaries and fails where they are
            # tight, so it has nothing to add here.
            segments = decoder.seg()
        except RuntimeError as error:
            raise Rejected("alignment_failed", f"{where}: pocketsphinx: {error}") from None
        placed = [part for part in segments or () if not part.word.startswith(("<", "["))]
        names = [part.word.split("(")[0] for part in placed]
        if names != list(keys):
            raise Rejected(
                "alignment_failed",
                f"{where}: the {len(keys)} words of the transcript do not fit what is heard",
            )
        return [
            (
                part.start_frame / _FRAMES + _FRAME_CENTRE,
                (part.end_frame + 1) / _FRAMES + _FRAME_CENTRE,
            )
            for part in placed
        ]

    def _key(self, word: str) -> str | None:
        """The name of a word in the dictionary, added where it was missing; None if unspoken."""
        if word not in self._keys:
            self._keys[word] = self._add(word)
        return self._keys[word]

    def _add(self, word: str) -> str | None:
        forms = spoken_forms(word)
        if len(forms) == 1 and len(forms[0]) == 1 and self._known(forms[0][0]):
            return forms[0][0]
        ways = list(dict.fromkeys(way for form in forms if (way := self._phones(form, word))))
        if not ways:
            return None
        # The name is of the pronunciations, so that it is the same in every process.
        key = f"added{zlib.crc32('|'.join(ways).encode()):08x}"
        if not self._known(key):
            for number, way in enumerate(ways):
                name = key if number == 0 else f"{key}({number + 1})"
                self._decoder.add_word(name, way)
        return key

    def _known(self, name: str) -> bool:
        return self._decoder.lookup_word(name) is not None

    def _phones(self, form: Sequence[str], written: str) -> str | None:
        """Phones of words spoken as one."""
        pieces = []
        for part in form:
            known = self._decoder.lookup_word(part) or self._decoder.lookup_word(part.strip("'"))
            if known is None and part.upper() in written and 1 < len(part) <= 4:
                known = letter_names(part)  # "BBC"
            known = known or self._possessive(part) or guess_phones(part)
            if known:
                pieces.append(known)
        return " ".join(pieces) or None

    def _possessive(self, part: str) -> str | None:
        stem = part.removesuffix("'s")
        known = self._decoder.lookup_word(stem) if stem != part else None
        return f"{known} Z" if known else None
