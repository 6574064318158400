"""How near a codec's output is to what it was given: spectra, samples, and predicted opinions.

Applies to takes that have an original of the same length (`Take.original`); the others have no
such score. PESQ (ITU-T P.862.2, package ``pesq``) and STOI (Taal et al., 2011, package
``pystoi``) are optional: a metric of their own, so that the rest does not depend on them.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from dia2_jax.audio import resample
from dia2_jax.typing import Float
from eval.latency_machine import package_versions
from eval.scoring.metric import Figure, Metric, Options, Unavailable, mean
from eval.scoring.takes import Take

Wave = Float[np.ndarray, " W"]

#: Windows in which the mel distance is taken, and how many at a time: one shape to compile.
_WINDOW_SECONDS, _ROWS = 2.0, 8

#: What pystoi returns of less than 0.4 s of speech, which is no score.
_NO_STOI = 1e-5

_RATE = 16_000  # of wideband PESQ, and enough for STOI, which works at 10 kHz


class Fidelity(Metric):
    """Distances between output and original."""

    name = "fidelity"
    figures = (
        Figure(
            "mel_distance",
            "nats",
            "lower",
            "mean difference of log mel bands, as in training",
            mean("mel_distance"),
        ),
        Figure("si_sdr", "dB", "higher", "SI-SDR (Le Roux et al., 2019)", mean("si_sdr")),
    )

    def __init__(self, identity: dict[str, Any]) -> None:
        self._identity = identity
        self._distance: Callable[[Any, Any, int], Any] | None = None

    @classmethod
    def open(cls, options: Options) -> Fidelity:
        """With librosa, which makes the mel bands."""
        try:
            importlib.import_module("librosa.filters")
        except ImportError as error:
            raise Unavailable(f'needs librosa ({error}): pip install "dia2-jax[eval]"') from error
        return cls(package_versions("jax", "librosa"))

    def identity(self) -> dict[str, Any]:
        return self._identity

    def score(self, take: Take) -> dict[str, Any] | None:
        if take.original is None:
            return None
        return {
            "mel_distance": round(self._mel(take.wave, take.original, take.rate), 5),
            "si_sdr": round(si_sdr(take.wave, take.original), 3),
        }

    def _mel(self, wave: Wave, original: Wave, rate: int) -> float:
        """Over windows side by side; the last one ends where the take ends."""
        import jax

        from train.codec_training.losses import mel_distance

        if self._distance is None:
            self._distance = jax.jit(mel_distance, static_argnums=2)
        width = round(_WINDOW_SECONDS * rate)
        if len(wave) < width:
            wave, original = (np.pad(x, (0, width - len(x))) for x in (wave, original))
        starts = [*range(0, len(wave) - width, width), len(wave) - width]
        found: list[float] = []
        for first in range(0, len(starts), _ROWS):
            some = starts[first : first + _ROWS]
            # Filled up with the first one again: the distances of what is added are not used.
            filled = some + some[:1] * (_ROWS - len(some))
            heard, given = (
                np.stack([x[at : at + width] for at in filled]) for x in (wave, original)
            )
            found += np.asarray(self._distance(heard, given, rate))[: len(some)].tolist()
        return float(np.mean(found))


class Perceived(Metric):
    """Opinion and intelligibility that listening models predict from output and original."""

    name = "perceived"
    figures = (
        Figure("pesq", "MOS-LQO 1–4.64", "higher", "wideband PESQ (P.862.2)", mean("pesq")),
        Figure("stoi", "0–1", "higher", "STOI (Taal et al., 2011)", mean("stoi")),
        Figure("not_measured", "% of takes", "", "too little speech for one of them, and left out "
               "of it", mean("not_measured")),
    )  # fmt: skip

    def __init__(
        self,
        opinion: Callable[[Wave, Wave], float | None],
        intelligibility: Callable[[Wave, Wave], float | None],
        identity: dict[str, Any],
    ) -> None:
        """
        Args:
          opinion, intelligibility: of an original and an output at 16 kHz; None where it cannot
            tell.
        """
        self._opinion, self._intelligibility = opinion, intelligibility
        self._identity = identity

    @classmethod
    def open(cls, options: Options) -> Perceived:
        """With pesq and pystoi."""
        try:
            from pesq import PesqError, pesq
            from pystoi import stoi
        except ImportError as error:
            raise Unavailable(
                f'needs pesq and pystoi ({error}): pip install "dia2-jax[fidelity]" (pesq is '
                "compiled, which needs a C compiler)"
            ) from error

        def opinion(original: Wave, heard: Wave) -> float | None:
            found = float(pesq(_RATE, original, heard, "wb", on_error=PesqError.RETURN_VALUES))
            return found if found >= 1 else None  # it found no utterance

        def intelligibility(original: Wave, heard: Wave) -> float | None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Not enough STFT frames", RuntimeWarning)
                found = float(stoi(original, heard, _RATE))
            return None if found == _NO_STOI else found

        return cls(opinion, intelligibility, package_versions("pesq", "pystoi"))

    def identity(self) -> dict[str, Any]:
        return self._identity

    def score(self, take: Take) -> dict[str, Any] | None:
        if take.original is None:
            return None
        original, heard = (resample(x, take.rate, _RATE) for x in (take.original, take.wave))
        if not np.any(original) or not np.any(heard):
            return None  # nobody has an opinion of silence
        opinion = self._opinion(original, heard)
        understood = self._intelligibility(original, heard)
        return {
            "pesq": None if opinion is None else round(opinion, 4),
            "stoi": None if understood is None else round(understood, 5),
            "not_measured": opinion is None or understood is None,
        }


def si_sdr(wave: Wave, original: Wave) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, held within ±100."""
    wave, original = wave.astype(np.float64), original.astype(np.float64)
    power = float(original @ original)
    if power == 0:
        return -100.0
    signal = (float(wave @ original) / power) * original
    rest = wave - signal
    ratio = (float(signal @ signal) + 1e-14) / (float(rest @ rest) + 1e-14)
    return float(np.clip(10 * np.log10(ratio), -100, 100))
