"""A second speaker made of the first: Praat's "Change gender" moves pitch and formants apart."""

from __future__ import annotations

import numpy as np

from dia2_jax.errors import Dia2Error
from dia2_jax.typing import Float

#: Where the first speaker's pitch is looked for, in Hz.
_PITCH_FLOOR, _PITCH_CEILING = 60.0, 300.0


def change_voice(
    wave: Float[np.ndarray, " W"],
    sample_rate: int,
    *,
    pitch: float,
    formants: float,
    pitch_range: float,
) -> Float[np.ndarray, " W"]:
    """The same speech by a speaker of another size, at the same times.

    Args:
      wave: speech.
      sample_rate: of it.
      pitch: median of the result, in Hz.
      formants: factor of its formants; above 1 a shorter vocal tract.
      pitch_range: factor of how far pitch moves about its median.

    Raises:
      Dia2Error: praat-parselmouth is not installed.
    """
    try:
        import parselmouth
        from parselmouth.praat import call, run
    except ImportError as error:
        raise Dia2Error(
            f"voice: praat-parselmouth cannot be imported ({error}); install it with: "
            'pip install "dia2-jax[corpus]"'
        ) from error
    # Praat jitters what is unvoiced; from one seed, the same speech gives the same result.
    run("random_initializeWithSeedUnsafelyButPredictably (1)")
    sound = parselmouth.Sound(wave.astype(np.float64), sampling_frequency=sample_rate)
    changed = call(
        sound, "Change gender", _PITCH_FLOOR, _PITCH_CEILING, formants, pitch, pitch_range, 1.0
    )
    result = changed.values[0].astype(np.float32)
    # Praat works on whole periods and may end a few samples early or late.
    return np.pad(result, (0, max(len(wave) - len(result), 0)))[: len(wave)]
