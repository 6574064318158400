"""Targets for semantic distillation from a `transformers` speech encoder, WavLM by default.

The one file of codec training that uses torch, and only when a teacher is asked for. It runs while
audio is decoded into the cache, once for each recording; training itself never waits for it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dia2_jax.audio import resample
from dia2_jax.errors import ConfigError
from dia2_jax.typing import Float

#: Rate of the speech encoders, and samples of one of their steps (20 ms).
_RATE, _STEP = 16_000, 320

#: A recording is taken in pieces of so many seconds, with so many around them that are not used.
_PIECE, _AROUND = 30, 2


class SpeechTeacher:
    """Features of a speech encoder, averaged over each code frame.

    Args:
      name: folder or repository for ``transformers.AutoModel``.
      layer: hidden layer; -1 is the last.
      sample_rate: of the waveforms it will be given.
      samples_per_frame: of the codec, at that rate.

    Raises:
      ConfigError: torch or transformers is missing, or the model cannot be loaded.
    """

    def __init__(self, name: str, layer: int, sample_rate: int, samples_per_frame: int) -> None:
        try:
            import torch
            from transformers import AutoModel
        except ImportError as error:
            raise ConfigError(
                f"semantic.teacher: {error.name} is not installed; install torch and transformers "
                "(extra parity), or give targets with the data"
            ) from None
        try:
            model: Any = AutoModel.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"semantic.teacher: {name} cannot be loaded ({reason})") from None
        self._torch, self._model, self._layer = torch, model.eval(), layer
        self._rate, self._frame = sample_rate, samples_per_frame / sample_rate

    def __call__(self, wave: Float[np.ndarray, " W"]) -> Float[np.ndarray, "T K"]:
        """One row a code frame of the waveform."""
        frames = math.ceil(len(wave) / self._rate / self._frame - 1e-9)
        heard = resample(wave, self._rate, _RATE)
        # The encoders were trained on recordings of mean 0 and variance 1.
        heard = (heard - heard.mean()) / (heard.std() + 1e-7)
        steps = []
        for start in range(0, len(heard), _PIECE * _RATE):
            first = max(0, start - _AROUND * _RATE)
            piece = heard[first : start + (_PIECE + _AROUND) * _RATE]
            piece = np.pad(piece, (0, max(0, 2 * _STEP - len(piece))))
            features = self._features(piece)[(start - first) // _STEP :]
            steps.append(features[: _PIECE * _RATE // _STEP])
        return average(np.concatenate(steps), _STEP / _RATE, self._frame, frames)

    def _features(self, heard: Float[np.ndarray, " W"]) -> Float[np.ndarray, "S K"]:
        with self._torch.inference_mode():
            values = self._torch.from_numpy(np.ascontiguousarray(heard, np.float32))[None]
            result = self._model(values, output_hidden_states=True)
            return result.hidden_states[self._layer][0].float().numpy()


def average(
    steps: Float[np.ndarray, "S K"], step: float, frame: float, frames: int
) -> Float[np.ndarray, "T K"]:
    """Mean of the steps whose middle falls into each frame.

    A frame that holds none (the encoders drop a step at the end) repeats the one before.

    Args:
      steps: features, one every `step` seconds.
      step: in seconds.
      frame: seconds of a frame.
      frames: how many.
    """
    owner = ((np.arange(len(steps)) + 0.5) * step / frame + 1e-9).astype(int)
    result = np.zeros((frames, steps.shape[1]), np.float32)
    for index in range(frames):
        mine = steps[owner == index]
        if len(mine):
            result[index] = mine.mean(axis=0)
        elif index:
            result[index] = result[index - 1]
    return result
