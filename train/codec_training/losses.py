"""Reconstruction losses between waveforms, and the mel distance that is reported.

All are means over rows and time, so rows of a batch count alike. Spectrograms are of windows that
lie ``window / 4`` apart on a waveform continued by reflection, ``W / hop`` of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from dia2_jax.errors import ConfigError
from dia2_jax.typing import Array, Float

#: Windows overlap this many times.
OVERLAP = 4

#: Floor of magnitudes under a logarithm: -100 dB of a full-scale sine within a factor of a few.
FLOOR = 1e-5

#: Window and bands of the mel distance.
DISTANCE_WINDOW, DISTANCE_BANDS = 1024, 80

# Under the root of a magnitude: keeps the gradient finite in silence, and is far below FLOOR**2.
_TINY = 1e-14


def hann(window: int) -> Float[np.ndarray, " W"]:
    """A periodic Hann window that sums to 1, so that magnitudes do not depend on its length."""
    shape = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    return (shape / shape.sum()).astype(np.float32)


def frames(wave: Float[Array, "B W"], window: int) -> Float[Array, "B T W"]:
    """Overlapping windows of a waveform, reflected at its ends; ``T = ceil(W / hop)``."""
    hop = window // OVERLAP
    left = (window - hop) // 2
    right = window - hop - left + (-wave.shape[1]) % hop
    padded = jnp.pad(wave, ((0, 0), (left, right)), mode="reflect")
    count = padded.shape[1] // hop - OVERLAP + 1
    blocks = padded[:, : (count + OVERLAP - 1) * hop].reshape(wave.shape[0], -1, hop)
    return jnp.concatenate([blocks[:, k : k + count] for k in range(OVERLAP)], axis=-1)


def stft(wave: Float[Array, "B W"], window: int) -> Array:
    """Complex spectrogram ``[B, T, window / 2 + 1]`` under a Hann window of sum 1."""
    return jnp.fft.rfft(frames(wave, window) * hann(window), axis=-1)


def magnitude(spectrum: Array) -> Float[Array, "B T F"]:
    """``|z|`` with a finite gradient at 0."""
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return jnp.sqrt(power + _TINY)


@functools.lru_cache(maxsize=32)
def mel_matrix(sample_rate: int, window: int, bands: int) -> Float[np.ndarray, "F M"]:
    """Slaney's mel filters (area 1 each) as librosa makes them, from 0 to half the rate.

    With one change: the filters weigh the very first and last frequency with 0, and a codec that
    is trained and judged through them learns to hide a hum louder than the speech there. So both
    count in the outermost filters as their neighbours do.

    Raises:
      ConfigError: so many bands that some filter falls between two bins.
    """
    import warnings

    from librosa.filters import mel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about empty filters, which are an error below
        matrix = mel(sr=sample_rate, n_fft=window, n_mels=bands)
    empty = int((matrix.max(axis=1) <= 0).sum())
    if empty:
        raise ConfigError(
            f"mel: {bands} bands are too many for a window of {window} samples at {sample_rate} "
            f"per second: {empty} of them hold no frequency; use fewer bands or a longer window"
        )
    matrix = np.ascontiguousarray(matrix.T, np.float32)
    matrix[0, 0], matrix[-1, -1] = matrix[1, 0], matrix[-2, -1]
    return matrix


def mel_spectrogram(
    wave: Float[Array, "B W"], sample_rate: int, window: int, bands: int
) -> Float[Array, "B T M"]:
    """Mel bands of the magnitude spectrogram."""
    # librosa's filters have an area of 1 over Hz; times the bin width they average bins.
    matrix = mel_matrix(sample_rate, window, bands) * (sample_rate / window)
    return jnp.einsum(
        "BTF,FM->BTM", magnitude(stft(wave, window)), matrix, precision=lax.Precision.HIGHEST
    )


def _log(x: Array) -> Array:
    return jnp.log(jnp.maximum(x, FLOOR))


def mel_loss(
    wave: Float[Array, "B W"],
    target: Float[Array, "B W"],
    sample_rate: int,
    windows: Sequence[int],
    bands: Sequence[int],
) -> Float[Array, ""]:
    """Linear plus logarithmic L1 of mel bands, averaged over window lengths.

    The linear part is relative to the target's mean band, so that a quiet batch counts like a
    loud one (the multi-scale form of Défossez et al., 2022, has L2 there).
    """
    total = jnp.zeros(())
    for window, count in zip(windows, bands, strict=True):
        ours = mel_spectrogram(wave, sample_rate, window, count)
        theirs = mel_spectrogram(target, sample_rate, window, count)
        linear = jnp.mean(jnp.abs(ours - theirs)) / (jnp.mean(theirs) + FLOOR)
        total = total + linear + jnp.mean(jnp.abs(_log(ours) - _log(theirs)))
    return total / len(windows)


def stft_loss(
    wave: Float[Array, "B W"], target: Float[Array, "B W"], windows: Sequence[int]
) -> Float[Array, ""]:
    """Spectral convergence plus log-magnitude L1 (Yamamoto et al., 2020), averaged over windows."""
    total = jnp.zeros(())
    for window in windows:
        ours, theirs = magnitude(stft(wave, window)), magnitude(stft(target, window))
        missed = jnp.sqrt(jnp.sum(jnp.square(ours - theirs), axis=(1, 2)) + _TINY)
        convergence = missed / (jnp.sqrt(jnp.sum(jnp.square(theirs), axis=(1, 2))) + FLOOR)
        total = total + jnp.mean(convergence) + jnp.mean(jnp.abs(_log(ours) - _log(theirs)))
    return total / len(windows)


def waveform_loss(wave: Float[Array, "B W"], target: Float[Array, "B W"]) -> Float[Array, ""]:
    """Mean absolute difference of samples."""
    return jnp.mean(jnp.abs(wave - target))


def mel_distance(
    wave: Float[Array, "B W"], target: Float[Array, "B W"], sample_rate: int
) -> Float[Array, " B"]:
    """Mean absolute difference of log mel magnitudes, by row, in nats.

    Windows of 1,024 samples and 80 bands at 24 kHz; shorter in proportion at lower rates, so that
    a window lasts 43 ms or, in codecs of very low rates, has at least 64 samples.
    """
    window = max(64, 1 << round(np.log2(DISTANCE_WINDOW * sample_rate / 24_000)))
    bands = max(8, DISTANCE_BANDS * window // DISTANCE_WINDOW)
    ours = mel_spectrogram(wave, sample_rate, window, bands)
    theirs = mel_spectrogram(target, sample_rate, window, bands)
    return jnp.mean(jnp.abs(_log(ours) - _log(theirs)), axis=(1, 2))


def si_sdr(wave: Float[Array, "B W"], target: Float[Array, "B W"]) -> Float[Array, " B"]:
    """Scale-invariant signal-to-distortion ratio by row, in dB (Le Roux et al., 2019).

    Held within ±100 dB, which a silent or perfect row would leave.
    """
    scale = jnp.sum(wave * target, axis=1) / (jnp.sum(jnp.square(target), axis=1) + _TINY)
    signal = scale[:, None] * target
    ratio = (jnp.sum(jnp.square(signal), axis=1) + _TINY) / (
        jnp.sum(jnp.square(wave - signal), axis=1) + _TINY
    )
    return jnp.clip(10 * jnp.log10(ratio), -100, 100)
