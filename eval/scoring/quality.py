"""How clean a listener would find it: DNSMOS (Reddy et al., 2022), from the package speechmos.

Networks that were trained on opinions of people about noise suppressors predict mean opinion scores
from 1 to 5: of the speech (SIG), of the background (BAK) and overall (OVRL, ITU-T P.835), and of
ITU-T P.808. They judge noise and distortion, not whether the words are right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dia2_jax.audio import resample
from dia2_jax.typing import Float
from eval.latency_machine import package_versions
from eval.scoring.metric import Figure, Metric, Options, Unavailable, mean
from eval.scoring.takes import Take

#: Opinion scores of a waveform at 16 kHz, under the names that speechmos gives them.
Judge = Callable[[Float[np.ndarray, " W"]], Mapping[str, float]]

_RATE = 16_000
_NAMES = {"ovrl_mos": "overall", "sig_mos": "speech", "bak_mos": "background", "p808_mos": "p808"}


class Quality(Metric):
    """Predicted mean opinion scores."""

    name = "quality"
    figures = (
        Figure("overall", "MOS 1–5", "higher", "DNSMOS OVRL (P.835)", mean("overall")),
        Figure("speech", "MOS 1–5", "higher", "DNSMOS SIG (P.835)", mean("speech")),
        Figure("background", "MOS 1–5", "higher", "DNSMOS BAK (P.835)", mean("background")),
        Figure("p808", "MOS 1–5", "higher", "DNSMOS P.808", mean("p808")),
    )

    def __init__(self, judge: Judge, identity: dict[str, Any]) -> None:
        self._judge, self._identity = judge, identity

    @classmethod
    def open(cls, options: Options) -> Quality:
        """With speechmos, on the CPU."""
        try:
            from speechmos import dnsmos
        except ImportError as error:
            raise Unavailable(
                f'needs speechmos ({error}): pip install "dia2-jax[dnsmos]"'
            ) from error

        def judge(wave: Float[np.ndarray, " W"]) -> Mapping[str, float]:
            found: Mapping[str, float] = dnsmos.run(wave, _RATE)
            return found

        return cls(judge, package_versions("speechmos", "onnxruntime"))

    def identity(self) -> dict[str, Any]:
        return self._identity

    def score(self, take: Take) -> dict[str, Any] | None:
        if take.audible[1] <= take.audible[0]:
            return None  # it calls silence clean
        found = self._judge(np.clip(resample(take.wave, take.rate, _RATE), -1.0, 1.0))
        return {ours: round(float(found[theirs]), 4) for theirs, ours in _NAMES.items()}
