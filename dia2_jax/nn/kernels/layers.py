"""One step of all layers of a transformer as one call of a kernel.

Layer by layer a step is some twenty small operations around four products, and threads are woken
for each of them; in the kernel they stay awake from the first layer to the last (`eval/SPEED.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dia2_jax.nn.kernels import FLOAT32_LAYERS, FLOAT32_ROWS, INT8_LAYERS, use_float32, use_int8
from dia2_jax.typing import Array, Float, Int


@dataclass(frozen=True)
class Matrix:
    """A weight ``[out, in]``: float32, or int8 with a float32 ``scale`` ``[out]``."""

    weight: Array
    scale: Array | None = None


@dataclass(frozen=True)
class AttentionWeights:
    """Projections of one weight set.

    Attributes:
      inward: of queries ``[N H, D]``, keys ``[K H, D]`` and values ``[K H, D]``, or one that
        holds all three below each other.
      outward: ``[D, N H]``.
    """

    inward: tuple[Matrix, ...]
    outward: Matrix


@dataclass(frozen=True)
class LayerWeights:
    """A pre-norm layer whose norms are root-mean-square and whose gates are silu, all float32.

    Attributes:
      attention_norm, mlp_norm: ``[D]``.
      query_norm, key_norm: ``[H]``, of every head.
      sets: attention's projections; one of them is used in a step.
      wide: ``[2 F, D]``, of the gates, then of what they let through.
      narrow: ``[D, F]``.
    """

    attention_norm: Array
    query_norm: Array
    key_norm: Array
    mlp_norm: Array
    sets: tuple[AttentionWeights, ...]
    wide: Matrix
    narrow: Matrix

    def operands(self) -> list[Array]:
        """In the order in which ``stack.h`` reads them."""
        matrices = [matrix for each in self.sets for matrix in (*each.inward, each.outward)]
        held = [self.attention_norm, self.query_norm, self.key_norm, self.mlp_norm]
        for matrix in (*matrices, self.wide, self.narrow):
            held += [matrix.weight] if matrix.scale is None else [matrix.weight, matrix.scale]
        return held


def use_layers(rows: int, layers: Sequence[LayerWeights]) -> bool:
    """Whether a program that is traced now is to call :func:`step_layers`."""
    dtypes = {operand.dtype for layer in layers for operand in layer.operands()}
    if dtypes == {jnp.dtype("float32")}:
        return rows <= FLOAT32_ROWS and use_float32()
    return dtypes == {jnp.dtype("float32"), jnp.dtype("int8")} and use_int8()


def step_layers(
    x: Float[Array, "B D"],
    angle: tuple[Float[Array, "B H/2"], Float[Array, "B H/2"]],
    slot: Int[Array, " B"],
    cache: Sequence[Array],
    layers: Sequence[LayerWeights],
    *,
    weight_set: int | Int[Array, ""] = 0,
    epsilon: float,
) -> tuple[Float[Array, "B D"], tuple[Array, ...]]:
    """One position a row, through all layers. Only where :func:`use_layers` says so.

    Args:
      x: what the first layer reads.
      angle: cosine and sine by which the row's queries and keys are rotated.
      slot: where the row's keys and values go; it attends to the slots up to this one.
      cache: ``[B, L, K, H, S]`` keys and ``[B, L, K, S, H]`` values, float32; with int8 weights
        also both ``[B, L, K, S, H]`` int8, and the scales of both ``[B, L, K, S]``.
      layers: their weights, L of them.
      weight_set: which of a layer's sets is used.
      epsilon: of all norms.

    Returns:
      What the last layer gives, and the cache, which is the same memory.
    """
    first = layers[0]
    narrow = first.wide.weight.dtype == jnp.int8
    before = (x, *angle, slot.astype(jnp.int32), jnp.asarray(weight_set, jnp.int32))
    results = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in (x, *cache)]
    call = jax.ffi.ffi_call(
        INT8_LAYERS if narrow else FLOAT32_LAYERS,
        results,
        vmap_method="sequential",
        input_output_aliases={len(before) + i: 1 + i for i in range(len(cache))},
    )
    y, *held = call(
        *before,
        *cache,
        *(operand for layer in layers for operand in layer.operands()),
        sets=np.int64(len(first.sets)),
        matrices=np.int64(len(first.sets[0].inward)),
        epsilon=np.float32(epsilon),
    )
    return y, tuple(held)
