"""How natural a listener would find it: UTMOS (Saeki et al., 2022), the strong learner.

A network on wav2vec 2.0 that was trained on opinions of the VoiceMOS Challenge 2022, about speech
that machines made, predicts a mean opinion score from 1 to 5. Where `quality` judges noise and
distortion, this judges naturalness. It runs through the package utmos-pytorch, which needs no
fairseq; its converted weights (utmos_state_dict.pt of the hub's Blinorot/UTMOS-PyTorch, 0.4 GB) are
downloaded on first use, or given as a file.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dia2_jax.audio import resample
from dia2_jax.typing import Float
from eval.latency_machine import package_versions
from eval.scoring.metric import Figure, Metric, Options, Unavailable, mean
from eval.scoring.takes import Take

#: Opinion score of a waveform at 16 kHz.
Judge = Callable[[Float[np.ndarray, " W"]], float]

_RATE = 16_000

_REMEDY = "`--utmos FILE` takes utmos_state_dict.pt of Blinorot/UTMOS-PyTorch, downloaded before"


class Utmos(Metric):
    """Predicted naturalness."""

    name = "utmos"
    figures = (Figure("mos", "MOS 1–5", "higher", "UTMOS, naturalness", mean("mos")),)

    def __init__(self, judge: Judge, identity: dict[str, Any]) -> None:
        self._judge, self._identity = judge, identity

    @classmethod
    def open(cls, options: Options) -> Utmos:
        """With utmos-pytorch, on the CPU."""
        try:
            import torch
            import utmos_pytorch
        except ImportError as error:
            raise Unavailable(
                f'needs utmos-pytorch ({error}): pip install "dia2-jax[utmos]" after the CPU build '
                "of PyTorch"
            ) from error
        try:
            weights = _weights(options.utmos)
            model = utmos_pytorch.UTMOSScoreTorch(str(weights))
        except Exception as error:  # the libraries below raise a dozen unrelated types here
            if isinstance(error, Unavailable):
                raise
            raise Unavailable(
                f"its weights cannot be loaded ({type(error).__name__}: {error}); {_REMEDY}"
            ) from error

        def judge(wave: Float[np.ndarray, " W"]) -> float:
            return float(model.score(torch.from_numpy(wave))[0])

        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(judge, {"sha256": digest, **package_versions("utmos-pytorch", "torch")})

    def identity(self) -> dict[str, Any]:
        return self._identity

    def score(self, take: Take) -> dict[str, Any] | None:
        if take.audible[1] <= take.audible[0]:
            return None  # nothing to have an opinion of
        return {"mos": round(self._judge(resample(take.wave, take.rate, _RATE)), 4)}


def _weights(given: Path | None) -> Path:
    """The file of the weights, which are all there.

    Raises:
      Unavailable: some are not: the package would go on with random ones.
    """
    import torch
    from utmos_pytorch.utils import download_utmos_ckpt
    from utmos_pytorch.utmos_torch import UTMOSModel

    if given is None:
        # Without a network the hub's client tells of every new attempt; one line at the end does.
        talk = logging.getLogger("huggingface_hub")
        level = talk.level
        talk.setLevel(logging.ERROR)
        try:
            given = Path(download_utmos_ckpt())
        finally:
            talk.setLevel(level)
    path = given
    with torch.device("meta"):
        wanted = set(UTMOSModel().state_dict())
    lacking = sorted(wanted - set(torch.load(path, map_location="meta", weights_only=True)))
    if lacking:
        raise Unavailable(
            f"{path}: lacks {len(lacking)} of UTMOS's weights, the first {lacking[0]}; {_REMEDY}"
        )
    return path
