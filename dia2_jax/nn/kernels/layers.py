"""One step of all layers of a transformer as one call of a kernel.

Layer by layer a step is many small operations between products, and threads are woken for each of
them; in the kernel they stay awake from the first layer to the last (`eval/SPEED.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dia2_jax.nn.kernels import FLOAT32_LAYERS, FLOAT32_ROWS, INT8_LAYERS, use_float32, use_int8
from dia2_jax.typing import Array, Float, Int

Cache = TypeVar("Cache")

_FLOAT32, _INT8 = np.dtype(np.float32), np.dtype(np.int8)


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
    """A pre-norm layer whose norms are root-mean-square and whose gates are silu; norms float32.

    Attributes:
      attention_norm, mlp_norm: ``[D]``.
      query_norm, key_norm: ``[H]``, of every head.
      sets: attention's projections; one of them is used in a step.
      wi: ``[2 F, D]``, of the gates, then of what they let through.
      wo: ``[D, F]``.
    """

    attention_norm: Array
    query_norm: Array
    key_norm: Array
    mlp_norm: Array
    sets: tuple[AttentionWeights, ...]
    wi: Matrix
    wo: Matrix

    def operands(self) -> list[Array]:
        """In the order in which ``stack.h`` reads them."""
        matrices = [matrix for each in self.sets for matrix in (*each.inward, each.outward)]
        held = [self.attention_norm, self.query_norm, self.key_norm, self.mlp_norm]
        for matrix in (*matrices, self.wi, self.wo):
            held += [matrix.weight] if matrix.scale is None else [matrix.weight, matrix.scale]
        return held


def use_layers(rows: int, layers: Sequence[LayerWeights], cache: Any) -> bool:
    """Whether a program that is traced now is to call :func:`step_layers`: it computes float32 with
    float32 or int8 weights, of layers that are alike."""
    forms = [[(each.shape, each.dtype) for each in layer.operands()] for layer in layers]
    if any(form != forms[0] for form in forms) or layers[0].query_norm.size % 2:
        return False
    weights = [dtype for _, dtype in forms[0]]
    held = [part.dtype for part in jax.tree.leaves(cache)]
    if weights == [_FLOAT32] * len(weights):
        return held == [_FLOAT32] * 2 and rows <= FLOAT32_ROWS and use_float32()
    rounded = [_FLOAT32] * 4 + [_INT8, _FLOAT32] * ((len(weights) - 4) // 2)
    caches = ([_FLOAT32] * 2, [_INT8] * 2 + [_FLOAT32] * 2)
    return weights == rounded and held in caches and use_int8()


def step_layers(
    x: Float[Array, "B D"],
    angle: tuple[Float[Array, "B H/2"], Float[Array, "B H/2"]],
    slot: Int[Array, " B"],
    cache: Cache,
    layers: Sequence[LayerWeights],
    *,
    weight_set: int | Int[Array, ""] = 0,
    epsilon: float,
) -> tuple[Float[Array, "B D"], Cache]:
    """One position a row, through all layers. Only where :func:`use_layers` says so.

    It has no gradient: training reads whole sequences.

    Args:
      x: what the first layer reads.
      angle: cosine and sine by which the row's queries and keys are rotated.
      slot: where the row's keys and values go; it attends to the slots up to this one.
      cache: ``[B, L, K, H, S]`` keys and ``[B, L, K, S, H]`` values, float32; with int8 weights
        also both ``[B, L, K, S, H]`` int8, and the scales of both ``[B, L, K, S]``: a structure
        whose leaves are these, in this order.
      layers: their weights, L of them.
      weight_set: which of a layer's sets is used.
      epsilon: of all norms.

    Returns:
      What the last layer gives, and the cache, which is the same memory.
    """
    first = layers[0]
    before = (x, *angle, slot.astype(jnp.int32), jnp.asarray(weight_set, jnp.int32))
    held, structure = jax.tree.flatten(cache)
    call = jax.ffi.ffi_call(
        FLOAT32_LAYERS if first.wo.scale is None else INT8_LAYERS,
        [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in (x, *held)],
        vmap_method="sequential",
        input_output_aliases={len(before) + i: 1 + i for i in range(len(held))},
    )
    y, *kept = call(
        *before,
        *held,
        *(operand for layer in layers for operand in layer.operands()),
        sets=np.int64(len(first.sets)),
        matrices=np.int64(len(first.sets[0].inward)),
        epsilon=np.float32(epsilon),
    )
    return y, jax.tree.unflatten(structure, kept)
