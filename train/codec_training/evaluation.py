"""What is reported of a codec: distances of reconstructions, and how its codebooks are used."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from dia2_jax.mimi.codec import Mimi
from dia2_jax.typing import Array, ArrayLike, Float, Int
from train.codec_training.losses import mel_distance, si_sdr
from train.codec_training.quantizer import perplexity


class Judged(NamedTuple):
    """Windows, judged; on the device or on the host.

    Attributes:
      mel: mel distance by row, in nats.
      sdr: SI-SDR by row, in dB.
      codes: ``[B, C, T]``.
      wave: ``[B, W]``, the reconstructions.
    """

    mel: Float[ArrayLike, " B"]
    sdr: Float[ArrayLike, " B"]
    codes: Int[ArrayLike, "B C T"]
    wave: Float[ArrayLike, "B W"]


def judge(mimi: Mimi, wave: Float[Array, "B W"]) -> Judged:
    """Through all codebooks and back, by the codec's own inference."""
    codes = mimi.encode(wave)
    heard = mimi.decode(codes)
    rate = mimi.sample_rate
    return Judged(mel_distance(heard, wave, rate), si_sdr(heard, wave), codes, heard)


def streamed(mimi: Mimi, codes: Int[Array, "B C T"]) -> Float[Array, "B W"]:
    """The waveform decoded one frame at a time, as a stream is."""

    def frame(state: Any, codes: Array) -> tuple[Any, Array]:
        wave, state = mimi.decode_step(codes[..., None], state)
        return state, wave

    start = mimi.init_decode_state(codes.shape[0])
    _, pieces = lax.scan(frame, start, jnp.moveaxis(codes, 2, 0))
    return jnp.moveaxis(pieces, 0, 1).reshape(codes.shape[0], -1)


def streaming_difference(whole: Float[ArrayLike, "B W"], pieces: Float[ArrayLike, "B W"]) -> float:
    """Largest difference of a streamed decode, relative to the largest sample."""
    whole = np.asarray(whole)
    return float(np.abs(whole - np.asarray(pieces)).max() / (np.abs(whole).max() + 1e-12))


def codebook_figures(codes: Int[ArrayLike, "B C T"], entries: int) -> dict[str, float]:
    """Perplexity and share of entries used of every codebook, and their means.

    With F frames no codebook can show a perplexity above F.
    """
    rows = np.asarray(codes).transpose(1, 0, 2).reshape(codes.shape[1], -1)
    counts = np.stack([np.bincount(row, minlength=entries) for row in rows]).astype(np.float32)
    spread = np.asarray(perplexity(jnp.asarray(counts)))
    used = (counts > 0).mean(axis=1)
    result = {"perplexity": float(spread.mean()), "usage": float(used.mean())}
    for index in range(len(rows)):
        result[f"perplexity/{index}"] = float(spread[index])
        result[f"usage/{index}"] = float(used[index])
    return result
