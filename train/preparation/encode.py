"""Waveforms to codes, several at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dia2_jax.mimi.runtime import Codec
from dia2_jax.typing import Float, Int


def pad_to_frames(
    wave: Float[np.ndarray, " W"], frames: int, samples_per_frame: int
) -> Float[np.ndarray, " W2"]:
    """The waveform with silence behind it up to ``frames`` whole frames; never shorter."""
    return np.pad(wave, (0, max(0, frames * samples_per_frame - len(wave))))


def encode_waves(
    codec: Codec, waves: Sequence[Float[np.ndarray, " W"]], codebooks: int, batch: int
) -> list[Int[np.ndarray, "T C"]]:
    """Codes of each waveform, ``ceil(W / samples per frame)`` frames, in the order given.

    Waveforms of similar length share a batch. A batch is always ``batch`` rows, so that one
    program is compiled for all.
    """
    order = sorted(range(len(waves)), key=lambda index: len(waves[index]))
    codes: list[Int[np.ndarray, "T C"]] = [np.zeros((0, codebooks), np.int32)] * len(waves)
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        longest = max(len(waves[index]) for index in group)
        padded = np.zeros((batch, longest), np.float32)
        lengths = np.ones(batch, np.int64)  # rows that nothing fills count for one sample
        for row, index in enumerate(group):
            padded[row, : len(waves[index])] = waves[index]
            lengths[row] = len(waves[index])
        found = codec.encode(padded, lengths, codebooks)
        for row, index in enumerate(group):
            frames = -(-len(waves[index]) // codec.samples_per_frame)
            codes[index] = np.ascontiguousarray(found[row, :, :frames].T)
    return codes
