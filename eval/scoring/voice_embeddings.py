"""Voices as vectors: what turns a piece of speech into an embedding of its speaker.

``resemblyzer`` is Resemblyzer's GE2E encoder (Wan et al., 2018), whose weights ship in its package.
Any other name is WavLM with an x-vector head (Chen et al., 2022), a hub repository such as
``microsoft/wavlm-base-plus-sv`` or the folder of one, through transformers. Both run on the CPU
with torch. Similarities of one embedder say nothing about those of another.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dia2_jax.audio import resample
from dia2_jax.typing import Float
from eval.latency_machine import package_versions
from eval.scoring.metric import Unavailable

#: A voice as a vector of any length, from a waveform at a rate.
Embedder = Callable[[Float[np.ndarray, " W"], int], Float[np.ndarray, " D"]]

RESEMBLYZER = "resemblyzer"

_RATE = 16_000  # of both


def open_embedder(name: str) -> tuple[Embedder, dict[str, Any]]:
    """An embedder and what its vectors depend on besides the audio.

    Args:
      name: ``resemblyzer``, or a hub repository or folder of WavLM for speaker verification.

    Raises:
      Unavailable: a package or the model is missing.
    """
    return _resemblyzer() if name == RESEMBLYZER else _wavlm(name)


def _resemblyzer() -> tuple[Embedder, dict[str, Any]]:
    try:
        with warnings.catch_warnings():
            # webrtcvad's, about how it finds its own version.
            warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
            from resemblyzer import VoiceEncoder, preprocess_wav
    except ImportError as error:
        raise Unavailable(
            f'needs Resemblyzer ({error}): pip install "dia2-jax[naturalness]" after the CPU '
            "build of PyTorch"
        ) from error
    encoder = VoiceEncoder("cpu", verbose=False)

    def embed(wave: Float[np.ndarray, " W"], rate: int) -> Float[np.ndarray, " D"]:
        cleaned = preprocess_wav(wave, source_sr=rate)
        if len(cleaned) == 0:  # nothing is left of what its voice detector takes for noise
            cleaned = resample(wave, rate, _RATE)
        return np.asarray(encoder.embed_utterance(cleaned))

    return embed, package_versions("Resemblyzer", "torch")


def _wavlm(name: str) -> tuple[Embedder, dict[str, Any]]:
    try:
        import torch
        from transformers import AutoFeatureExtractor, WavLMForXVector
    except ImportError as error:
        raise Unavailable(
            f'needs torch and transformers ({error}): pip install "dia2-jax[wavlm]" after the CPU '
            "build of PyTorch"
        ) from error
    try:
        extractor = AutoFeatureExtractor.from_pretrained(name)
        loaded: Any = WavLMForXVector.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # the libraries below raise a dozen unrelated types here
        raise Unavailable(
            f"{name!r} cannot be loaded ({type(error).__name__}: {error}); "
            "`--speaker-model FOLDER` takes a WavLM for speaker verification that is on this "
            "machine, such as microsoft/wavlm-base-plus-sv"
        ) from error
    model, found = loaded
    lacking = sorted(found["missing_keys"])
    if lacking:
        # transformers fills them in at random.
        raise Unavailable(
            f"{name!r} lacks {len(lacking)} weights of a WavLM for speaker verification, the first "
            f"{lacking[0]}; `--speaker-model` takes one such as microsoft/wavlm-base-plus-sv"
        )
    model.eval()

    def embed(wave: Float[np.ndarray, " W"], rate: int) -> Float[np.ndarray, " D"]:
        given = extractor(resample(wave, rate, _RATE), sampling_rate=_RATE, return_tensors="pt")
        with torch.inference_mode():
            return np.asarray(model(**given).embeddings[0].numpy())

    identity: dict[str, Any] = {"model": Path(name).name, "sha256": _digest(Path(name))}
    return embed, identity | package_versions("transformers", "torch")


def _digest(folder: Path) -> str | None:
    """Of the weights in a folder; None of a hub's, whose name must do."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return None
