"""int8 products: weights scaled by output channel, activations by row, sums in int32.

A quantised weight is ``[out, in]`` int8 with a float32 scale for every output. Activations are
rounded where they are used, with a scale of their own for every row, to two int8 digits: with one
they would lose more than the weights do, and a product of few rows is bound by reading the weights,
whose number stays the same. The product is a sum of integers for either digit, so it is exact, and
the same for one row as for a whole sequence.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from dia2_jax.nn.kernels import product_int8, use_int8
from dia2_jax.nn.one_of import OneOf
from dia2_jax.typing import Array, Float, Int

#: Largest magnitude used: the range is symmetric, -128 stays unused.
LEVELS = 127

#: Base of the second digit of two: a first digit rounds to within a half, which is 127 of these.
BASE = 2 * LEVELS

#: What an int8 weight's scales are called: ``NAME.weight`` has ``NAME.weight_scale``.
SCALE_SUFFIX = "_scale"

#: Below this a row counts as zeros: the reciprocal of its largest magnitude might be infinite.
SMALLEST = 1e-30

# Bytes of float32 rounded at a time: the passes over them then stay in the processor's cache.
_BLOCK_BYTES = 1 << 20


def quantize(weight: Float[np.ndarray, "F D"]) -> tuple[np.ndarray, np.ndarray]:
    """Round a weight to int8.

    Returns:
      ``[F, D]`` int8 and ``[F]`` float32, whose product is nearest to ``weight`` with the largest
      magnitude of every output at 127. An output of zeros has scale 0; one that is not finite
      has a scale that is not either, so that the model shows it as it does in float32.
    """
    outputs, inputs = weight.shape
    rounded = np.empty(weight.shape, np.int8)
    scale = np.empty(outputs, np.float32)
    block = max(_BLOCK_BYTES // max(4 * inputs, 1), 1)
    for start in range(0, outputs, block):
        part = np.asarray(weight[start : start + block], np.float32)
        peak = np.abs(part).max(axis=1, initial=0)
        scale[start : start + block] = peak / np.float32(LEVELS)
        usable = np.isfinite(peak) & (peak > SMALLEST)
        factor = np.divide(np.float32(LEVELS), peak, out=np.zeros_like(peak), where=usable)
        scaled = np.where(usable[:, None], part, 0) if not usable.all() else part
        rounded[start : start + block] = np.rint(scaled * factor[:, None])
    return rounded, scale


def round_rows(x: Float[Array, "*B D"]) -> tuple[Int[Array, "*B D"], Float[Array, "*B"]]:
    """Round every row of the last axis to int8; the second result is its float32 scale.

    A row that is not finite has a scale that is not either, or is NaN after multiplying with it.
    """
    x = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x), axis=-1)
    rounded = jnp.round(x * (LEVELS / jnp.maximum(peak, SMALLEST))[..., None])
    return rounded.astype(jnp.int8), peak / LEVELS


def round_rows_twice(
    x: Float[Array, "*B D"],
) -> tuple[Int[Array, "*B D"], Int[Array, "*B D"], Float[Array, "*B"]]:
    """Round every row of the last axis to two int8 digits and a float32 scale.

    ``(first + second / BASE) * scale`` is within 1 / 64,516 of the row's largest magnitude. What is
    not finite comes out as in :func:`round_rows`.
    """
    x = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x), axis=-1)
    scaled = x * (LEVELS / jnp.maximum(peak, SMALLEST))[..., None]
    first = jnp.round(scaled)
    second = jnp.round((scaled - first) * BASE)
    return first.astype(jnp.int8), second.astype(jnp.int8), peak / LEVELS


def project_int8(
    x: Float[Array, "*B D"], weight: Int[Array, "F D"] | OneOf, scale: Float[Array, " F"]
) -> Float[Array, "*B F"]:
    """``x @ (scale[:, None] * weight).T`` with ``x`` rounded to two digits by row, in float32.

    A row that is not finite gives NaN.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    product = product_int8 if use_int8() else multiply_in_xla
    if isinstance(weight, OneOf):
        y = weight.apply(lambda rows, chosen: product(rows, chosen, scale), rows)
    else:
        y = product(rows, weight, scale)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def multiply_in_xla(
    x: Float[Array, "B D"], weight: Int[Array, "F D"], scale: Float[Array, " F"]
) -> Float[Array, "B F"]:
    """What ``product_int8`` of :mod:`dia2_jax.nn.kernels` computes, in XLA's operations.

    The weights are the left operand: XLA's CPU backend reads a left one as it lies and repacks a
    right one on every call, which takes twice the time (``python -m eval.matmul_speed``). Both
    digits of all rows are its right one, so that the weights are read once.
    """
    first, second, step = round_rows_twice(x)
    sums = lax.dot_general(
        weight,
        jnp.concatenate([first, second]),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
    )
    high, low = jnp.split(sums.astype(jnp.float32), 2, axis=1)
    y = (high + low / BASE) * scale[:, None] * step
    # Without the barrier XLA turns the transposition of a product into the product with its
    # operands exchanged, which is the slow one.
    return lax.optimization_barrier(y).T
