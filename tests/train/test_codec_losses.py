"""Losses of codec training against their definitions in numpy and scipy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from librosa.filters import mel as librosa_mel

from dia2_jax.errors import ConfigError
from train.codec_training import losses

RATE, WINDOW, BANDS = 4000, 64, 10


def waves(seed: int, rows: int = 2, samples: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, (rows, samples)).astype(np.float32)


def spectrum(wave: np.ndarray, window: int) -> np.ndarray:
    """Definition: a DFT of each window by a matrix, windows one by one."""
    hop = window // 4
    left = (window - hop) // 2
    right = window - hop - left + (-wave.shape[1]) % hop
    padded = np.pad(wave.astype(np.float64), ((0, 0), (left, right)), mode="reflect")
    shape = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    shape /= shape.sum()
    turns = np.outer(np.arange(window), np.arange(window // 2 + 1)) / window
    starts = range(0, padded.shape[1] - window + 1, hop)
    pieces = [(padded[:, s : s + window] * shape) @ np.exp(-2j * np.pi * turns) for s in starts]
    return np.stack(pieces, axis=1)


def mel(wave: np.ndarray, window: int, bands: int) -> np.ndarray:
    bank = librosa_mel(sr=RATE, n_fft=window, n_mels=bands).T * (RATE / window)
    bank[0, 0], bank[-1, -1] = bank[1, 0], bank[-2, -1]
    return np.abs(spectrum(wave, window)) @ bank


def log(x: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(x, 1e-5))


@pytest.mark.parametrize("samples", [192, 200])
def test_spectrogram_is_a_windowed_dft(samples: int) -> None:
    wave = waves(0, samples=samples)
    ours = np.asarray(losses.stft(jnp.asarray(wave), WINDOW))
    assert ours.shape[1] == -(-samples // (WINDOW // 4))
    np.testing.assert_allclose(ours, spectrum(wave, WINDOW), atol=2e-7)


def test_a_full_scale_sine_has_half_its_amplitude_in_its_bin() -> None:
    wave = np.sin(2 * np.pi * 8 / WINDOW * np.arange(640))[None].astype(np.float32)
    middle = np.abs(np.asarray(losses.stft(jnp.asarray(wave), WINDOW)))[0, 20]
    assert middle.argmax() == 8
    assert middle[8] == pytest.approx(0.5, abs=1e-4)


def test_mel_loss_is_its_definition() -> None:
    ours, theirs = waves(1), waves(2)
    expected = 0.0
    for window, bands in ((64, 10), (32, 6)):
        a, b = mel(ours, window, bands), mel(theirs, window, bands)
        linear = np.abs(a - b).mean() / (b.mean() + 1e-5)
        expected += (linear + np.abs(log(a) - log(b)).mean()) / 2
    found = losses.mel_loss(jnp.asarray(ours), jnp.asarray(theirs), RATE, (64, 32), (10, 6))
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_stft_loss_is_its_definition() -> None:
    ours, theirs = waves(3), waves(4)
    expected = 0.0
    for window in (64, 16):
        a, b = np.abs(spectrum(ours, window)), np.abs(spectrum(theirs, window))
        convergence = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
        expected += (np.mean(convergence) + np.abs(log(a) - log(b)).mean()) / 2
    found = losses.stft_loss(jnp.asarray(ours), jnp.asarray(theirs), (64, 16))
    assert float(found) == pytest.approx(expected, rel=1e-3)


def test_waveform_loss_and_mel_distance_are_their_definitions() -> None:
    ours, theirs = waves(5), waves(6)
    found = losses.waveform_loss(jnp.asarray(ours), jnp.asarray(theirs))
    assert float(found) == pytest.approx(np.abs(ours - theirs).mean(), rel=1e-5)
    rows = np.asarray(losses.mel_distance(jnp.asarray(ours), jnp.asarray(theirs), RATE))
    # 1,024 samples at 24 kHz are 171 at 4 kHz; the nearest power of two is 128, with 10 bands.
    expected = np.abs(log(mel(ours, 128, 10)) - log(mel(theirs, 128, 10))).mean(axis=(1, 2))
    np.testing.assert_allclose(rows, expected, rtol=1e-4)


def test_si_sdr_is_its_definition_and_ignores_scale() -> None:
    target, noise = waves(7), waves(8)
    mixed = target + 0.1 * noise
    expected = []
    for estimate, true in zip(mixed.astype(np.float64), target.astype(np.float64), strict=True):
        part = estimate @ true / (true @ true) * true
        expected.append(10 * np.log10((part @ part) / ((estimate - part) @ (estimate - part))))
    for scale in (1.0, 3.0):
        found = losses.si_sdr(jnp.asarray(scale * mixed), jnp.asarray(target))
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-3)


def test_losses_of_equal_waves_vanish_and_silence_has_finite_gradients() -> None:
    wave, silence = jnp.asarray(waves(9)), jnp.zeros((2, 200))

    def total(a: jax.Array, b: jax.Array) -> jax.Array:
        mels = losses.mel_loss(a, b, RATE, (WINDOW,), (BANDS,))
        return mels + losses.stft_loss(a, b, (WINDOW,)) + losses.waveform_loss(a, b)

    # The root of the spectral convergence has a floor of 1e-7 over the norm of the target.
    assert float(total(wave, wave)) < 1e-5
    for target in (wave, silence):
        value, slope = jax.value_and_grad(total)(silence, target)
        assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize("hum", [np.ones(400), (-1.0) ** np.arange(400)])
def test_no_frequency_is_out_of_hearing(hum: np.ndarray) -> None:
    wave = jnp.asarray(waves(10, samples=400))
    loud = wave + jnp.asarray(hum, jnp.float32)
    assert float(losses.mel_distance(loud, wave, RATE).min()) > 0.1
    assert float(losses.mel_loss(loud, wave, RATE, (64,), (10,))) > 0.5


def test_too_many_bands_are_refused() -> None:
    with pytest.raises(ConfigError, match="80 bands are too many for a window of 64 samples"):
        losses.mel_matrix(24_000, 64, 80)
