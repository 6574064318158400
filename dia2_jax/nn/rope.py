"""Rotary position embedding, half-split form (Su et al., 2021)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from dia2_jax.typing import Array, Float, Int


def inverse_frequencies(
    head_dim: int, *, min_timescale: float = 1.0, max_timescale: float = 10_000.0
) -> np.ndarray:
    """Angular speed of each of the H/2 planes, radians per position, float32.

    The timescale grows geometrically from ``min_timescale`` to ``max_timescale``; the power is
    taken in float32 because the published models were trained with that rounding.
    """
    fraction = (np.float32(2.0) * np.arange(head_dim // 2, dtype=np.float32)) / np.float32(head_dim)
    ratio = np.float32(max_timescale / min_timescale)
    timescale = np.float32(min_timescale) * np.power(ratio, fraction, dtype=np.float32)
    return (np.float32(1.0) / timescale).astype(np.float32)


def angles(
    positions: Int[Array, "*B"], frequencies: np.ndarray
) -> tuple[Float[Array, "*B H/2"], Float[Array, "*B H/2"]]:
    """Cosine and sine of ``position * frequencies[i]``, float32.

    A bfloat16 angle is wrong by whole radians a few hundred positions in.
    """
    angle = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], frequencies: np.ndarray
) -> Float[Array, "B T N H"]:
    """Rotate plane (i, i + H/2) of every head by ``position * frequencies[i]``.

    Angles and products are float32 whatever ``x`` is.
    """
    # Else XLA computes them again for every element of every head.
    cos, sin = lax.optimization_barrier(angles(positions[..., None], frequencies))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
